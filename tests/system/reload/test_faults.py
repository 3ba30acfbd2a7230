"""Reloads that go wrong, each trap of an exec in place, and a supervisor that is killed at each step of one."""

from __future__ import annotations

import os
import re
import signal
from pathlib import Path
from typing import Any, cast

import pytest

from tests.support.processes import children, state
from tests.support.timeouts import seconds
from tests.system.daemon import ECHO, Daemon, alive, daemon, event, wait_for, write_plugin
from tests.system.reload.faulty import AFTER_EXEC, STEPS, FaultyDaemon
from tests.system.reload.test_reload import STATE, running

ALWAYS = ("at rest", "exec", "read", "adopted", "kept")
"""The steps of the default run; each takes a start of the daemon."""
TRIES = ECHO.replace(
    "import json, os, socket",
    "import ctypes, json, os, socket, threading, time\n"
    "    def forever():\n"
    "        libc, done = ctypes.CDLL(None, use_errno=True), 0\n"
    "        while True:\n"
    "            assert libc.mount(b'x', b'/tmp', b'tmpfs', 0, None) == -1\n"
    "            assert ctypes.get_errno() == 1, ctypes.get_errno()\n"
    "            done += 1\n"
    "            with open(os.environ['PLUGIN_STATE_DIR'] + '/tried', 'w') as tried:\n"
    "                tried.write(str(done))\n"
    "            time.sleep(0.01)\n"
    "    threading.Thread(target=forever, daemon=True).start()",
)


def faulty() -> Any:
    return daemon(kind=FaultyDaemon)


def add(d: Daemon, folder: Path, name: str, script: str = ECHO) -> None:
    d.cli("plugin", "add", str(write_plugin(folder / name, script, sandbox=STATE)), "--yes")
    d.cli("plugin", "start", name)


def test_refused_reload_changes_nothing_and_says_why(shared_dir: Path) -> None:
    with faulty() as made:
        d = cast(FaultyDaemon, made)
        add(d, shared_dir, "echo")
        before = running(d)

        def refused() -> str:
            said = d.cli("reload", code=1).stderr
            assert said.startswith("isolator: reload: refused, and nothing has changed: ") and said.count("\n") == 1
            assert running(d) == before
            d.cli("event", "emit", "deploy.completed", event(1), "--wait")
            return said

        settings = d.root / "etc/isolator/host.toml"
        settings.parent.mkdir(parents=True, exist_ok=True)
        text = settings.read_text() if settings.exists() else None
        settings.write_text("nonsense = \n")
        assert "host.toml" in refused()
        settings.write_text(text) if text is not None else settings.unlink()
        d.at_exec("fail")
        assert "cannot be executed: No such file or directory" in refused()
        assert d.json("reload")["generation"] == 2
        assert running(d) == before
        d.cli("event", "emit", "deploy.completed", event(2), "--wait")
        assert [record["type"] for record in d.records()].count("daemon.reloaded") == 1

        d.keep_service("broker")
        kept = d.service_pid("isolator.broker.service")
        said = d.cli("reload", code=1).stderr
        assert "reload: broker goes on as before the reload: broker: is busy" in said and said.count("\n") == 1
        assert d.service_pid("isolator.broker.service") == kept
        d.cli("reload")
        assert d.service_pid("isolator.broker.service") != kept


def test_traps_of_an_exec_in_place(shared_dir: Path) -> None:
    with faulty() as made:
        d = cast(FaultyDaemon, made)
        assert d.process is not None
        add(d, shared_dir, "tries", TRIES)
        add(d, shared_dir, "ends")
        add(d, shared_dir, "loose")
        before = running(d)
        tried = d.state_of("tries") / "tried"
        wait_for(lambda: tried.exists() and tried.read_text())
        # A denied call waits in the kernel; a sidecar ends; a child, a zombie and a descriptor are nobody's.
        d.at_exec("pause 0.3", f"kill {before['ends'][0]}", "leak", "loosen loose")
        d.hand_over_without("landlock")
        d.cli("reload")
        shown = {one["name"]: one["error"] for one in d.json("plugin", "list")}
        assert shown["tries"] == "runs without landlock, which came with an update; restart it"
        (d.root / "without").unlink()
        log = d.log.read_text()
        assert "closed descriptor" in log and "/dev/full" in log
        assert log.count("ended process") == 2
        done = int(tried.read_text() or 0)
        wait_for(lambda: int(tried.read_text() or 0) > done + 5, what="denied calls are answered no more")
        wait_for(lambda: running(d).keys() >= {"ends", "loose"}, what="the plugins that ended have not come back")
        after = running(d)
        assert [name for name in before if after[name] == before[name]] == ["tries"]
        crashed = {one["plugin"]: one["data"] for one in d.records() if one["type"] == "plugin.crashed"}
        assert crashed["ends"]["signal"] == signal.SIGKILL
        assert "it did not hold when the daemon was reloaded" in crashed["loose"]["cause"]
        assert set(crashed) == {"ends", "loose"}
        assert blocked(d.service_pid("isolator.launcher.server")) == 0, "a child has inherited the mask of the exec"
        assert "Z" not in [state(pid) for pid in children(d.process.pid)]
        # A signal that comes during the exec is not lost, and ends the new image as it would have ended the old one.
        d.at_exec("term")
        d.cli("reload", "--timeout", "1", code=None)
        assert d.process.wait(seconds(40)) == 0
        assert not any(alive(pid) for pid, _ in after.values())
        assert d.json("gc", "--dry-run") == []


def blocked(pid: int) -> int:
    """The signals that a process blocks, a bit each (proc_pid_status(5))."""
    (mask,) = re.findall(r"^SigBlk:\s(\w+)$", Path(f"/proc/{pid}/status").read_text(), re.MULTILINE)
    return int(mask, 16)


def killed_at(d: FaultyDaemon, step: str) -> None:
    """Kill the supervisor at one step of a reload; nothing outlives it, and the next start clears what is left."""
    assert d.process is not None
    d.cli("plugin", "start", "echo")
    pid = running(d)["echo"][0]
    ours = children(d.process.pid)
    assert pid in ours
    d.kill_at(step)

    def ended() -> bool:
        """Whether it has ended; it is asked again, for a slow machine may have its reload refused."""
        assert d.process is not None
        if "not reloaded" in d.log.read_text():
            d.log.write_text("")
            os.kill(d.process.pid, signal.SIGHUP)
        return d.process.poll() is not None

    os.kill(d.process.pid, signal.SIGHUP)
    wait_for(ended, seconds(180), step)
    assert d.process.returncode == -signal.SIGKILL, step
    d.kill()
    wait_for(lambda: not any(map(alive, ours)), what=f"a process outlived a kill at {step!r}")
    d.start()
    assert "cleared what an earlier daemon left: cage echo" in d.log.read_text(), step
    d.log.write_text("")


@pytest.mark.parametrize("steps", [ALWAYS, pytest.param(STEPS, marks=pytest.mark.wide)], ids=["some", "all"])
def test_supervisor_killed_at_a_step_of_a_reload_leaves_nothing(shared_dir: Path, steps: tuple[str, ...]) -> None:
    assert set(ALWAYS) & set(AFTER_EXEC) and set(ALWAYS) < set(STEPS)
    with faulty() as made:
        d = cast(FaultyDaemon, made)
        d.cli("plugin", "add", str(write_plugin(shared_dir / "echo", sandbox=STATE)), "--yes")
        for step in steps:
            killed_at(d, step)
        d.cli("event", "emit", "deploy.completed", event(1), "--wait")
        assert d.stop() == 0
        d.cli("audit", "verify")
        assert d.json("gc", "--dry-run") == []
