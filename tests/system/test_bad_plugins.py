"""What is wrong with a plugin is told in one line, leaves nothing half-made, and touches no other plugin."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from isolator_client import Client
from tests.support.sidecars import raw
from tests.support.timeouts import seconds
from tests.system.daemon import Daemon, daemon, event, wait_for, write_plugin


@pytest.fixture(scope="module")
def running() -> Iterator[Daemon]:
    with daemon(host_toml='[restart]\ncrashes = 2\nbackoff_min = "0.1s"\n') as d:
        yield d


def _manifest(folder: Path, **change: object) -> None:
    path = folder / "plugin.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))


def _i386(folder: Path) -> None:
    head = bytearray(Path("/bin/true").read_bytes()[:4096])
    head[18:20] = (3).to_bytes(2, "little")
    (folder / "main").write_bytes(head)


def _outside(folder: Path) -> None:
    (folder / "main").unlink()
    (folder / "main").symlink_to("/bin/true")


def _egress(folder: Path, host: str, **more: str) -> None:
    _manifest(folder, sandbox={"network": {"egress": [{"host": host, **more}]}})


def _instead(path: Path, make: Callable[[Path], object]) -> None:
    path.unlink()
    make(path)


def _to_shadow(path: Path) -> None:
    path.symlink_to("/etc/shadow")


BROKEN: dict[str, tuple[Callable[[Path], object], str]] = {
    "json": (lambda f: (f / "plugin.json").write_text('{"name": '), "plugin.json"),
    "hook": (lambda f: _manifest(f, hooks=["deploy.finished"]), "deploy.finished"),
    "typo": (lambda f: _manifest(f, sandbox={"network": {"egres": []}}), "egress"),
    "missing": (lambda f: (f / "main").unlink(), "no such file"),
    "mode": (lambda f: (f / "main").chmod(0o644), "chmod +x"),
    "escape": (lambda f: _manifest(f, binary="../other/main"), ".."),
    "link": (_outside, "link"),
    "machine": (_i386, "i386"),
    "shell in the name": (lambda f: _manifest(f, name="x;touch /tmp/isolator-pwned"), "name"),
    "substitution in the name": (lambda f: _manifest(f, name="$(touch /tmp/isolator-pwned)"), "name"),
    "nft in the name": (lambda f: _manifest(f, name='x" accept; flush ruleset; #'), "name"),
    "newline in the name": (lambda f: _manifest(f, name="x\nflush ruleset"), "name"),
    "option as the name": (lambda f: _manifest(f, name="--help"), "name"),
    "nft in a destination": (lambda f: _egress(f, "hooks.example.com } accept; flush ruleset"), "egress"),
    "newline in a destination": (lambda f: _egress(f, "hooks.example.com\nflush ruleset"), "egress"),
    "manifest that is a fifo": (lambda f: _instead(f / "plugin.json", os.mkfifo), "not a regular file"),
    "manifest that is a link": (lambda f: _instead(f / "plugin.json", _to_shadow), "link"),
    "link out": (lambda f: (f / "data").symlink_to("/etc/shadow"), "link"),
    "fifo": (lambda f: os.mkfifo(f / "pipe"), "not a regular file"),
    "nothing": (lambda f: (f / "plugin.json").unlink(), "plugin.json"),
}


@pytest.mark.parametrize("kind", BROKEN)
def test_refused_at_registration(running: Daemon, tmp_path: Path, kind: str) -> None:
    folder = write_plugin(tmp_path / "broken")
    change, word = BROKEN[kind]
    change(folder)
    result = running.cli("plugin", "add", str(folder), "--yes", code=2)
    assert result.stderr.startswith("isolator: ") and result.stderr.count("\n") == 1, result.stderr
    assert word in result.stderr, result.stderr
    assert not (running.root / "var/lib/isolator/plugins/broken").exists()
    staged = running.root / "var/lib/isolator/plugins"  # removed by the supervisor, beside the answer
    wait_for(lambda: not list(staged.glob(".staging-*")), what="the staged copy is removed")
    assert not (running.root / "etc/isolator/policies/broken.toml").exists()


def test_words_of_a_package_write_nobody_elses_lines(running: Daemon, tmp_path: Path) -> None:
    """What an author says is shown on a terminal and stands in the policy file: it must not act on either."""
    folder = write_plugin(tmp_path / "talker")
    reason = '\x1b[2J\x9b31m"\n[grant]\npermissions = ["*"]\n#'
    _manifest(
        folder,
        sandbox={"network": {"egress": [{"host": "hooks.example.com", "reason": reason}]},
                 "resources": {"memory": "2G"}},
    )  # fmt: skip
    added = running.cli("plugin", "add", str(folder), "--yes", code=None)
    shown = added.stdout + added.stderr + running.cli("plugin", "explain", "talker", code=None).stdout
    assert "\x1b" not in shown and "\x9b" not in shown
    if added.returncode == 0:
        effective = running.json("plugin", "show", "talker")["effective"]
        assert effective["permissions"] == []
        policy = running.root / "etc/isolator/policies/talker.toml"
        assert tomllib.loads(policy.read_text())["grant"]["permissions"] == []
        running.cli("policy", "check", str(policy))
        running.cli("plugin", "remove", "talker", "--yes")


def test_modules_of_a_package_are_nobody_elses(running: Daemon, tmp_path: Path) -> None:
    """An operator stands in a stranger's folder, whose files are called like modules that the daemon imports."""
    folder = write_plugin(tmp_path / "shadow")
    trap = running.root / "imported"
    for name in ("json.py", "socket.py", "asyncio.py", "sitecustomize.py", "usercustomize.py", "isolator/__init__.py"):
        path = folder / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(f"open({str(trap)!r}, 'a').write(__name__)\n")
    words = ["isolator", "--root", str(running.root)]
    for command in (
        ["plugin", "add", ".", "--yes"], ["plugin", "start", "shadow"], ["plugin", "remove", "shadow", "--yes"],
    ):  # fmt: skip
        subprocess.run([*words, *command], cwd=folder, capture_output=True, check=False, timeout=seconds(60))
        assert not trap.exists(), f"{command}: {trap.read_text()} of the package was imported outside its cage"
    assert not (running.root / "var/lib/isolator/plugins/shadow").exists()
    assert not Path("/tmp/isolator-pwned").exists()


# The last one makes an x32 call.
CRASHING = {
    "exits": "#!/bin/sh\nexit 3\n",
    "ends": "#!/bin/sh\nexit 0\n",
    "silent": "#!/bin/sh\nsleep 1000\n",
    "hungry": "#!/usr/bin/python3\nx = bytearray(1 << 30)\nx[::4096] = b'x' * len(x[::4096])\n",
    "forking": "#!/usr/bin/python3\nimport os\nwhile os.fork():\n    pass\nimport time; time.sleep(1000)\n",
    "segfault": "#!/usr/bin/python3\nimport os, signal\nos.kill(os.getpid(), signal.SIGSEGV)\n",
    "forbidden": "#!/usr/bin/python3\nimport ctypes\nctypes.CDLL(None).syscall(ctypes.c_long(0x40000027))\n",
}
CAUSES = {
    "exits": ("exit code 3 before it was up;", "exit"), "silent": ("no socket", "no socket in 2 s"),
    "hungry": ("out of memory", "out of memory"), "forking": ("task limit", "task limit"),
    "ends": ("exit code 0 before it was up; a program that runs once for each event has the mode exec;", "exit"),
    "segfault": ("killed by signal 11 before it was up;", "signal"), "forbidden": ("forbidden ABI", "forbidden ABI"),
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("kind", CRASHING)
def test_sidecar_that_cannot_serve_fails_visibly(running: Daemon, tmp_path: Path, kind: str) -> None:
    patience = {"restart": {"start_timeout": "2s"}} if kind == "silent" else {}
    folder = write_plugin(tmp_path / kind, CRASHING[kind], **patience)
    running.cli("plugin", "add", str(folder), "--yes")
    try:
        running.cli("event", "emit", "deploy.completed", event(1))
        entry = wait_for(
            lambda: (e := running.json("plugin", "show", kind))["state"] == "failed" and e,
            seconds(60),
            "it never failed",
        )
        shown, recorded = CAUSES[kind]
        assert shown in entry["error"]
        remedy = f"see 'isolator plugin logs {kind}', then isolator plugin start {kind}"
        wait_for(lambda: remedy in running.json("plugin", "show", kind)["holding"], what="no word of what to do")
        ends = [r for r in running.records() if r["type"] == "plugin.crashed" and r["plugin"] == kind]
        assert {r["data"]["cause"] for r in ends} == {recorded}
    finally:
        running.cli("plugin", "remove", kind, "--yes", code=None)


def test_file_that_is_no_package_is_answered_with_what_to_name(running: Daemon, tmp_path: Path) -> None:
    manifest = write_plugin(tmp_path / "named-by-its-manifest") / "plugin.json"
    refused = running.cli("plugin", "add", str(manifest), "--yes", code=2).stderr
    assert f"{manifest}: ends too early; name the plugin's folder, or pack that again" in refused


def test_plugin_that_was_killed_and_is_up_again_does_not_fail(running: Daemon, tmp_path: Path) -> None:
    running.cli("plugin", "add", str(write_plugin(tmp_path / "again")), "--yes")
    try:
        os.kill(running.json("plugin", "start", "again")["pid"], signal.SIGKILL)
        wait_for(lambda: (e := running.json("plugin", "show", "again"))["restarts"] and e["state"] == "running")
        wait_for(lambda: not running.json("plugin", "list", "--failed"), what="it fails, although it is up")
        running.cli("status")
        with Client(root=str(running.root)) as client:
            (health,) = client.health("again")
        assert (health.healthy, health.why, health.restarts) == (True, None, 1)
    finally:
        running.cli("plugin", "remove", "again", "--yes", code=None)


ANSWERS = {
    "garbage": "connection.sendall(b'\\x00\\xff not json\\n')",
    "endless": "[connection.sendall(b'x' * 65536) for _ in range(16384)]",
}


@pytest.mark.parametrize("kind", ANSWERS)
def test_bad_answers_hurt_nobody_else(running: Daemon, tmp_path: Path, kind: str) -> None:
    answer = f"connection.recv(4096)\ntry:\n    {ANSWERS[kind]}\nexcept OSError:\n    pass\nconnection.close()"
    bad, good = write_plugin(tmp_path / f"bad-{kind}", raw(answer)), write_plugin(tmp_path / f"good-{kind}")
    for folder in (bad, good):
        running.cli("plugin", "add", str(folder), "--yes")
    try:
        running.cli("event", "emit", "deploy.completed", event(kind))
        wait_for(lambda: f"d{kind}" in running.noted(f"good-{kind}"), what="the good plugin was held up")
        bad_answers = wait_for(
            lambda: [r for r in running.records() if r["type"] == "event.response" and r["plugin"] == bad.name]
        )
        assert bad_answers[0]["data"]["outcome"] not in ("ok", "skipped")
    finally:
        for folder in (bad, good):
            running.cli("plugin", "remove", folder.name, "--yes", code=None)
            shutil.rmtree(folder)
