"""Plugins with the mode ``http`` in a whole daemon: honest servers, and hostile ones beside a good neighbour."""

from __future__ import annotations

import base64
import hashlib
import hmac
import json
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from host.client.client import Client
from tests.examples.conftest import EXAMPLES
from tests.support.flask_libraries import bring_flask
from tests.system.daemon import Daemon, daemon, wait_for, write_plugin

SERVER = r"""#!/usr/bin/python3
# A server that does what the event's branch names, on its socket or its port; a thread for each connection.
import json, os, socket, threading, time

def head_of(connection):
    data = b""
    while b"\r\n\r\n" not in data:
        data += connection.recv(65536) or exit()
    head, _, body = data.partition(b"\r\n\r\n")
    first, *lines = head.decode().split("\r\n")
    headers = dict(line.split(": ", 1) for line in lines)
    while len(body) < int(headers.get("content-length", 0)):
        body += connection.recv(65536)
    return first, headers, body

def answer(connection, status, body=b"", *headers):
    lines = ["HTTP/1.1 %s" % status, "Content-Length: %d" % len(body), *headers]
    connection.sendall("\r\n".join(lines).encode() + b"\r\n\r\n" + body)

def serve(connection):
    first, headers, body = head_of(connection)
    with open(os.environ["PLUGIN_STATE_DIR"] + "/seen", "a") as seen:
        seen.write(json.dumps([first, headers, body.decode()]) + "\n")
    if first.startswith("GET /healthz"):
        return answer(connection, "200 OK")
    act, attempt = json.loads(body).get("branch", ""), int(headers["ce-attempt"])
    ok = b"HTTP/1.1 200 OK\r\nContent-Length: 15\r\n\r\n" + b'{"status":"ok"}'
    if act == "result":
        answer(connection, "201 Created", json.dumps({"status": "posted", "message": "sent"}).encode())
    elif act == "later":
        answer(connection, *(("503 Busy", b"", "Retry-After: 1") if attempt == 1 else ("204 No Content",)))
    elif act in ("409", "422", "500", "302", "410"):
        if act == "410" and os.path.exists(os.environ["PLUGIN_STATE_DIR"] + "/go-on"):
            act = "200"
        answer(connection, act + " X", b"", "Location: /elsewhere")
    elif act == "hold":
        while not os.path.exists(os.environ["PLUGIN_STATE_DIR"] + "/go-on"):
            time.sleep(0.02)
        answer(connection, "200 OK", b'{"status": "held"}')
    elif act == "smuggle":
        connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 4\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n"
                           b"HTTP/1.1 422 X\r\nContent-Length: 0\r\n\r\n")
    elif act == "two-lengths":
        connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\nContent-Length: 20\r\n\r\n{}")
    elif act == "endless-headers":
        connection.sendall(b"HTTP/1.1 200 OK\r\n")
        while True:
            connection.sendall(b"X-Again: and again\r\n" * 100)
    elif act == "slow-head":
        for byte in b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n":
            connection.sendall(bytes([byte]))
            time.sleep(0.3)
    elif act == "slow-body":
        connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\n")
        while True:
            connection.sendall(b" ")
            time.sleep(0.1)
    elif act == "too-short":
        connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\n{}")
    elif act == "too-long":
        connection.sendall(ok + b"x" * 10000000)
    elif act == "upgrade":
        connection.sendall(b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: upgrade\r\n\r\n")
        time.sleep(60)
    elif act == "continue":
        connection.sendall(b"HTTP/1.1 100 Continue\r\n\r\n" * 3 + ok)
    elif act == "continue-endlessly":
        while True:
            connection.sendall(b"HTTP/1.1 100 Continue\r\n\r\n" * 100)
    elif act == "body-endless":
        connection.sendall(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n")
        while True:
            connection.sendall(b"1000\r\n" + b"x" * 4096 + b"\r\n")
    elif act == "tiny-chunks":
        connection.sendall(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n")
        while True:
            connection.sendall(b"1\r\nx\r\n" * 1000)
    elif act == "chunk-size":
        connection.sendall(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n" + b"f" * 100000)
    elif act == "no-http":
        connection.sendall(b"220 mail.example ESMTP\r\n\r\n")
        time.sleep(60)
    elif act != "silent":
        connection.sendall(ok)

def live(connection):
    with connection:
        try:
            serve(connection)
        except OSError:
            pass

if "PLUGIN_PORT" in os.environ:
    listener = socket.create_server(("127.0.0.1", int(os.environ["PLUGIN_PORT"])), backlog=64)
else:
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(os.environ["PLUGIN_SOCKET"])
    listener.listen(64)
while True:
    threading.Thread(target=live, args=(listener.accept()[0],), daemon=True).start()
"""
SECRET = "whsec_" + base64.b64encode(b"0123456789abcdef01234567").decode()
MANIFEST: dict[str, Any] = {
    "transport": {"mode": "http"},
    "sandbox": {"filesystem": {"state": "8M"}},
    "delivery": {"timeout": "4s", "attempts": 2},
}
GOOD = {"delivery": {"timeout": "60s"}}
HOSTILE = {
    "smuggle": ("ok", ""),
    "two-lengths": ("dead", "no HTTP/1.1"),
    "endless-headers": ("dead", "no HTTP/1.1"),
    "slow-head": ("dead", "no answer in time"),
    "slow-body": ("dead", "no answer in time"),
    "too-short": ("dead", "in the middle of an answer"),
    "too-long": ("ok", ""),
    "upgrade": ("dead", "no HTTP/1.1"),
    "continue": ("ok", ""),
    "continue-endlessly": ("dead", "informational answers"),
    "body-endless": ("ok", ""),
    "tiny-chunks": ("ok", ""),
    "chunk-size": ("dead", "no HTTP/1.1"),
    "no-http": ("dead", "no HTTP/1.1"),
    "silent": ("dead", "without an answer"),
}
"""By act, how the event ends, and words of the reason."""


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Daemon]:
    """A daemon with a server that is made to do things, one on a port, and a good neighbour for the same events."""
    folder = tmp_path_factory.mktemp("http")
    signed = {"transport": {"mode": "http", "path": "/hooks?v=1", "secret": "signing_key"},
              "config_schema": {"signing_key": {"type": "string", "secret": True, "required": True}}}  # fmt: skip
    ported = {"hooks": ["deploy.failed"], "transport": {"mode": "http", "port": 8080},
              "health": {"ping": True, "interval": "0.3s"}}  # fmt: skip
    with daemon(host_toml='[events]\nsource = "https://platform.example/x"\n') as made:
        server = write_plugin(folder / "server", SERVER, **(MANIFEST | signed))
        made.cli("plugin", "add", str(server), "--yes", "--config", f"signing_key={SECRET}")
        made.cli("plugin", "add", str(write_plugin(folder / "ported", SERVER, **(MANIFEST | ported))), "--yes")
        patient = SERVER.replace('.get("branch", "")', '["url"].rpartition("/")[2]')
        made.cli("plugin", "add", str(write_plugin(folder / "good", patient, **(MANIFEST | GOOD))), "--yes")
        yield made


def seen(running: Daemon, plugin: str = "server") -> list[tuple[str, dict[str, str], str]]:
    return [json.loads(line) for line in running.noted(plugin)]


def emit(running: Daemon, act: str, project: str = "p1", *, of_good: str = "") -> str:
    """Emit an event that makes the server act, and the good one, which else answers at once."""
    url = f"https://app.example/{of_good}"
    payload = {"project_id": project, "deployment_id": act, "url": url, "duration_ms": 1, "branch": act}
    return str(running.json("event", "emit", "deploy.completed", json.dumps(payload))["id"])


def final(running: Daemon, event_id: str, plugin: str = "server") -> dict[str, Any]:
    """The delivery of an event when it is final."""

    def look() -> Any:
        (delivery,) = (one for one in running.json("event", "show", event_id)["deliveries"] if one["plugin"] == plugin)
        return delivery if delivery["state"] in ("ok", "dead", "quarantined") else None

    return wait_for(look, what=running.log.read_text)


def test_event_arrives_as_a_cloudevent_with_a_signature_that_verifies(running: Daemon) -> None:
    event_id = emit(running, "result", project='Löwe 100% "x"')
    done = final(running, event_id)
    assert (done["state"], done["status"], done["detail"]) == ("ok", "posted", "sent")
    first, headers, body = next(one for one in seen(running) if one[1]["ce-id"] == event_id)
    assert first == "POST /hooks?v=1 HTTP/1.1"
    assert json.loads(body)["deployment_id"] == "result" and "_meta" not in json.loads(body)
    assert headers["content-type"] == "application/json" and headers["ce-specversion"] == "1.0"
    assert (headers["ce-type"], headers["ce-source"]) == ("deploy.completed", "https://platform.example/x")
    assert headers["ce-subject"] == "L%C3%B6we%20100%25%20%22x%22"
    signed = f"{headers['webhook-id']}.{headers['webhook-timestamp']}.{body}".encode()
    key = base64.b64decode(SECRET.removeprefix("whsec_"))
    expected = base64.b64encode(hmac.new(key, signed, hashlib.sha256).digest()).decode()
    assert (headers["webhook-id"], headers["webhook-signature"]) == (event_id, f"v1,{expected}")
    assert abs(int(headers["webhook-timestamp"]) - time.time()) < 600
    final(running, event_id, "good")
    assert "webhook-id" not in next(one for one in seen(running, "good") if one[1]["ce-id"] == event_id)[1]


def test_trace_of_an_event_becomes_a_header_if_it_is_one(running: Daemon) -> None:
    real = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01"
    for trace in (real, "a\r\nx-more: y", "t\u00fc"):
        payload = {"project_id": trace, "deployment_id": "d", "url": "https://a/", "duration_ms": 1, "branch": "ok"}
        with Client(running.root) as client:
            event_id = client.call("event.emit", name="deploy.completed", payload=payload, trace=trace)["id"]
        assert final(running, event_id)["attempts"] == 1
        headers = next(headers for _, headers, _ in seen(running) if headers["ce-id"] == event_id)
        assert headers.get("traceparent") == (real if trace == real else None)
        assert "x-more" not in headers and "\n" not in headers["ce-traceparent"]


@pytest.mark.parametrize(
    ("act", "state", "status", "attempts"),
    [("later", "ok", "ok", 2), ("409", "ok", "duplicate", 1), ("422", "dead", "422", 1), ("302", "dead", "302", 1)],
)
def test_status_decides_about_the_event(running: Daemon, act: str, state: str, status: str, attempts: int) -> None:
    event_id = emit(running, act)
    done = final(running, event_id)
    assert (done["state"], done["status"], done["attempts"]) == (state, status, attempts)
    paths = [first for first, headers, _ in seen(running) if headers["ce-id"] == event_id]
    assert paths == ["POST /hooks?v=1 HTTP/1.1"] * attempts, "a redirect is never followed"


def test_hostile_answers_end_in_known_ways_and_harm_no_neighbour(running: Daemon) -> None:
    host = running.service_pid("host.service")

    def resident() -> int:
        return int(Path(f"/proc/{host}/statm").read_text().split()[1]) * 4096

    final(running, emit(running, "ok"))
    before = resident()
    events = {act: emit(running, act, project=act) for act in HOSTILE}
    for act, event_id in events.items():
        assert final(running, event_id, "good")["attempts"] == 1, act
    after = final(running, emit(running, "ok", project="after"))
    assert (after["state"], after["attempts"]) == ("ok", 1)
    for act, (state, words) in HOSTILE.items():
        done = final(running, events[act])
        assert done["state"] == state, (act, done)
        assert words in (done["detail"] or ""), (act, done)
    assert resident() - before < 32 << 20
    assert running.service_pid("host.service") == host


def test_port_of_its_own_loopback_serves_in_place_of_the_socket_and_is_asked_for_its_health(running: Daemon) -> None:
    payload = {"project_id": "p1", "deployment_id": "d1", "error_code": "E"}
    done = running.json("event", "emit", "deploy.failed", json.dumps(payload), "--wait")["deliveries"][0]
    assert (done["state"], done["attempts"]) == ("ok", 1)
    assert running.json("plugin", "show", "ported")["state"] == "running"
    wait_for(lambda: any(first.startswith("GET /healthz ") for first, _, _ in seen(running, "ported")))
    assert not [one for one in running.records() if one["type"] == "plugin.health" and one["plugin"] == "ported"]


def test_port_of_a_cage_is_reached_from_nowhere_else(running: Daemon) -> None:
    running.cli("plugin", "start", "ported")
    supervisor, sidecar = running.process, running.json("plugin", "show", "ported")["pid"]
    assert supervisor is not None and sidecar is not None
    reached = {}
    for of, pid in (("daemon", supervisor.pid), ("cage", sidecar)):
        connect = "import socket; socket.create_connection(('127.0.0.1', 8080), 5)"
        command = ["nsenter", "-t", str(pid), "-n", "/usr/bin/python3", "-c", connect]
        reached[of] = subprocess.run(command, capture_output=True, check=False).returncode == 0
    assert reached == {"daemon": False, "cage": True}


def test_idle_server_is_stopped_and_one_that_does_not_listen_is_given_up(running: Daemon, tmp_path: Path) -> None:
    idle = write_plugin(
        tmp_path / "idle", SERVER, **(MANIFEST | {"hooks": ["project.created"]}), activation={"idle": "1s"}
    )
    deaf = write_plugin(tmp_path / "deaf", "#!/bin/sh\nexec sleep 600\n", **(MANIFEST | {"hooks": ["project.created"]}),
                        restart={"start_timeout": "1s"})  # fmt: skip
    for folder in (idle, deaf):
        running.cli("plugin", "add", str(folder), "--yes")
    emitted = running.json("event", "emit", "project.created", '{"project_id": "p1", "name": "Shop"}')["id"]
    wait_for(
        lambda: (
            {one["plugin"]: one["state"] for one in running.json("event", "show", emitted)["deliveries"]}["idle"]
            == "ok"
        )
    )
    wait_for(lambda: running.json("plugin", "show", "idle")["state"] == "stopped")
    missing = "no socket in 1 s, nothing listens on PLUGIN_SOCKET or PLUGIN_PORT; raise start_timeout"
    wait_for(lambda: missing in (running.json("plugin", "show", "deaf")["error"] or ""))
    for name in ("idle", "deaf"):
        running.cli("plugin", "remove", name, "--yes")


def test_reload_and_an_exchange_of_the_host_lose_and_repeat_no_request(running: Daemon) -> None:
    held = [emit(running, "ok", project=f"held{number}", of_good="hold") for number in range(3)]
    wait_for(lambda: {one[1]["ce-id"] for one in seen(running, "good")} >= {*held})
    host = running.service_pid("host.service")
    running.cli("reload")
    wait_for(lambda: running.service_pid("host.service", missing_ok=True) not in (0, host))
    (running.state_of("good") / "go-on").touch()
    for event_id in held:
        done = final(running, event_id, "good")
        assert (done["state"], done["status"], done["attempts"]) == ("ok", "held", 1)


def test_answer_410_stops_the_plugin_and_its_event_stays_until_it_is_enabled(running: Daemon) -> None:
    event_id = emit(running, "410")
    wait_for(lambda: running.json("plugin", "show", "server")["state"] == "disabled", what=running.log.read_text)
    (delivery,) = (one for one in running.json("event", "show", event_id)["deliveries"] if one["plugin"] == "server")
    assert delivery["state"] not in ("ok", "dead", "quarantined")
    (running.state_of("server") / "go-on").touch()
    running.cli("plugin", "enable", "server")
    done = final(running, event_id)
    assert (done["state"], done["attempts"]) == ("ok", 1)


@pytest.mark.parametrize("language", ["python", "node"])
def test_a_new_plugin_of_the_mode_works_as_written(running: Daemon, tmp_path: Path, language: str) -> None:
    if shutil.which(language if language == "node" else "python3") is None:
        pytest.skip(f"{language} is not installed")
    folder = tmp_path / f"my-{language}"
    running.cli("new", str(folder), "--lang", language, "--mode", "http", "--hooks", "project.created")
    running.cli("plugin", "add", str(folder), "--yes")
    done = running.json("event", "emit", "project.created", '{"project_id": "p1", "name": "Shop"}', "--wait")
    assert [(one["state"], json.loads(one["reply"])) for one in done["deliveries"]] == [("ok", {"status": "ok"})]
    assert "project.created p1" in running.cli("plugin", "logs", folder.name).stdout
    running.cli("plugin", "remove", folder.name, "--yes")


def test_flask_app_runs_as_it_is(running: Daemon, tmp_path: Path) -> None:
    folder = tmp_path / "flask-notifier"
    shutil.copytree(EXAMPLES / "flask-notifier", folder)
    bring_flask(folder)
    running.cli("plugin", "add", str(folder), "--yes", "--config", f"signing_key={SECRET}")
    payload = {"project_id": "p1", "deployment_id": "flask", "error_code": "E"}
    event_id = running.json("event", "emit", "deploy.failed", json.dumps(payload), "--wait", code=None)["id"]
    done = final(running, event_id, "flask-notifier")
    assert (done["state"], done["status"], done["detail"]) == ("ok", "notified", "p1: deploy.failed")
    running.cli("event", "replay", event_id, "--plugin", "flask-notifier")
    wait_for(lambda: final(running, event_id, "flask-notifier")["status"] == "duplicate")
    running.cli("plugin", "remove", "flask-notifier", "--yes")


def test_settings_that_mean_nothing_are_refused(running: Daemon, tmp_path: Path) -> None:
    for number, (transport, words) in enumerate(
        [
            ({"mode": "http", "path": "events"}, "must be the path of a URL"),
            ({"mode": "http", "path": "/a b\r\nx: y"}, "transport.path"),
            ({"mode": "http", "port": 80}, "must be 1024 to 65000"),
            ({"mode": "stream", "port": 8080}, "unknown key"),
            ({"mode": "http", "secret": "key"}, "names no key of config_schema"),
        ]
    ):
        bad = write_plugin(tmp_path / f"bad{number}", SERVER, transport=transport, config_schema={})
        refused = running.cli("plugin", "add", str(bad), "--yes", code=2)
        assert words in refused.stderr, refused.stderr


@pytest.mark.wide
def test_prove_attacks_a_cage_like_the_plugins(running: Daemon) -> None:
    findings = running.json("prove", "ported")["findings"]
    assert len(findings) > 50 and not [one["name"] for one in findings if one["succeeded"]]
