"""Sidecars that do not want to go: they ignore SIGTERM, hide in the background, or stop themselves."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.processes import state
from tests.support.sidecars import oneshot
from tests.support.timeouts import seconds
from tests.system.daemon import Daemon, daemon, event, wait_for, write_plugin

IGNORES = """
for number in range(1, 65):
    try:
        signal.signal(number, signal.SIG_IGN)
    except (OSError, ValueError):
        pass
if os.fork() == 0:
    os.setsid()
    if os.fork() == 0:
        time.sleep(1000)
    os._exit(0)
"""
STOPS = """
if os.fork() == 0:
    while not os.path.exists(os.environ["PLUGIN_STATE_DIR"] + "/stop"):
        time.sleep(0.02)
    os.kill(os.getppid(), signal.SIGSTOP)
    os.kill(os.getpid(), signal.SIGSTOP)
"""
KINDS = {"ignores": IGNORES, "stops": STOPS}
"""What ignores all that can be ignored, its child's child too; and what, stopped, receives no signal but SIGKILL."""
DAEMONISES = "if os.fork():\n    sys.exit(0)\nos.setsid()\nif os.fork():\n    os._exit(0)\n"


def _script(first: str) -> str:
    return oneshot('return {"status": "ok"}', first=first)


@pytest.fixture(scope="module")
def running() -> Iterator[Daemon]:
    with daemon(host_toml='[defaults]\nstop_grace = "1s"\n[restart]\nbackoff_min = "0.1s"\ncrashes = 3\n') as d:
        yield d


def _of_user(uid: int) -> list[int]:
    """Every process of a plugin's user, wherever it hides."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                if entry.stat().st_uid == uid or f"Uid:\t{uid}\t" in (entry / "status").read_text():
                    found.append(int(entry.name))
            except OSError:
                continue
    return found


@pytest.mark.parametrize("kind", KINDS)
def test_a_stop_ends_it_whole(running: Daemon, tmp_path: Path, kind: str) -> None:
    running.cli("plugin", "add", str(write_plugin(tmp_path / kind, _script(KINDS[kind]))), "--yes")
    try:
        running.cli("event", "emit", "deploy.completed", event(1), "--wait")
        shown = running.json("plugin", "show", kind)
        assert len(_of_user(shown["uid"])) > 1
        if kind == "stops":
            (stop := running.state_of(kind) / "stop").touch()
            wait_for(lambda: any(state(pid) == "T" for pid in _of_user(shown["uid"])))
            stop.unlink()
        running.cli("plugin", "stop", kind)
        assert not _of_user(shown["uid"])
        assert running.json("plugin", "show", kind)["state"] == "stopped"
        (ended,) = [r for r in running.records() if r["type"] == "plugin.stopped" and r["plugin"] == kind]
        assert ended["data"]["signal"] == 9
        # It comes back as if nothing had been.
        running.cli("event", "emit", "deploy.completed", event(2), "--wait")
    finally:
        running.cli("plugin", "remove", kind, "--yes")


def test_one_that_goes_into_the_background_is_told_that_it_ended(running: Daemon, tmp_path: Path) -> None:
    """What was started is what runs: a child that outlives it would be a process that nobody watches."""
    running.cli("plugin", "add", str(write_plugin(tmp_path / "daemonises", _script(DAEMONISES))), "--yes")
    try:
        uid = running.json("plugin", "show", "daemonises")["uid"]
        running.cli("plugin", "start", "daemonises", code=None)
        entry = wait_for(
            lambda: (e := running.json("plugin", "show", "daemonises"))["state"] == "failed" and e, seconds(30)
        )
        assert "exit code 0" in entry["error"]
        assert not _of_user(uid)
    finally:
        running.cli("plugin", "remove", "daemonises", "--yes")
