"""The fixtures of pytest-isolator, as an author's own tests use them: in a pytest of their own, in real cages."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from tests.docs.blocks import blocks
from tests.docs.scene import write_plugin_of
from tests.support.timeouts import seconds
from tests.system.daemon import write_plugin

ROOT = Path(__file__).parents[2]
CLIENTS = ROOT / "clients"
PLUGIN = """\
    #!/usr/bin/python3
    import json, os, socket, urllib.error, urllib.request
    def ask(method):
        with socket.socket(socket.AF_UNIX) as api:
            api.connect(os.environ["PLUGIN_HOST_SOCKET"])
            asked = {"jsonrpc": "2.0", "id": 1, "method": method, "params": {"id": "p1"}}
            api.sendall(json.dumps(asked).encode() + b"\\n")
            return json.loads(api.makefile().readline())
    def ring(text):
        try:
            body = json.dumps({"text": text}).encode()
            return urllib.request.urlopen(os.environ["HOOK"], body, timeout=10).read().decode()
        except urllib.error.HTTPError as error:
            return str(error.code)
    server = socket.socket(socket.AF_UNIX)
    server.bind(os.environ["PLUGIN_SOCKET"])
    server.listen(1)
    while True:
        connection, _ = server.accept()
        request = json.loads(connection.recv(4096))
        project = ask("projects.get")
        print("project", project.get("result"), flush=True)
        try:
            socket.getaddrinfo("other.example.com", 443)
        except OSError:
            pass
        result = {"status": "ok", "project": project, "answer": ring(request["params"]["project_id"])}
        connection.sendall(json.dumps({"jsonrpc": "2.0", "id": request["id"], "result": result}).encode() + b"\\n")
        connection.close()
"""
MANIFEST = {
    "config_schema": {"hook": {"type": "string", "required": True, "secret": True}},
    "permissions": ["read:projects"],
    "sandbox": {"network": {"egress": [{"host": "hooks.example.com", "ports": [443]}]}},
}
TESTS = """\
    import pytest

    HOOK = "https://hooks.example.com/T0/B0"

    def test_everything(sidecar, pretend_internet, host_api):
        pretend_internet.answer("POST", HOOK, json={"ok": True})
        host_api.serve("projects.get", "read:projects", lambda params: {"name": "shop of " + params["id"]})
        bell = sidecar("bell", config={"hook": HOOK})
        reply = bell.send("deploy.completed")
        assert reply.ok and reply.result["answer"] == '{"ok": true}'
        assert reply.result["project"]["result"] == {"name": "shop of p1"}
        assert host_api.calls == [("projects.get", {"id": "p1"})]
        (sent,) = pretend_internet.requests
        assert (sent.method, sent.status, sent.body) == ("POST", 200, '{"text": "project-1"}')
        assert "B0" not in sent.url
        assert bell.send("deploy.completed").ok  # what comes in between is there by now
        assert any("shop of p1" in line for line in bell.log)
        assert [denial["data"]["name"] for denial in bell.denials] == ["other.example.com"]
        assert any("throw-away authority" in note for note in bell.notes)
        with pytest.raises(ValueError, match="no.such"):
            bell.send("no.such")

    def test_policy_of_production_counts(sidecar, pretend_internet):
        pretend_internet.answer("POST", HOOK, text="rung")
        bell = sidecar("bell", config={"hook": HOOK}, policy="prod.toml")
        assert not bell.send("deploy.completed").ok
"""


SIMPLE = 'def test_it(sidecar):\n    sidecar("bell", config={"hook": "x"})\n'
ALONE = ("unshare", "-n", "sh", "-c", 'ip link set lo up && exec "$@"', "sh")
"""In a network namespace of their own."""


def run_tests(folder: Path, text: str = "", enter: tuple[str, ...] = ALONE) -> subprocess.CompletedProcess[str]:
    """The tests of an author; without a text those that are there."""
    if text:
        (folder / "test_bell.py").write_text(textwrap.dedent(text))
    paths = [str(CLIENTS / "pytest"), str(CLIENTS / "python")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "PYTEST_ADDOPTS": ""}
    words = [sys.executable, "-m", "pytest", "-p", "pytest_isolator.plugin", "-p", "no:cacheprovider", "-qx", "."]
    return subprocess.run(
        [*enter, *words], cwd=folder, capture_output=True, text=True, check=False, env=environment,
        timeout=seconds(240), stdin=subprocess.DEVNULL,
    )  # fmt: skip


def test_fixtures_test_a_plugin_in_its_cage_with_pretend_answers(tmp_path: Path) -> None:
    write_plugin(tmp_path / "bell", PLUGIN, **MANIFEST)
    (tmp_path / "prod.toml").write_text('[grant]\nhooks = ["project.*"]\n')
    ran = run_tests(tmp_path, TESTS)
    assert ran.returncode == 0 and "2 passed" in ran.stdout, ran.stdout + ran.stderr


@pytest.mark.parametrize("page", ["docs/plugins.md", "clients/pytest/README.md"])
def test_test_that_a_page_shows_passes_with_the_plugin_of_the_guide(tmp_path: Path, page: str) -> None:
    write_plugin_of("docs/plugins.md", tmp_path / "deploy-bell")
    (shown,) = [block.body for block in blocks(ROOT / page) if "def test_bell_rings" in block.body]
    ran = run_tests(tmp_path, shown)
    assert ran.returncode == 0 and "1 passed" in ran.stdout, ran.stdout + ran.stderr


def test_example_passes_the_tests_that_it_comes_with(tmp_path: Path) -> None:
    folder = tmp_path / "slack-deploy-notifier"
    shutil.copytree(ROOT / "examples" / folder.name, folder, ignore=shutil.ignore_patterns("__pycache__"))
    ran = run_tests(folder)
    assert ran.returncode == 0 and "2 passed" in ran.stdout, ran.stdout + ran.stderr


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        pytest.param({"binary": "./none"}, "no such file", marks=pytest.mark.wide),
        ({"permissions": ["read:projects", "no such"]}, "no sidecar"),
    ],
)
def test_plugin_that_cannot_run_fails_its_tests(tmp_path: Path, change: dict[str, object], expected: str) -> None:
    write_plugin(tmp_path / "bell", PLUGIN, **{**MANIFEST, **change})
    ran = run_tests(tmp_path, SIMPLE)
    assert ran.returncode == 1 and "no sidecar" in ran.stdout and expected in ran.stdout, ran.stdout + ran.stderr
    assert "1 passed" not in ran.stdout


def test_test_without_a_cage_fails_with_what_is_missing(tmp_path: Path) -> None:
    """Root without the right to mount builds no cage, and the fixture never runs a plugin without one."""
    write_plugin(tmp_path / "bell", PLUGIN, **MANIFEST)
    ran = run_tests(tmp_path, SIMPLE, ("setpriv", "--bounding-set=-sys_admin", "--inh-caps=-sys_admin", "--"))
    assert ran.returncode == 1 and "no sidecar" in ran.stdout and "1 failed" in ran.stdout, ran.stdout + ran.stderr


def test_test_without_the_command_fails_with_what_is_missing(tmp_path: Path) -> None:
    write_plugin(tmp_path / "bell", PLUGIN, **MANIFEST)
    ran = run_tests(tmp_path, SIMPLE, ("env", "PATH=/usr/bin"))
    assert ran.returncode == 1 and "'isolator' is not installed" in ran.stdout, ran.stdout + ran.stderr
