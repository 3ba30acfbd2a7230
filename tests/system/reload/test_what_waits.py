"""What waits while a process is exchanged, seen at the moment at which it would go wrong if it did not."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import cast

import pytest

from host.client.client import Client
from tests.standalone.test_terminal import terminal
from tests.support.mcp_servers import server
from tests.support.sidecars import raw, stream
from tests.support.timeouts import seconds
from tests.system.daemon import EVENT, daemon, event, wait_for, write_plugin
from tests.system.reload.exchanges import MODULES, exchanged
from tests.system.reload.gated import ADDING, ANSWERED, BEFORE, LOADED, NOTED, PARTING, GatedDaemon

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
HESITATES = """
state = os.environ["PLUGIN_STATE_DIR"]
def hesitate():
    with open(state + "/greeted", "a") as greeted:
        greeted.write("once\\n")
    while not os.path.exists(state + "/answer"):
        time.sleep(0.01)
"""
"""Notes each greeting, and answers none before the file ``answer`` is there."""
HESITANT_STREAM = stream(
    "send(id=id, result={'status': 'ok'})",
    first=HESITATES,
    hello='hesitate() or {"protocol": "1", "handles": params["hooks"], "capabilities": []}',
)
HESITANT_SERVER = server(
    HESITATES
    + """
class Lines:
    def __iter__(self):
        for line in os.fdopen(0):
            if '"initialize"' in line:
                hesitate()
            yield line
sys.stdin = Lines()
"""
)
ASKS = raw(
    "connection.close()",
    first="""
import threading
state = os.environ["PLUGIN_STATE_DIR"]
def ask(number):
    host = socket.socket(socket.AF_UNIX)
    while host.connect_ex(os.environ["PLUGIN_HOST_SOCKET"]):
        time.sleep(0.01)
    while not os.path.exists(f"{state}/ask{number}"):
        time.sleep(0.01)
    call = {"jsonrpc": "2.0", "id": number, "method": "projects.get", "params": {"number": number}}
    host.sendall(json.dumps(call).encode() + b"\\n")
    open(f"{state}/asked{number}", "w").close()
    answer = host.makefile("rb").readline()
    with open(f"{state}/answer{number}.new", "wb") as file:
        file.write(answer)
    os.rename(f"{state}/answer{number}.new", f"{state}/answer{number}")
for number in (1, 2):
    threading.Thread(target=ask, args=(number,)).start()
""",
)
"""Asks the platform twice, each time over a connection of its own when the file ``askN`` is there."""
COUNTS = raw(
    "connection.close()",
    first="""
import threading
def count():
    number = 0
    while True:
        number += 1
        print(number, flush=True)
        time.sleep(0.01)
threading.Thread(target=count).start()
""",
)
"""Writes one line after the other."""
FLOODS = raw(
    "connection.close()",
    first="""
import threading
def flood():
    host, refused = socket.socket(socket.AF_UNIX), 0
    while host.connect_ex(os.environ["PLUGIN_HOST_SOCKET"]):
        time.sleep(0.01)
    lines = host.makefile("rb")
    for _ in range(3):
        host.sendall(b'{"jsonrpc":"2.0","method":"whoami","id":1}\\n' * 300)
        refused += sum(b"calls a second" in lines.readline() for _ in range(300))
    with open(os.environ["PLUGIN_STATE_DIR"] + "/refused", "w") as file:
        file.write(str(refused))
    time.sleep(1000)
threading.Thread(target=flood).start()
""",
)
"""Calls more often than it may for a moment, and never again."""
PROGRAM = """\
    #!/usr/bin/python3
    import os, sys
    with open(os.environ["PLUGIN_STATE_DIR"] + "/runs", "a") as runs:
        runs.write("once\\n")
    print('{"status": "written"}')
"""
STATE = {"filesystem": {"state": "1M"}}


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
    wait_for(lambda: place in d.notes, what=d.log.read_text)
    return before


def test_new_host_serves_callers_once_it_knows_what_was_held_for_it(d: GatedDaemon, place: Path) -> None:
    before = begin_exchange(d, ANSWERED)
    write_plugin(place / "found")
    wait_for(lambda: "held plugin.changed" in d.notes, what=lambda: str(d.notes))
    with socket.socket(socket.AF_UNIX) as caller:
        caller.settimeout(seconds(60))
        caller.connect(str(d.root / "run/isolator/control.sock"))
        caller.sendall(b'{"jsonrpc":"2.0","id":1,"method":"plugin.show","params":{"name":"found"}}\n')
        d.go()
        answer = json.loads(caller.makefile("rb").readline())
    assert answer["result"]["name"] == "found", answer
    wait_for(lambda: exchanged(d, "host", before))


def test_plugin_that_is_added_while_a_host_leaves_is_known_to_the_next(d: GatedDaemon, shared_dir: Path) -> None:
    before = begin_exchange(d, NOTED)
    folder = write_plugin(shared_dir / "meanwhile")
    d.cli("plugin", "add", str(folder), "--yes")
    d.go()
    wait_for(lambda: exchanged(d, "host", before), what=d.log.read_text)
    write_plugin(folder, version="1.0.1")
    d.cli("plugin", "update", "meanwhile", str(folder))
    assert d.json("plugin", "show", "meanwhile")["version"] == "1.0.1"
    d.cli("plugin", "remove", "meanwhile", "--yes")


def test_plugin_whose_registration_outlasts_the_host_that_was_asked_is_known_to_the_next(
    d: GatedDaemon, shared_dir: Path
) -> None:
    assert d.process is not None
    before = d.service_pid(MODULES["host"])
    d.wait_at(ADDING)
    adding = d.begin("plugin", "add", str(write_plugin(shared_dir / "slow")), "--yes")
    wait_for(lambda: ADDING in d.notes)
    os.kill(d.process.pid, signal.SIGUSR1)
    wait_for(lambda: exchanged(d, "host", before), what=d.log.read_text)
    d.go()
    wait_for(lambda: [r for r in d.records() if (r["type"], r["plugin"]) == ("plugin.added", "slow")])
    wait_for(lambda: "slow" in [one["name"] for one in d.json("plugin", "list")])
    adding.communicate(timeout=seconds(60))
    d.cli("plugin", "remove", "slow", "--yes")


def test_plugin_is_restarted_though_the_host_that_was_asked_leaves(d: GatedDaemon, shared_dir: Path) -> None:
    """It is drained by that host and gets its environment from it, for which the host waits that is to leave."""
    d.cli("plugin", "add", str(write_plugin(shared_dir / "anew")), "--yes")
    d.cli("plugin", "start", "anew")
    run = d.json("plugin", "show", "anew")["run"]
    before = begin_exchange(d, NOTED)
    d.cli("plugin", "restart", "anew")
    d.go()
    wait_for(lambda: exchanged(d, "host", before), what=d.log.read_text)
    shown = d.json("plugin", "show", "anew")
    assert shown["state"] == "running" and shown["run"] != run
    d.cli("plugin", "remove", "anew", "--yes")


def test_no_connection_is_made_for_a_host_that_has_left(d: GatedDaemon, shared_dir: Path) -> None:
    d.cli("plugin", "add", str(write_plugin(shared_dir / "late", LATE, sandbox=STATE)), "--yes")
    emitting = d.begin("event", "emit", "deploy.completed", event(1), "--wait")
    state = d.state_of("late")
    wait_for((state / "bound").exists)
    before = begin_exchange(d, PARTING)
    (state / "listen").touch()
    d.go()
    out, errors = emitting.communicate(timeout=seconds(60))
    assert emitting.returncode == 0, (out, errors, d.log.read_text())
    lengths = [int(line) for line in (state / "requests").read_text().split()]
    assert len(lengths) == 1 and lengths[0], "a connection without a request, of which simple plugins die"
    wait_for(lambda: exchanged(d, "host", before))


def test_platform_is_asked_once_though_its_answer_comes_to_another_host(d: GatedDaemon, shared_dir: Path) -> None:
    """It has done what it was asked for: a plugin that was told to ask again would have it done twice."""
    folder = write_plugin(shared_dir / "asks", ASKS, sandbox=STATE, permissions=["read:projects"], hooks=[])
    d.cli("plugin", "add", str(folder), "--yes")
    d.cli("plugin", "start", "asks")
    state = d.state_of("asks")
    with contextlib.ExitStack() as callers:
        others = [callers.enter_context(Client(d.root)) for _ in range(20)]
        platform = callers.enter_context(Client(d.root, timeout=seconds(60)))
        platform.call("api.register", method="projects.get", permission="read:projects")
        notifications = platform.notifications()
        (state / "ask1").touch()
        first = next(notifications)
        before = begin_exchange(d, PARTING)
        (state / "ask2").touch()
        wait_for((state / "asked2").exists)
        d.go()
        wait_for(lambda: exchanged(d, "host", before), what=d.log.read_text)
        second = next(notifications)
        assert [call["params"]["number"] for call in (first, second)] == [1, 2]
        before = begin_exchange(d, LOADED)
        d.go()
        wait_for(lambda: exchanged(d, "host", before), what=d.log.read_text)
        for call in (first, second):
            platform.call("api.answer", call=call["call"], result={"number": call["params"]["number"]})
        for number in (1, 2):
            wait_for((state / f"answer{number}").exists)
            answer = json.loads((state / f"answer{number}").read_text())
            assert answer == {"jsonrpc": "2.0", "id": number, "result": {"number": number}}
        assert all(one.call("status") for one in others)
    calls = [one["data"] for one in d.records() if one["type"] == "api.called" and one["plugin"] == "asks"]
    assert [call["verdict"] for call in calls if call["method"] == "projects.get"] == ["granted"] * 2
    d.cli("plugin", "remove", "asks", "--yes")


def test_refused_calls_that_are_not_on_record_yet_are_put_there(d: GatedDaemon, shared_dir: Path) -> None:
    folder = write_plugin(shared_dir / "floods", FLOODS, sandbox=STATE, hooks=[])
    d.cli("plugin", "add", str(folder), "--yes")
    d.cli("plugin", "start", "floods")
    refused = d.state_of("floods") / "refused"
    wait_for(lambda: refused.exists() and refused.read_text())
    before = begin_exchange(d, LOADED)
    d.go()
    wait_for(lambda: exchanged(d, "host", before))
    calls = [one["data"] for one in d.records() if one["type"] == "api.called" and one["plugin"] == "floods"]
    assert sum(call["count"] for call in calls if call["verdict"] == "limited") == int(refused.read_text()) > 0
    d.cli("plugin", "remove", "floods", "--yes")


def test_log_that_is_followed_goes_on_with_the_next_line(d: GatedDaemon, shared_dir: Path) -> None:
    d.cli("plugin", "add", str(write_plugin(shared_dir / "counts", COUNTS, hooks=[])), "--yes")
    d.cli("plugin", "start", "counts")
    with d.begin("plugin", "logs", "counts", "--follow", "-n", "0", "--json") as following:
        assert following.stdout is not None
        numbers = [int(json.loads(following.stdout.readline())["line"])]
        for _ in range(2):
            before = begin_exchange(d, LOADED)
            d.go()
            wait_for(lambda before=before: exchanged(d, "host", before), what=d.log.read_text)
            newest = d.json("plugin", "logs", "counts", "-n", "1")
            while numbers[-1] < int(newest["line"]):
                line = following.stdout.readline()
                assert line, "it ended"
                numbers.append(int(json.loads(line)["line"]))
        following.terminate()
    assert numbers == [*range(numbers[0], numbers[-1] + 1)]
    d.cli("plugin", "remove", "counts", "--yes")


def emit_failed(d: GatedDaemon) -> str:
    """Emit the event that only the plugins of one test at a time get; returns its id."""
    payload = {"project_id": EVENT["project_id"], "deployment_id": "d1", "error_code": "none"}
    return str(d.json("event", "emit", "deploy.failed", json.dumps(payload))["id"])


def delivered(d: GatedDaemon, event_id: str) -> dict[str, object]:
    """The delivery of an event, once it is final."""

    def final() -> dict[str, object] | None:
        (delivery,) = d.json("event", "show", event_id)["deliveries"]
        done = delivery["state"] in ("ok", "dead")
        return {key: delivery[key] for key in ("state", "status", "attempts")} if done else None

    return cast(dict[str, object], wait_for(final, what=d.log.read_text))


def test_stream_that_is_being_greeted_stays_connected(d: GatedDaemon, shared_dir: Path) -> None:
    folder = write_plugin(
        shared_dir / "hesitant", HESITANT_STREAM, sandbox=STATE, hooks=["deploy.failed"], transport={"mode": "stream"}
    )
    d.cli("plugin", "add", str(folder), "--yes")
    d.cli("plugin", "start", "hesitant")
    state = d.state_of("hesitant")
    before = begin_exchange(d, LOADED)
    emitted = emit_failed(d)
    wait_for((state / "greeted").exists)
    d.go()
    wait_for(lambda: exchanged(d, "host", before))
    (state / "answer").touch()
    assert delivered(d, emitted) == {"state": "ok", "status": "ok", "attempts": 1}
    assert (state / "greeted").read_text().split() == ["once"]
    d.cli("plugin", "remove", "hesitant", "--yes")


def test_server_that_has_not_answered_its_first_request_goes_on(d: GatedDaemon, shared_dir: Path) -> None:
    folder = write_plugin(
        shared_dir / "server", HESITANT_SERVER, sandbox=STATE, hooks=[], transport={"mode": "mcp"},
        restart={"start_timeout": "2m"},
    )  # fmt: skip
    d.cli("plugin", "add", str(folder), "--yes")
    approving = d.begin("mcp", "approve", "server", "--yes")
    state = d.state_of("server")
    wait_for((state / "greeted").exists)
    before, pid = d.service_pid(MODULES["host"]), d.json("plugin", "show", "server")["pid"]
    d.cli("reload")
    wait_for(lambda: exchanged(d, "host", before))
    (state / "answer").touch()
    assert approving.wait(seconds(60)) == 0, (approving.communicate(), d.log.read_text())
    approving.communicate()
    shown = d.json("plugin", "show", "server")
    assert (shown["pid"], shown["ready"]) == (pid, True)
    assert (state / "greeted").read_text().split() == ["once"]
    d.cli("plugin", "remove", "server", "--yes")


def test_result_of_a_program_that_is_started_meanwhile_is_read(d: GatedDaemon, shared_dir: Path) -> None:
    folder = write_plugin(
        shared_dir / "program", PROGRAM, sandbox=STATE, hooks=["deploy.failed"], transport={"mode": "exec"}
    )
    d.cli("plugin", "add", str(folder), "--yes")
    before = begin_exchange(d, LOADED)
    emitted = emit_failed(d)
    wait_for(lambda: [one for one in d.records() if one["type"] == "event.dispatched" and one["event_id"] == emitted])
    d.go()
    wait_for(lambda: exchanged(d, "host", before))
    assert delivered(d, emitted) == {"state": "ok", "status": "written", "attempts": 1}
    assert (d.state_of("program") / "runs").read_text().split() == ["once"]
    d.cli("plugin", "remove", "program", "--yes")


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
    d.cli("reload", "--no-wait")
    notes = d.notes
    first_rest = notes.index("at rest")
    assert {f"exchanged {name}" for name in MODULES} <= set(notes[:first_rest]), notes
    wait_for(lambda: [note for note in d.notes[first_rest:] if note == "exchanged host"])


def test_reload_ends_when_the_new_host_serves(d: GatedDaemon) -> None:
    before = d.service_pid(MODULES["host"])
    d.wait_at(LOADED)
    reloading = d.begin("reload")
    wait_for(lambda: LOADED in d.notes, what=d.log.read_text)
    with Client(d.root) as client:
        assert client.call("daemon.generation")["outdated"] == {"host": ""}
    assert reloading.poll() is None, "the host of before serves"
    d.go()
    out, errors = reloading.communicate(timeout=seconds(60))
    assert reloading.returncode == 0 and "reloaded: version" in out, (out, errors)
    assert d.json("status")["pid"] != before


def test_reload_that_is_not_to_wait_ends_before_the_host_is_exchanged(d: GatedDaemon) -> None:
    before = d.service_pid(MODULES["host"])
    d.wait_at(LOADED)
    d.cli("reload", "--no-wait")
    assert d.json("status")["pid"] == before
    wait_for(lambda: LOADED in d.notes, what=d.log.read_text)
    d.go()
    wait_for(lambda: exchanged(d, "host", before))
