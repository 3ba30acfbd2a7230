"""The command line's connection against a control socket that is full, or closes on it."""

from __future__ import annotations

import json
import socket
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from host.client.client import Client
from isolator.errors import IsolatorError, UnavailableError, UsageError
from isolator.paths import Paths
from tests.support.timeouts import seconds


@pytest.fixture
def listener(shared_dir: Path) -> Iterator[socket.socket]:
    """A control socket whose backlog has room for one."""
    path = Paths.of(shared_dir).control_socket
    path.parent.mkdir(parents=True)
    with socket.socket(socket.AF_UNIX) as sock:
        sock.bind(str(path))
        sock.listen(0)
        sock.settimeout(seconds(10))
        yield sock


def _fill(listener: socket.socket) -> socket.socket:
    first = socket.socket(socket.AF_UNIX)
    first.connect(listener.getsockname())
    return first


def test_a_full_backlog_is_waited_for(listener: socket.socket, shared_dir: Path) -> None:
    answers = []

    def ask() -> None:
        with Client(shared_dir) as client:
            answers.append(client.call("status"))

    with _fill(listener):
        asking = threading.Thread(target=ask)
        asking.start()
        asking.join(0.1)  # long enough for it to have found the backlog full
        assert asking.is_alive()
        listener.accept()[0].close()
        connection, _ = listener.accept()
        with connection, connection.makefile("rwb") as wire:
            number = json.loads(wire.readline())["id"]
            wire.write(json.dumps({"jsonrpc": "2.0", "id": number, "result": {"plugins": 0}}).encode() + b"\n")
            wire.flush()
            asking.join(seconds(10))
    assert answers == [{"plugins": 0}]


def test_a_backlog_that_stays_full_says_what_to_do(listener: socket.socket, shared_dir: Path) -> None:
    with _fill(listener), pytest.raises(UnavailableError, match="too many callers are waiting; try again"):
        Client(shared_dir, timeout=0.1)


def test_why_the_daemon_closed_at_once_is_told(listener: socket.socket, shared_dir: Path) -> None:
    refusal = UnavailableError("control socket", "too many connections", "try again")
    with Client(shared_dir) as client:
        connection, _ = listener.accept()
        error = {"code": -32000, "message": "no", "data": refusal.to_json()}
        connection.sendall(json.dumps({"jsonrpc": "2.0", "id": None, "error": error}).encode() + b"\n")
        connection.close()
        with pytest.raises(UnavailableError, match="too many connections"):
            client.call("status")


@pytest.mark.parametrize(
    "kind",
    [IsolatorError, *(kind for kind in IsolatorError.__subclasses__() if kind.__module__ == IsolatorError.__module__)],
    ids=lambda kind: kind.code,
)
def test_each_error_arrives_as_it_was_raised(
    listener: socket.socket, shared_dir: Path, kind: type[IsolatorError]
) -> None:
    raised = kind("plugin p", "cannot start", "see its log")
    with Client(shared_dir) as client:
        connection, _ = listener.accept()
        error = {"code": -32000, "message": str(raised), "data": raised.to_json()}
        connection.sendall(json.dumps({"jsonrpc": "2.0", "id": 1, "error": error}).encode() + b"\n")
        with pytest.raises(IsolatorError) as caught:
            client.call("plugin.start", name="p")
        connection.close()
    assert (type(caught.value), caught.value.to_json()) == (kind, raised.to_json())


def test_a_request_that_cannot_be_sent_leaves_the_connection_alone(listener: socket.socket, shared_dir: Path) -> None:
    with Client(shared_dir) as client:
        connection, _ = listener.accept()
        with pytest.raises(UsageError, match="cannot be sent"):
            client.call("plugin.stage", path="\udcff")
        connection.sendall(b'{"jsonrpc":"2.0","id":2,"result":{"n":1}}\n')
        assert client.call("status") == {"n": 1}
        connection.close()
