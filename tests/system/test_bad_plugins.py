"""What is wrong with a plugin is told in one line, leaves nothing half-made, and touches no other plugin."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.patience import seconds
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


BROKEN: dict[str, tuple[Callable[[Path], object], str]] = {
    "json": (lambda f: (f / "plugin.json").write_text('{"name": '), "plugin.json"),
    "hook": (lambda f: _manifest(f, hooks=["deploy.finished"]), "deploy.finished"),
    "typo": (lambda f: _manifest(f, sandbox={"network": {"egres": []}}), "egress"),
    "missing": (lambda f: (f / "main").unlink(), "no such file"),
    "mode": (lambda f: (f / "main").chmod(0o644), "chmod +x"),
    "escape": (lambda f: _manifest(f, binary="../other/main"), ".."),
    "link": (_outside, "link"),
    "machine": (_i386, "i386"),
    "fifo": (lambda f: __import__("os").mkfifo(f / "pipe"), "not a regular file"),
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
    assert not list((running.root / "var/lib/isolator/plugins").glob(".staging-*"))
    assert not (running.root / "etc/isolator/policies/broken.toml").exists()


CRASHING = {
    "exits": "#!/bin/sh\nexit 3\n",
    "silent": "#!/bin/sh\nsleep 1000\n",
}


@pytest.mark.slow
@pytest.mark.parametrize("kind", CRASHING)
def test_sidecar_that_cannot_serve_fails_visibly(running: Daemon, tmp_path: Path, kind: str) -> None:
    folder = write_plugin(tmp_path / kind, CRASHING[kind])
    running.cli("plugin", "add", str(folder), "--yes")
    try:
        running.cli("event", "emit", "deploy.completed", event(1))
        entry = wait_for(
            lambda: (e := running.json("plugin", "show", kind))["state"] == "failed" and e,
            seconds(60),
            "it never failed",
        )
        assert ("exit code 3" if kind == "exits" else "no socket") in entry["error"]
    finally:
        running.cli("plugin", "remove", kind, code=None)


ANSWERS = {
    "garbage": "connection.sendall(b'\\x00\\xff not json\\n')",
    "endless": "[connection.sendall(b'x' * 65536) for _ in range(16384)]",
}


@pytest.mark.parametrize("kind", ANSWERS)
def test_bad_answers_hurt_nobody_else(running: Daemon, tmp_path: Path, kind: str) -> None:
    script = f"""\
    #!/usr/bin/python3
    import os, socket
    server = socket.socket(socket.AF_UNIX)
    server.bind(os.environ["PLUGIN_SOCKET"])
    server.listen(1)
    while True:
        connection, _ = server.accept()
        connection.recv(4096)
        try:
            {ANSWERS[kind]}
        except OSError:
            pass
        connection.close()
    """
    bad, good = write_plugin(tmp_path / f"bad-{kind}", script), write_plugin(tmp_path / f"good-{kind}")
    for folder in (bad, good):
        running.cli("plugin", "add", str(folder), "--yes")
    try:
        running.cli("event", "emit", "deploy.completed", event(kind))
        seen = running.root / f"var/lib/isolator/state/good-{kind}/mnt/state/seen"
        wait_for(lambda: seen.exists() and f"d{kind}" in seen.read_text(), what="the good plugin was held up")
        bad_answers = wait_for(
            lambda: [r for r in running.records() if r["type"] == "event.response" and r["plugin"] == bad.name]
        )
        assert bad_answers[0]["data"]["outcome"] not in ("ok", "skipped")
    finally:
        for folder in (bad, good):
            running.cli("plugin", "remove", folder.name, code=None)
            shutil.rmtree(folder)
