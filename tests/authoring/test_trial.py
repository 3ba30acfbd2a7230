"""``isolator plugin test``: a plugin in its cage without a daemon, what it is shown to do, and nothing left."""

from __future__ import annotations

import contextlib
import json
import os
import pwd
import re
import select
import shutil
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from host.authoring.languages import TESTS
from isolator.cli.private_root import BASE
from isolator.paths import Paths
from tests.docs.blocks import ROOT
from tests.support.new_plugins import KINDS, build, environment, need, new_plugin
from tests.support.timeouts import seconds
from tests.system.daemon import alive, wait_for, write_plugin

CURIOUS = """\
    #!/usr/bin/python3
    import json, os, socket, sys
    try:
        socket.create_connection(("api.example.com", 443), 5)
    except OSError as error:
        print("\\x1b[2Jno way:", type(error).__name__, flush=True)
    server = socket.socket(socket.AF_UNIX)
    server.bind(os.environ["PLUGIN_SOCKET"])
    server.listen(1)
    while True:
        connection, _ = server.accept()
        request = json.loads(connection.recv(4096))
        done = request["method"] == "deploy.completed"
        result = {"status": "ok" if done else "rejected", "message": os.environ["GREETING"] + "\\x1b[2J"}
        connection.sendall(json.dumps({"jsonrpc": "2.0", "id": request["id"], "result": result}).encode() + b"\\n")
        connection.close()
"""
MODES = {
    "stream": """\
        #!/usr/bin/python3
        import json, os, socket
        server = socket.socket(socket.AF_UNIX)
        server.bind(os.environ["PLUGIN_SOCKET"])
        server.listen(1)
        while True:
            connection, _ = server.accept()
            for line in connection.makefile():
                request = json.loads(line)
                hello = request["method"] == "host.hello"
                greeting = {"protocol": "1", "handles": ["deploy.completed"], "capabilities": []}
                result = greeting if hello else {"status": "ok"}
                if "id" in request:
                    reply = {"jsonrpc": "2.0", "id": request["id"], "result": result}
                    connection.sendall(json.dumps(reply).encode() + b"\\n")
        """,
    "exec": '#!/bin/sh\ncat >/dev/null\necho \'{"status": "ok"}\'\n',
}


def command(*words: str) -> list[str]:
    """``isolator plugin test`` in a network namespace of its own."""
    return ["unshare", "-n", "isolator", "plugin", "test", *words]


def trial(*words: str, code: int = 0) -> dict[str, Any]:
    """Run one; the JSON that it prints."""
    ran = subprocess.run(
        command(*words, "--json"), capture_output=True, text=True, check=False, timeout=seconds(120),
        stdin=subprocess.DEVNULL,
    )  # fmt: skip
    assert ran.returncode == code, (ran.stdout, ran.stderr)
    found: dict[str, Any] = json.loads(ran.stdout)
    return found


@pytest.fixture(autouse=True)
def _nothing_left() -> Iterator[None]:
    """Tests of this folder may run beside each other: what was there is not this test's."""
    roots = set(BASE.iterdir()) if BASE.exists() else set()
    yield
    left = (set(BASE.iterdir()) if BASE.exists() else set()) - roots
    assert not [root for root in left if not _is_locked(root)]


def _is_locked(root: Path) -> bool:
    return subprocess.run(["flock", "-n", root / "lock", "true"], check=False).returncode != 0


def test_events_log_and_denials_of_a_plugin_are_shown(tmp_path: Path) -> None:
    folder = write_plugin(
        tmp_path / "most-curious", CURIOUS, hooks=["deploy.completed", "deploy.failed"],
        config_schema={"greeting": "string"}, sandbox={"network": {"egress": []}},
    )  # fmt: skip
    junit = tmp_path / "report.xml"
    found = trial(str(folder), "--config", "greeting=hello", "--junit", str(junit), code=1)
    assert (found["plugin"], found["mode"], found["ok"]) == ("most-curious", "oneshot", False)
    first, second = found["events"]
    assert (first["event"], first["outcome"], first["ok"]) == ("deploy.completed", "ok", True)
    assert first["payload"]["url"] == "https://shop.example" and first["latency_us"] > 0
    assert (second["event"], second["outcome"], second["ok"]) == ("deploy.failed", "rejected", False)
    assert [line["line"] for line in found["log"]] == ["\x1b[2Jno way: gaierror"]
    (denial,) = [one for one in found["denials"] if one["data"].get("name") == "api.example.com"]
    assert denial["grant"]["line"], denial
    suite = ElementTree.parse(junit).getroot().find("testsuite")
    assert suite is not None and suite.get("failures") == "1"
    assert not [entry.pw_name for entry in pwd.getpwall() if entry.pw_name.startswith("plugin-most-curious")]
    assert [(case.get("name"), case.find("failure") is not None) for case in suite.iter("testcase")] == [
        ("deploy.completed", False), ("deploy.failed", True),
    ]  # fmt: skip


@pytest.mark.wide
def test_trial_for_people_has_the_reply_the_line_to_add_and_nothing_that_steers_a_terminal(tmp_path: Path) -> None:
    folder = write_plugin(
        tmp_path / "curious", CURIOUS, config_schema={"greeting": "string"}, sandbox={"network": {"egress": []}}
    )  # fmt: skip
    words = [str(folder), "--config", "greeting=hello", "--event", "deploy.completed"]
    ran = subprocess.run(command(*words), capture_output=True, text=True, check=True, stdin=subprocess.DEVNULL)
    assert "curious 1.0.0 (oneshot)" in ran.stdout and "hello" in ran.stdout
    assert "lookup of api.example.com" in ran.stdout and "to allow it" in ran.stdout
    assert "\x1b" not in ran.stdout + ran.stderr


@pytest.mark.parametrize("mode", [pytest.param(mode, marks=pytest.mark.wide) for mode in MODES])
def test_mode_of_a_plugin_is_tried_as_it_runs(tmp_path: Path, mode: str) -> None:
    folder = write_plugin(tmp_path / "plugin", MODES[mode], transport={"mode": mode})
    (answer,) = trial(str(folder))["events"]
    assert (answer["outcome"], answer["ok"]) == ("ok", True)


@pytest.mark.parametrize(
    ("mode", "language"),
    [pytest.param(*kind, marks=[] if kind == ("stream", "python") else pytest.mark.wide) for kind in KINDS],
)
def test_new_plugin_of_every_kind_passes_its_own_tests_and_its_trial(tmp_path: Path, mode: str, language: str) -> None:
    folder = new_plugin(tmp_path / f"new-{language}", mode, language)
    texts = {str(path.relative_to(folder)): path.read_text() for path in folder.rglob("*") if path.is_file()}
    assert not re.search(r"\{\{[a-z_]+\}\}", "".join(texts.values()))
    assert json.loads(texts["plugin.json"])["$schema"].removeprefix("./") in texts
    assert "Zero Clause" in texts["LICENSE"] and f"{TESTS[language]}\n" in texts[".github/workflows/test.yml"]
    build(folder)
    subprocess.run(TESTS[language].split(), cwd=folder, check=True, env=environment(tmp_path), capture_output=True)
    found = trial(str(folder))
    assert (found["mode"], [answer["outcome"] for answer in found["events"]]) == (mode, ["ok"]), found
    assert any("deploy.completed" in line["line"] or "project-1" in line["line"] for line in found["log"])


@pytest.mark.parametrize(
    "example",
    ["exec-lint", "python-stream-counter", "sh-deploy-log", pytest.param("rust-deploy-stats", marks=pytest.mark.wide)],
)
def test_example_that_needs_no_network_passes_its_trial(tmp_path: Path, example: str) -> None:
    """The others: tests/clients/test_pytest_isolator.py, and tests/authoring/test_certify.py, where nothing answers."""
    if example.startswith("rust"):
        need("rust")
    folder = tmp_path / example
    shutil.copytree(ROOT / "examples" / example, folder)
    build(folder)
    found = trial(str(folder), code=0)
    hooks = json.loads((folder / "plugin.json").read_text())["hooks"]
    assert found["ok"] and len(found["events"]) == len(hooks)


@pytest.mark.wide
def test_policy_withholds_and_a_payload_of_ones_own_is_sent(tmp_path: Path) -> None:
    """What the manifest asks for and the policy does not grant is not there; an event of a platform has its schema."""
    folder = write_plugin(tmp_path / "plugin", MODES["exec"], transport={"mode": "exec"}, hooks=["backup.failed"])
    policy, schema = tmp_path / "any.toml", tmp_path / "schema.json"
    schema.write_text(json.dumps({"type": "object", "properties": {"volume": {"type": "string"}}}))
    policy.write_text('[grant]\nhooks = ["deploy.*"]\n')
    known = ["--schema", f"backup.failed={schema}", "--event", "backup.failed", "--payload", '{"volume": "v1"}']
    found = trial(str(folder), *known)
    assert found["events"][0]["payload"] == {"volume": "v1"} and found["ok"]
    found = trial(str(folder), *known, "--policy", str(policy), code=1)
    assert found["events"][0]["outcome"] == "withheld"


@pytest.mark.wide
def test_plugin_that_does_not_come_up_is_a_failure_with_its_last_words(tmp_path: Path) -> None:
    folder = write_plugin(tmp_path / "plugin", "#!/bin/sh\necho bad luck >&2\nexit 3\n", hooks=["deploy.completed"])
    (answer,) = trial(str(folder), code=1)["events"]
    assert answer["outcome"] in ("not started", "unknown") and "3" in answer["detail"], answer


@pytest.mark.parametrize(
    ("change", "expected"),
    [({"config_schema": {"token": {"required": True}}}, "--config token=VALUE"),
     pytest.param({"hooks": ["deploy.complete"]}, "did you mean", marks=pytest.mark.wide),
     pytest.param({"binary": "./none"}, "no such file", marks=pytest.mark.wide)],
)  # fmt: skip
def test_fault_of_a_plugin_is_one_line(tmp_path: Path, change: dict[str, Any], expected: str) -> None:
    folder = write_plugin(tmp_path / "plugin", **change)
    ran = subprocess.run(command(str(folder)), capture_output=True, text=True, check=False, stdin=subprocess.DEVNULL)
    assert ran.returncode == 2 and expected in ran.stderr, ran.stderr
    assert ran.stderr.count("\n") == 1


def test_user_without_privilege_is_told_what_is_missing(tmp_path: Path) -> None:
    tmp_path.chmod(0o755)
    words = ["setpriv", "--reuid=65534", "--clear-groups", "isolator", "plugin", "test", "/usr"]
    ran = subprocess.run(words, capture_output=True, text=True, check=False, stdin=subprocess.DEVNULL)
    assert ran.returncode == 4 and "sudo isolator plugin test" in ran.stderr and "runner" in ran.stderr


def test_watched_plugin_is_tried_again_after_a_change_until_it_is_ended(tmp_path: Path) -> None:
    folder = write_plugin(tmp_path / "plugin", MODES["exec"], transport={"mode": "exec"})
    with subprocess.Popen(
        command(str(folder), "--watch"), stdout=subprocess.PIPE, stderr=subprocess.PIPE, stdin=subprocess.DEVNULL
    ) as process:
        try:
            assert b" ok " in _until(process, b"waiting for a change")
            (folder / "main").write_text("#!/bin/sh\nexit 65\n")
            assert b" rejected " in _until(process, b"waiting for a change")
            (folder / "plugin.json").write_text("{")
            assert b"plugin.json:1" in _until(process, b"waiting for a change")
        finally:
            process.send_signal(signal.SIGTERM)
            code = process.wait(seconds(60))
    assert code == 128 + signal.SIGTERM


def _until(process: subprocess.Popen[bytes], words: bytes) -> bytes:
    """What a process writes to both its outputs, until it has written these words to its error output."""
    assert process.stdout is not None and process.stderr is not None
    text = {process.stdout.fileno(): b"", process.stderr.fileno(): b""}
    while words not in text[process.stderr.fileno()]:
        ready = select.select(list(text), [], [], seconds(60))[0]
        assert ready, text
        for fd in ready:
            text[fd] += os.read(fd, 65536)
    return b"".join(text.values())


def test_killed_trial_leaves_nothing_that_gc_does_not_remove(tmp_path: Path) -> None:
    folder = write_plugin(tmp_path / "plugin", "#!/bin/sh\nexec sleep 1000\n")
    process = subprocess.Popen(command(str(folder)), stdin=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        root: Path = wait_for(lambda: _root_of(process.pid))
        daemon: int = wait_for(lambda: _daemon_of(root))
        made = wait_for(lambda: {name for name in _users_of(root) if name.startswith("plugin-plugin-")})
    finally:
        process.kill()
        process.wait()
    wait_for(lambda: not alive(daemon), seconds(60))
    assert made <= _users_of(root)
    removed = json.loads(subprocess.run(["isolator", "gc", "--json"], check=True, capture_output=True).stdout)
    assert str(root) in [left["name"] for left in removed if left["kind"] == "private root"]
    assert not root.exists() and not _users_of(root)


def _root_of(pid: int) -> Path | None:
    """The private root whose lock a process holds."""
    held = {os.path.realpath(fd) for fd in Path(f"/proc/{pid}/fd").iterdir()}
    return next((root for root in (BASE.iterdir() if BASE.exists() else ()) if str(root / "lock") in held), None)


def _daemon_of(root: Path) -> int:
    words = b"\0".join([b"--root", os.fsencode(root), b"serve"])
    for entry in Path("/proc").iterdir():
        with contextlib.suppress(OSError):
            if entry.name.isdigit() and words in (entry / "cmdline").read_bytes():
                return int(entry.name)
    return 0


def _users_of(root: Path) -> set[str]:
    return {entry.pw_name for entry in pwd.getpwall() if entry.pw_name.endswith(Paths.of(root).instance)}
