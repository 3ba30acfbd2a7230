"""``isolator plugin test`` of users without privilege, through the daemon."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from tests.authoring.dev_process import answering
from tests.runners.conftest import ALICE, STRANGER
from tests.support.new_plugins import new_plugin
from tests.support.timeouts import seconds
from tests.system.daemon import write_plugin
from tests.system.taken_over import TakenOver

EXEC = '#!/bin/sh\nread event\necho "got $PLUGIN_EVENT_TYPE" >&2\necho "{\\"message\\": \\"$GREETING\\"}"\nexit CODE\n'
ON_A_PORT = """\
    #!/usr/bin/python3
    import http.server, json, os, time
    class Handler(http.server.BaseHTTPRequestHandler):
        def do_POST(self):
            length = int(self.headers["content-length"])
            project = json.loads(self.rfile.read(length))["project_id"]
            about = [self.headers[name] for name in ("ce-type", "ce-subject", "webhook-signature")]
            body = json.dumps({"message": " ".join([*about[:2], project]), "signed": about[2][:3]}).encode()
            self.send_response(200 if self.path == "/hook" else 404)
            self.send_header("content-length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)
    time.sleep(0.2)
    http.server.ThreadingHTTPServer(("127.0.0.1", int(os.environ["PLUGIN_PORT"])), Handler).serve_forever()
"""
"""A server that begins to listen on a port of its own after a moment."""
SIGNED = {
    "transport": {"mode": "http", "path": "/hook", "port": 8080, "secret": "key"},
    "config_schema": {"key": {"type": "string", "secret": True}},
}
WORK = """__import__("json").dumps([
    __import__("os").getuid(), __import__("os").environ["GREETING"],
    __import__("os").path.exists("/etc/shadow"), __import__("os").listdir(__import__("os").environ["PLUGIN_STATE_DIR"]),
])"""


def trial(d: TakenOver, uid: int, *words: str, code: int = 0, scratch: Path | None = None) -> Any:
    """``isolator plugin test`` as a user; its JSON, or the error's."""
    program = shutil.which("isolator")
    assert program is not None
    ran = subprocess.run(
        ["setpriv", f"--reuid={uid}", f"--regid={uid}", "--clear-groups", "--", program, "--root", str(d.root),
         "plugin", "test", *words, "--json"],
        capture_output=True, text=True, check=False, cwd="/", timeout=seconds(90), stdin=subprocess.DEVNULL,
        env={**os.environ, "TMPDIR": str(scratch or "/tmp")},
    )  # fmt: skip
    assert ran.returncode == code, (ran.stdout, ran.stderr)
    return json.loads(ran.stdout or ran.stderr)


def owned(folder: Path) -> Path:
    """A new folder of Alice's."""
    folder.mkdir()
    os.chown(folder, ALICE, ALICE)
    return folder


def write(home: Path, script: str, **manifest: Any) -> str:
    """A plugin of Alice's that only she may read."""
    network = {"network": {"egress": []}, "resources": {"memory": "64M"}}
    schema = {"greeting": {"type": "string", "required": True}}
    folder = write_plugin(home / "plugin", script, **{"sandbox": network, "config_schema": schema} | manifest)
    for path in (folder, *folder.iterdir()):
        os.chown(path, ALICE, ALICE)
        path.chmod(path.stat().st_mode & 0o700)
    return str(folder)


def test_runner_tries_a_plugin_in_a_cage_without_being_root(daemon: TakenOver, home: Path) -> None:
    folder = write(home, answering(" ".join(WORK.split())))
    scratch = owned(home / "scratch")
    found = trial(daemon, ALICE, folder, "--config", "greeting=hello", scratch=scratch)
    (answer,) = found["events"]
    uid, greeting, shadow, state = json.loads(json.loads(answer["reply"])["result"]["message"])
    assert (answer["outcome"], greeting, shadow, state) == ("ok", "hello", False, [])
    assert uid != ALICE and [line["line"] for line in found["log"]] == ["version 1"]
    assert not list(scratch.iterdir())


@pytest.mark.parametrize(
    ("code", "outcome"),
    [(0, "ok"), *(pytest.param(*one, marks=pytest.mark.wide) for one in ((75, "retry"), (3, "failed")))],
)
def test_runner_tries_a_plugin_that_runs_for_each_event(daemon: TakenOver, home: Path, code: int, outcome: str) -> None:
    folder = write(home, EXEC.replace("CODE", str(code)), transport={"mode": "exec"})
    found = trial(daemon, ALICE, folder, "--config", "greeting=hello", code=0 if outcome == "ok" else 1)
    (answer,) = found["events"]
    assert answer["outcome"] == outcome and "hello" in answer["detail"]
    assert "got deploy.completed" in [line["line"] for line in found["log"]]


@pytest.mark.parametrize("mode", ["stream", "http", "mcp"])
def test_runner_tries_a_new_plugin_of_a_mode_with_a_conversation(daemon: TakenOver, home: Path, mode: str) -> None:
    folder = new_plugin(home / f"new-{mode}", mode, "python")
    found = trial(daemon, ALICE, str(folder), "--event", "deploy.completed", scratch=owned(home / "scratch"))
    (answer,) = found["events"]
    assert (found["mode"], answer["outcome"], answer["latency_us"] > 0) == (mode, "ok", True), found
    assert any("project-1" in line["line"] for line in found["log"]), found
    assert not list((home / "scratch").iterdir())


def test_runner_tries_a_server_on_a_port_of_its_own(daemon: TakenOver, home: Path) -> None:
    folder = write(home, ON_A_PORT, hooks=["deploy.completed", "deploy.failed"], **SIGNED)
    found = trial(daemon, ALICE, folder, "--config", "key=secret")
    replies = [json.loads(answer["reply"]) for answer in found["events"]]
    hooks = ["deploy.completed", "deploy.failed"]
    assert replies == [{"message": f"{hook} project-1 project-1", "signed": "v1,"} for hook in hooks], found


@pytest.mark.parametrize("mode", ["stream", "http", "mcp"])
def test_sidecar_that_ends_is_told_of_as_such(daemon: TakenOver, home: Path, mode: str) -> None:
    calls = {"calls": {"deploy.completed": {"tool": "notify", "arguments": {}}}} if mode == "mcp" else {}
    folder = write(home, "#!/bin/sh\necho bad luck >&2\nexit 3\n", transport={"mode": mode, **calls}, config_schema={})
    found = trial(daemon, ALICE, folder, code=1)
    (answer,) = found["events"]
    assert answer["outcome"] == "unknown" and "ended" in answer["detail"], found
    assert "bad luck" in [line["line"] for line in found["log"]], found


def test_runner_takes_config_as_the_daemon_does(daemon: TakenOver, home: Path) -> None:
    folder = write(home, answering())
    (answer,) = trial(daemon, ALICE, folder, "--config", "GREETING=hello")["events"]
    assert answer["outcome"] == "ok", answer
    refused = trial(daemon, ALICE, folder, "--config", "greting=hello", code=3)["error"]
    assert 'did you mean "greeting"' in refused["remedy"], refused


def test_plugin_that_asks_for_more_than_a_runner_has_is_refused_with_the_reason(daemon: TakenOver, home: Path) -> None:
    egress = {"network": {"egress": [{"host": "other.example", "ports": [443]}]}}
    folder = write(home, answering(), sandbox=egress, config_schema={})
    (answer,) = trial(daemon, ALICE, folder, code=1)["events"]
    assert answer["outcome"] == "unknown" and "over the ceiling" in answer["detail"], answer


def test_user_without_the_role_is_refused(daemon: TakenOver, home: Path) -> None:
    home.chmod(0o755)
    found = trial(daemon, STRANGER, "/usr", code=4)
    assert "needs root" in found["error"]["why"] and "sudo isolator plugin test" in found["error"]["remedy"]


@pytest.mark.parametrize(
    ("words", "manifest", "expected"),
    [
        (["--recording", "x"], {}, "is root's alone"),
        ([], {}, "needs the config greeting"),
        ([], SIGNED, "signs requests, and is not set"),
    ],
)
def test_what_a_runner_cannot_have_is_refused_with_what_to_do(
    daemon: TakenOver, home: Path, words: list[str], manifest: dict[str, Any], expected: str
) -> None:
    found = trial(daemon, ALICE, write(home, answering(), **manifest), *words, code=2)
    assert expected in found["error"]["why"] and found["error"]["remedy"]
