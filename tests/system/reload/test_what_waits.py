"""What waits while a process is exchanged, seen at the moment at which it would go wrong if it did not."""

from __future__ import annotations

import json
import os
import signal
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import cast

import pytest

from tests.standalone.test_terminal import terminal
from tests.support.timeouts import seconds
from tests.system.daemon import daemon, event, wait_for, write_plugin
from tests.system.reload.exchanges import MODULES, exchanged
from tests.system.reload.gated import ANSWERED, BEFORE, PARTING, GatedDaemon

LATE = """\
    #!/usr/bin/python3
    import json, os, socket, time
    path, state = os.environ["PLUGIN_SOCKET"], os.environ["PLUGIN_STATE_DIR"]
    if os.path.exists(path):
        os.unlink(path)
    server = socket.socket(socket.AF_UNIX)
    server.bind(path)
    open(state + "/bound", "w").close()
    while not os.path.exists(state + "/listen"):
        time.sleep(0.01)
    server.listen(1)
    while True:
        connection, _ = server.accept()
        request = connection.recv(65536)
        with open(state + "/requests", "a") as requests:
            print(len(request), file=requests)
        if request:
            number = json.loads(request)["id"]
            reply = {"jsonrpc": "2.0", "id": number, "result": {"status": "ok"}}
            connection.sendall(json.dumps(reply).encode() + b"\\n")
        connection.close()
"""
"""Lets nobody connect before the file ``listen`` is there, and notes the length of each connection's request."""


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder in which the daemon looks for plugins."""
    return tmp_path_factory.mktemp("plugins")


@pytest.fixture(scope="module")
def d(place: Path) -> Iterator[GatedDaemon]:
    with daemon(host_toml=f'plugin_dirs = ["{place}"]\n', kind=GatedDaemon) as made:
        yield cast(GatedDaemon, made)


def begin_exchange(d: GatedDaemon, place: str) -> int:
    """Begin an exchange of the services that waits there; returns the pid of the host that leaves."""
    assert d.process is not None
    before = d.service_pid(MODULES["host"])
    d.wait_at(place)
    os.kill(d.process.pid, signal.SIGUSR1)
    wait_for(lambda: place in d.notes, what=d.log.read_text())
    return before


def test_new_host_serves_callers_once_it_knows_what_was_held_for_it(d: GatedDaemon, place: Path) -> None:
    before = begin_exchange(d, ANSWERED)
    write_plugin(place / "found")
    wait_for(lambda: "held plugin.changed" in d.notes, what=str(d.notes))
    with socket.socket(socket.AF_UNIX) as caller:
        caller.settimeout(seconds(60))
        caller.connect(str(d.root / "run/isolator/control.sock"))
        caller.sendall(b'{"jsonrpc":"2.0","id":1,"method":"plugin.show","params":{"name":"found"}}\n')
        d.go()
        answer = json.loads(caller.makefile("rb").readline())
    assert answer["result"]["name"] == "found", answer
    wait_for(lambda: exchanged(d, "host", before))


def test_no_connection_is_made_for_a_host_that_has_left(d: GatedDaemon, shared_dir: Path) -> None:
    folder = write_plugin(shared_dir / "late", LATE, sandbox={"filesystem": {"state": "1M"}})
    d.cli("plugin", "add", str(folder), "--yes")
    emitting = d.begin("event", "emit", "deploy.completed", event(1), "--wait")
    state = d.root / "var/lib/isolator/state/late/mnt/state"
    wait_for((state / "bound").exists)
    before = begin_exchange(d, PARTING)
    (state / "listen").touch()
    d.go()
    out, errors = emitting.communicate(timeout=seconds(60))
    assert emitting.returncode == 0, (out, errors, d.log.read_text())
    lengths = [int(line) for line in (state / "requests").read_text().split()]
    assert len(lengths) == 1 and lengths[0], "a connection without a request, of which simple plugins die"
    wait_for(lambda: exchanged(d, "host", before))


def adding(d: GatedDaemon, folder: Path) -> list[str]:
    """The command of an operator who adds a plugin."""
    return ["isolator", "--root", str(d.root), "plugin", "add", str(folder)]


def test_operator_agrees_after_a_reload_to_what_was_shown_before(d: GatedDaemon, shared_dir: Path) -> None:
    with terminal(adding(d, write_plugin(shared_dir / "shown"))) as operator:
        operator.shows("with exactly this?")
        d.cli("reload")
        operator.press("y\r")
        operator.shows("added shown")
        assert operator.end() == 0


def test_what_would_be_shown_otherwise_after_a_reload_has_expired(d: GatedDaemon, shared_dir: Path) -> None:
    with terminal(adding(d, write_plugin(shared_dir / "other"))) as operator:
        operator.shows("with exactly this?")
        (d.root / "etc/isolator/policies/other.toml").write_text('[limits]\nmemory = "64M"\n')
        d.cli("reload")
        operator.press("y\r")
        operator.shows("has expired")
        assert operator.end() != 0
    assert not list((d.root / "var/lib/isolator/plugins").glob(".staging-*"))


def test_reload_waits_for_the_exchange_of_the_one_before(d: GatedDaemon) -> None:
    begin_exchange(d, BEFORE)
    d.cli("reload")
    notes = d.notes
    first_rest = notes.index("at rest")
    assert {f"exchanged {name}" for name in MODULES} <= set(notes[:first_rest]), notes
    wait_for(lambda: [note for note in d.notes[first_rest:] if note == "exchanged host"])
