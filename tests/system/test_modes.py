"""Promises that hold for sidecars of each mode: exec, HTTP and MCP get the same events from one daemon."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from typing import Any

import pytest

from tests.support.mcp_servers import server
from tests.system.daemon import Daemon, daemon, event, wait_for, write_plugin

ACT = """
import json, os, socket, time
def act(payload):
    state = os.environ["PLUGIN_STATE_DIR"]
    with open(state + "/seen", "a") as seen:
        seen.write(payload["deployment_id"] + "\\n")
    does = payload["url"].partition("//")[2]
    while does == "hold" and not os.path.exists(state + "/go-on"):
        time.sleep(0.02)
    if does == "connect":
        with socket.socket() as sock:
            sock.connect_ex(("192.0.2.1", 443))
"""
EXEC = f"#!/usr/bin/python3\n{ACT}\nimport sys\nact(json.load(sys.stdin))\n"
HTTP = f"""#!/usr/bin/python3
{ACT}
import http.server, socketserver
class Handler(http.server.BaseHTTPRequestHandler):
    def do_POST(self):
        act(json.loads(self.rfile.read(int(self.headers["content-length"]))))
        self.send_response(204)
        self.end_headers()
class Server(socketserver.ThreadingMixIn, http.server.HTTPServer):
    daemon_threads = True
Server(("127.0.0.1", int(os.environ["PLUGIN_PORT"])), Handler).serve_forever()
"""
MCP = server(f"""{ACT}
def call(id, name, arguments, meta):
    def live():
        act(arguments)
        send(id=id, result=text("done"))
    threading.Thread(target=live, daemon=True).start()
""")
CALL = {"tool": "act", "arguments": {"deployment_id": "{{ deployment_id }}", "url": "{{ url }}"}}
PLUGINS: dict[str, tuple[str, dict[str, Any]]] = {
    "exec": (EXEC, {"transport": {"mode": "exec"}, "delivery": {"concurrency": 4, "timeout": "60s"}}),
    "http": (HTTP, {"transport": {"mode": "http", "port": 8080}, "delivery": {"timeout": "60s"}}),
    "mcp": (MCP, {"transport": {"mode": "mcp", "calls": {"deploy.completed": CALL}}, "delivery": {"timeout": "60s"}}),
}


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Daemon]:
    folder = tmp_path_factory.mktemp("modes")
    with daemon() as made:
        for mode, (script, manifest) in PLUGINS.items():
            sandbox = {"filesystem": {"state": "8M"}, "network": {"egress": []}}
            made.cli("plugin", "add", str(write_plugin(folder / mode, script, sandbox=sandbox, **manifest)), "--yes")
        yield made


def emit(running: Daemon, does: str, number: str, project: str) -> str:
    payload = event(number, url=f"https://{does}", project_id=project)
    return str(running.json("event", "emit", "deploy.completed", payload)["id"])


def delivered(running: Daemon, event_id: str, mode: str) -> dict[str, Any]:
    """The delivery of an event to the sidecar of a mode, once it is final."""

    def final() -> Any:
        (one,) = (one for one in running.json("event", "show", event_id)["deliveries"] if one["plugin"] == mode)
        return one if one["state"] in ("ok", "dead", "quarantined") else None

    return dict(wait_for(final, what=running.log.read_text))


@pytest.fixture
def held(running: Daemon) -> Iterator[Daemon]:
    """The daemon while nothing lets held events go; all of them are let go in the end."""
    for mode in PLUGINS:
        (running.state_of(mode) / "go-on").unlink(missing_ok=True)
    yield running
    let_go(running)


def let_go(running: Daemon) -> None:
    for mode in PLUGINS:
        (running.state_of(mode) / "go-on").touch()


def hold(running: Daemon, number: str, project: str) -> str:
    """Emit an event with which every sidecar waits; returns once each of them has it."""
    emitted = emit(running, "hold", number, project)
    for mode in PLUGINS:
        wait_for(lambda: f"d{number}" in running.noted(mode), what=running.log.read_text)  # noqa: B023
    return emitted


def test_connection_of_a_sidecar_is_on_record_with_its_event(running: Daemon) -> None:
    emitted = emit(running, "connect", "c", "connects")
    for mode in PLUGINS:
        assert delivered(running, emitted, mode)["state"] == "ok"

    def denied() -> bool:
        found = [one for one in running.records() if one["type"] == "net.denied" and one["event_id"] == emitted]
        return {one["plugin"] for one in found} == {*PLUGINS}

    wait_for(denied, what="a refused connection is not on record")


def test_events_of_one_key_come_in_order_and_those_of_others_pass_them(held: Daemon) -> None:
    first = hold(held, "o1", "one")
    second, other = emit(held, "go", "o2", "one"), emit(held, "go", "o3", "another")
    for mode in PLUGINS:
        assert delivered(held, other, mode)["attempts"] == 1
        assert "do2" not in held.noted(mode), mode
    let_go(held)
    for mode in PLUGINS:
        assert {delivered(held, one, mode)["state"] for one in (first, second)} == {"ok"}
        assert [one for one in held.noted(mode) if one in ("do1", "do2", "do3")] == ["do1", "do3", "do2"]


def test_attempt_is_counted_before_it_is_sent_and_repeated_after_a_crash_of_the_host(held: Daemon) -> None:
    emitted = hold(held, "k", "killed")
    os.kill(held.service_pid("host.service"), signal.SIGKILL)
    for mode in PLUGINS:
        wait_for(lambda: held.noted(mode).count("dk") == 2, what=held.log.read_text)  # noqa: B023
    let_go(held)
    for mode in PLUGINS:
        done = delivered(held, emitted, mode)
        assert (done["state"], done["attempts"]) == ("ok", 2), mode


def test_stop_waits_for_what_was_sent(held: Daemon) -> None:
    emitted = hold(held, "s", "stopped")
    stopping = [held.begin("plugin", "disable", mode) for mode in PLUGINS]
    let_go(held)
    for one in stopping:
        assert one.wait(60) == 0, one.communicate()
        one.communicate()
    for mode in PLUGINS:
        done = delivered(held, emitted, mode)
        assert (done["state"], done["attempts"]) == ("ok", 1), mode
        held.cli("plugin", "enable", mode)
