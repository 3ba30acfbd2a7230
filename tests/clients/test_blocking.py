"""The published client for code that waits: against a real host, and against a socket that behaves badly."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from isolator_client import Client, IsolatorError, Notification, UsageError, address
from isolator_client.errors import UnavailableError
from tests.audit.tamper import rechain
from tests.clients.conftest import error
from tests.host.fake_supervisor import REPO, Daemon
from tests.support import sidecars
from tests.support.timeouts import seconds

PAYLOAD = {"project_id": "p", "deployment_id": "d", "url": "https://x.example", "duration_ms": 1}


@contextlib.contextmanager
def served(listener: socket.socket, *answers: Any) -> Iterator[list[dict[str, Any]]]:
    """Answer the requests of the next connection in turn (a list: several messages; None: close), in a thread."""
    requests: list[dict[str, Any]] = []

    def work() -> None:
        connection, _ = listener.accept()
        with connection, connection.makefile("rwb") as wire:
            for answer in answers:
                if answer is None:
                    return
                requests.append(json.loads(wire.readline()))
                for message in answer if isinstance(answer, list) else [{"id": requests[-1]["id"], **answer}]:
                    wire.write(json.dumps(message).encode() + b"\n")
                wire.flush()
            wire.readline()

    thread = threading.Thread(target=work)
    thread.start()
    yield requests
    thread.join(seconds(10))
    assert not thread.is_alive()


# Against the real host


async def test_an_event_is_emitted_and_its_delivery_waited_for(daemon: Daemon) -> None:
    daemon.add("one", sidecars.OK)

    def work() -> None:
        with Client(root=daemon.root) as client:
            event = client.emit("deploy.completed", PAYLOAD, dedupe_key="k", ttl=60, traceparent="00-1-2-03")
            assert event.plugins == ("one",) and not event.overflowed and not event.duplicate
            (delivery,) = client.wait(event.id, timeout=seconds(20))
            assert (delivery.plugin, delivery.state, delivery.final, delivery.succeeded) == ("one", "ok", True, True)
            assert delivery.attempts == 1 and delivery.latency_us
            again = client.emit("deploy.completed", PAYLOAD, dedupe_key="k")
            assert (again.id, again.duplicate) == (event.id, True)
            assert [plugin["name"] for plugin in client.plugins()] == ["one"]
            with pytest.raises(UsageError, match="duration_ms"):
                client.emit("deploy.completed", PAYLOAD | {"duration_ms": "soon"})

    await asyncio.to_thread(work)


async def test_an_event_of_ones_own_is_registered(daemon: Daemon) -> None:
    schema = {"type": "object", "properties": {"volume": {"type": "string"}}, "required": ["volume"]}

    def work() -> None:
        with Client(root=daemon.root) as client:
            client.register_event("backup.failed", schema, order_by="volume")
            assert client.emit("backup.failed", {"volume": "grün ⚙ \u2028"}).id
            with pytest.raises(UsageError, match="volume"):
                client.emit("backup.failed", {})

    await asyncio.to_thread(work)


async def test_the_readme_runs(daemon: Daemon) -> None:
    daemon.add("one", sidecars.OK)
    blocks = (REPO / "clients/python/README.md").read_text().split("```python\n")[1:]
    first, _, *others = [block.split("```")[0] for block in blocks]  # tests/docs/test_run_blocks.py runs the second
    assert len(others) == 2
    assert [await _run(daemon.root, block) for block in (first, *others)] == ["one ok True\n", "", ""]


async def _run(root: Path, program: str) -> str:
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-c", program), stdout=subprocess.PIPE, env={**os.environ, "ISOLATOR_ROOT": str(root)}
    )
    out, _ = await process.communicate()
    assert process.returncode == 0, (program, out)
    return out.decode()


async def test_notifications_come_in_order_also_those_before_the_answer(daemon: Daemon) -> None:
    daemon.add("chatty", sidecars.oneshot("for n in range(50): print('line', n, flush=True)\nreturn {}"))

    def work() -> list[str]:
        with Client(root=daemon.root) as client:
            client.call("plugin.logs", name="chatty", follow=True)
            event = client.emit("deploy.completed", PAYLOAD)
            client.wait(event.id, timeout=seconds(20))
            texts: list[str] = []
            for method, params in client.notifications():
                assert method == "log"
                texts.append(params["line"])
                if params["line"] == "line 49":
                    break
            return texts

    texts = await asyncio.to_thread(work)
    assert [text for text in texts if text.startswith("line")] == [f"line {n}" for n in range(50)]


# Connecting


def test_the_socket_is_found(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("ISOLATOR_ROOT", raising=False)
    assert address.control_socket() == "/run/isolator/control.sock"
    assert address.control_socket(root=tmp_path) == f"{tmp_path}/run/isolator/control.sock"
    monkeypatch.setenv("ISOLATOR_ROOT", str(tmp_path))
    assert address.control_socket() == f"{tmp_path}/run/isolator/control.sock"
    assert address.control_socket(tmp_path / "other.sock", root="/srv") == f"{tmp_path}/other.sock"
    monkeypatch.chdir(tmp_path)
    assert address.control_socket("other.sock") == f"{tmp_path}/other.sock"


@pytest.mark.parametrize("folder", ["", "long-" * 30])
def test_without_a_daemon_it_says_so(tmp_path: Path, folder: str) -> None:
    with pytest.raises(UnavailableError, match=r"the daemon is not running: no .*; start it .* or name its --root"):
        Client(root=tmp_path / folder)
    path = Path(address.control_socket(root=tmp_path / folder))
    path.parent.mkdir(parents=True)
    path.write_text("no socket")  # refused, as while a killed host process is being replaced
    with pytest.raises(UnavailableError, match=r"nobody listens at .* at the moment.*; try again"):
        Client(root=tmp_path / folder)


async def test_a_long_path_is_reached(daemon: Daemon) -> None:
    link = daemon.root / ("long-" * 30)
    link.mkdir()
    os.link(daemon.paths.control_socket, link / "control.sock")

    def work() -> None:
        before = len(os.listdir("/proc/self/fd"))
        with Client(link / "control.sock") as client:
            assert client.call("status")["plugins"] == 0
        assert len(os.listdir("/proc/self/fd")) == before

    await asyncio.to_thread(work)


async def test_a_user_who_may_not_is_told(daemon: Daemon) -> None:
    code = (
        f"import sys; sys.path.insert(0, {str(REPO / 'clients/python')!r})\nfrom isolator_client import *\n"
        f"for attempt in (lambda: Client(root={str(daemon.root)!r}), lambda: _.call('status')):\n"
        "    try: _ = attempt()\n"
        "    except DeniedError as error: print(error)\n"
    )

    async def stranger() -> str:
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-I", "-c", code), stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
            user=65534, group=65534, extra_groups=[], cwd="/",
        )  # fmt: skip
        out, _ = await process.communicate()
        return out.decode()

    assert "uid 65534 has the role none, it needs viewer" in await stranger()
    daemon.paths.control_socket.chmod(0o600)
    assert (await stranger()).startswith(f"{daemon.paths.control_socket}: this user may not connect")


def test_who_finds_no_place_in_time_is_told(listener: socket.socket) -> None:
    with socket.socket(socket.AF_UNIX) as first:
        first.connect(listener.getsockname())
        with pytest.raises(UnavailableError, match="too many callers are waiting; try again"):
            Client(listener.getsockname(), timeout=0.1)


# Answers that do not come, or come too early, too late, or are none


def test_a_daemon_that_is_silent_is_given_up_and_its_late_answer_dropped(listener: socket.socket) -> None:
    late = [{"id": 1, "result": {"late": True}}, {"id": 2, "result": {"n": 2}}]
    with served(listener, [], late), Client(listener.getsockname(), timeout=0.2) as client:
        begun = time.monotonic()
        with pytest.raises(UnavailableError, match="no answer in time"):
            client.call("status")
        assert time.monotonic() - begun >= 0.2
        client.timeout = seconds(60)
        assert client.call("status") == {"n": 2}


def test_waiting_for_deliveries_has_the_time_that_it_asks_for(listener: socket.socket) -> None:
    def answer() -> None:
        connection, _ = listener.accept()
        with connection, connection.makefile("rwb") as wire:
            wire.readline()
            time.sleep(0.4)  # longer than the client's own timeout
            wire.write(b'{"id":1,"result":{"deliveries":[]}}\n')

    with ThreadPoolExecutor(1) as pool:
        answering = pool.submit(answer)
        with Client(listener.getsockname(), timeout=0.1) as client:
            assert client.wait("ev_1", timeout=seconds(5)) == []
        answering.result()


def test_a_daemon_that_takes_nothing_is_given_up_and_the_connection_with_it(listener: socket.socket) -> None:
    with Client(listener.getsockname(), timeout=0.2) as client, listener.accept()[0]:
        with pytest.raises(UnavailableError, match="no answer in time"):
            client.call("event.emit", name="x", payload={"text": "x" * 1_000_000})
        with pytest.raises(UnavailableError, match="closed the connection"):
            client.call("status")


def test_a_connection_that_ends_in_the_middle_of_a_call_is_told(listener: socket.socket) -> None:
    with served(listener, [], None), Client(listener.getsockname()) as client:
        with pytest.raises(UnavailableError, match="closed the connection; try again"):
            client.call("status")
        with pytest.raises(UnavailableError, match="closed the connection; try again"):
            client.call("status")


def test_a_program_that_sigpipe_would_kill_lives(listener: socket.socket) -> None:
    code = (
        f"import signal, sys; sys.path.insert(0, {str(REPO / 'clients/python')!r})\nfrom isolator_client import *\n"
        "signal.signal(signal.SIGPIPE, signal.SIG_DFL)\nclient = Client(sys.argv[1])\nsys.stdin.read()\n"
        "try: client.call('status')\nexcept UnavailableError as error: print(error)\n"
    )
    command = [sys.executable, "-I", "-c", code, listener.getsockname()]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as program:
        listener.accept()[0].close()
        out, _ = program.communicate(timeout=seconds(30))
    assert (program.returncode, out.startswith("the daemon: closed the connection")) == (0, True)


def test_why_a_line_was_not_read_is_told(listener: socket.socket) -> None:
    refusal = {"id": None, "error": error("usage", what="request", why="is longer than 10 bytes")}
    with (
        served(listener, [refusal], None),
        Client(listener.getsockname()) as client,
        pytest.raises(UsageError, match="is longer than 10 bytes"),
    ):
        client.call("status")


def test_what_is_no_message_is_told(listener: socket.socket) -> None:
    with (
        served(listener, ["text"]),
        Client(listener.getsockname()) as client,
        pytest.raises(IsolatorError, match="sent a line that is no object"),
    ):
        client.call("status")


def test_notifications_end_with_the_connection_or_with_the_reader_of_the_output(listener: socket.socket) -> None:
    first = [{"method": "log", "params": {"n": 1}}, {"id": 1, "result": {}}, {"method": "log", "params": {"n": 2}}]
    expected = [Notification("log", {"n": 1}), Notification("log", {"n": 2})]
    with served(listener, first, None), Client(listener.getsockname()) as client:
        client.call("plugin.logs")
        assert list(client.notifications()) == expected
    with served(listener, first), Client(listener.getsockname()) as client:
        client.call("plugin.logs")
        reader, writer = os.pipe()
        arriving = client.notifications(watched=writer)
        assert [next(arriving), next(arriving)] == expected
        os.close(reader)
        assert list(arriving) == []
        os.close(writer)


# The trail


def _records(count: int) -> list[str]:
    fields = {"time": "t", "type": "event.accepted", "origin": "host:1:1", "plugin": "p", "run": None}
    body = {"seq": 0, **fields, "event_id": "e", "delivery_id": None, "data": {}, "prev": "0" * 64, "hash": "0" * 64}
    return [line.decode() for line in rechain([json.dumps(body, separators=(",", ":")).encode()] * count)]


def _sent(lines: list[str]) -> dict[str, Any]:
    return {"method": "audit.records", "params": {"lines": lines}}


def _trail(listener: socket.socket, *connections: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Serve one follower after the other; returns the parameters with which each asked."""
    asked = []
    first, _ = listener.accept()  # of the client itself
    for messages in connections:
        connection, _ = listener.accept()
        with connection, connection.makefile("rwb") as wire:
            request = json.loads(wire.readline())
            assert request["method"] == "audit.follow"
            asked.append(request["params"])
            wire.write(b"".join(json.dumps({"id": 1, **message}).encode() + b"\n" for message in messages))
    first.close()
    return asked


def test_the_trail_goes_on_where_it_was(listener: socket.socket) -> None:
    lines, begin = _records(6), {"result": {"after": 2, "last": 4}}
    away = {"error": error("unavailable")}
    with ThreadPoolExecutor(1) as pool:
        # The first tells the place and ends; before the second has sent anything the place is known.
        connections = [begin], [away], [begin, _sent(lines[2:4])], [begin, _sent(lines[4:])]
        asked = pool.submit(_trail, listener, *connections)
        with Client(listener.getsockname()) as client:
            records = client.audit(lines=2)
            assert [next(records).line for _ in range(4)] == lines[2:]
            records.close()
        assert asked.result() == [{"lines": 2}, {"after": 2}, {"after": 2}, {"after": 4}]


@pytest.mark.parametrize(
    ("messages", "why"),
    [
        ([{"error": error("denied", why="needs viewer")}], "needs viewer"),
        ([{"error": error("unavailable", why="32 callers follow")}], "32 callers follow"),
        ([{"result": {"after": 0}}, {"method": "audit.records", "params": {"lines": ["nonsense"]}}], "is no record"),
        ([], "closed the connection"),
    ],
)
def test_what_is_wrong_with_the_trail_is_told(
    listener: socket.socket, messages: list[dict[str, Any]], why: str
) -> None:
    with ThreadPoolExecutor(1) as pool:
        asked = pool.submit(_trail, listener, messages)
        with Client(listener.getsockname()) as client, pytest.raises(IsolatorError, match=why):
            next(client.audit(after=0))
        asked.result()
