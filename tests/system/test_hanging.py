"""Processes of the daemon that hang (SIGSTOP) are noticed and replaced; plugins and events come through."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.timeouts import seconds
from tests.system.daemon import ECHO, Daemon, alive, daemon, event, wait_for, write_plugin

MODULES = {
    "audit": "isolator.audit.service",
    "broker": "isolator.broker.service",
    "host": "host.service",
    "launcher": "isolator.launcher.server",
}


def test_process_that_hangs_is_replaced(tmp_path: Path) -> None:
    with daemon() as d:
        d.cli("plugin", "add", str(write_plugin(tmp_path / "echo")), "--yes")
        d.cli("event", "emit", "deploy.completed", event(0), "--wait")
        before = {name: d.service_pid(module) for name, module in MODULES.items()}
        for pid in before.values():
            os.kill(pid, signal.SIGSTOP)
        for name, pid in before.items():
            wait_for(lambda pid=pid: not alive(pid), seconds(120), f"{name} hangs for ever")
            wait_for(lambda name=name: f"ALARM: {name}: does not answer" in d.log.read_text())
            wait_for(lambda name=name: d.service_pid(MODULES[name], missing_ok=True), what=f"{name} did not come back")
        wait_for(lambda: d.cli("event", "emit", "deploy.completed", event(1), code=None).returncode == 0)
        wait_for(lambda: "d1" in d.noted("echo"), what=d.log.read_text)
        alarms = d.json("check", code=1)["alarms"]
        assert all(any(alarm.startswith(f"{name}: does not answer") for alarm in alarms) for name in before), alarms
        ended = {r["data"]["service"]: r["data"] for r in d.records() if r["type"] == "service.ended"}
        assert ended.keys() == before.keys() and all(data["hung"] for data in ended.values())
        assert d.stop() == 0


@pytest.mark.parametrize("name", [pytest.param("launcher", marks=pytest.mark.wide), "audit"])
def test_daemon_stops_although_a_process_hangs(tmp_path: Path, name: str) -> None:
    with daemon() as d:
        d.cli("plugin", "add", str(write_plugin(tmp_path / "echo")), "--yes")
        wait_for(lambda: d.service_pid(MODULES[name], missing_ok=True))
        os.kill(d.service_pid(MODULES[name]), signal.SIGSTOP)
        assert d.stop(seconds(150)) == 0
        assert d.json("gc", "--dry-run") == []


class Patient(Daemon):
    """A daemon that never asks whether a process of it hangs."""

    def command(self) -> list[str]:
        program = "import sys; from isolator.supervisor import alive; alive.EVERY = 1e6;"
        program += " from host.cli.main import main; sys.exit(main())"
        return [sys.executable, "-I", "-c", program, "--root", str(self.root), "serve"]


@pytest.mark.parametrize("mode", ["oneshot", "exec"])
def test_plugin_that_waits_for_a_launcher_that_hangs_is_stopped_at_once(tmp_path: Path, mode: str) -> None:
    script = "#!/bin/sh\nexec sleep 600\n" if mode == "exec" else ECHO
    begin = ("event", "emit", "deploy.completed") if mode == "exec" else ("plugin", "start", "one")
    with daemon(kind=Patient) as d:
        d.cli("plugin", "add", str(write_plugin(tmp_path / "one", script, transport={"mode": mode})), "--yes")
        wait_for(lambda: d.service_pid(MODULES["launcher"], missing_ok=True))
        launcher = d.service_pid(MODULES["launcher"])
        with stopped(launcher):
            for number in range(3):  # one is parked by then, one is being parked, one is in the cage's own groups
                begun = d.begin(*begin, *([event(number)] if mode == "exec" else []))
                if mode != "exec":
                    wait_for(lambda: d.json("plugin", "show", "one")["state"] in ("starting", "running"))
                d.cli("plugin", "disable", "one")
                begun.communicate()
                d.cli("plugin", "enable", "one")
        d.cli("plugin", "update", "one", str(write_plugin(tmp_path / "one", version="2.0.0")), "--yes")
        d.cli("event", "emit", "deploy.completed", event(9), "--wait")
        assert d.service_pid(MODULES["launcher"]) == launcher
        assert d.stop() == 0
        assert d.json("gc", "--dry-run") == []


_FULL = """
import os, signal, sys
from isolator.ipc.packet import send_packet
from isolator.launcher.client import Launcher
from isolator.supervisor import alive
alive.EVERY = 1e6
keep = Launcher.keep
async def full(launcher, cage, cgroup):
    if os.path.exists(sys.argv[2] + "/fill"):
        os.kill(launcher.pid, signal.SIGSTOP)
        try:
            while True:
                send_packet(launcher._sock, b'{"forget": "nothing"}')
        except BlockingIOError:
            os.rename(sys.argv[2] + "/fill", sys.argv[2] + "/full")
    await keep(launcher, cage, cgroup)
Launcher.keep = full
from host.cli.main import main
sys.exit(main())
"""


class Full(Patient):
    """As that one; its launcher hangs, and has no room for another order, once a cage is made and ``fill`` is there."""

    def command(self) -> list[str]:
        return [sys.executable, "-I", "-c", _FULL, "--root", str(self.root), "serve"]


def test_plugin_that_waits_for_room_at_a_launcher_that_hangs_is_stopped_at_once(tmp_path: Path) -> None:
    with daemon(kind=Full) as d:
        d.cli("plugin", "add", str(write_plugin(tmp_path / "one")), "--yes")
        wait_for(lambda: d.service_pid(MODULES["launcher"], missing_ok=True))
        launcher = d.service_pid(MODULES["launcher"])
        (d.root / "fill").touch()
        begun = d.begin("plugin", "start", "one")
        wait_for((d.root / "full").exists)
        with stopped(launcher):
            d.cli("plugin", "disable", "one")
            begun.communicate()
        d.cli("plugin", "enable", "one")
        d.cli("event", "emit", "deploy.completed", event(1), "--wait")
        assert d.service_pid(MODULES["launcher"]) == launcher
        assert d.stop() == 0
        assert d.json("gc", "--dry-run") == []


def test_daemon_stops_although_a_start_waits_for_a_launcher_that_hangs(tmp_path: Path) -> None:
    with daemon(kind=Patient) as d:
        for number in range(3):
            d.cli("plugin", "add", str(write_plugin(tmp_path / f"one{number}")), "--yes")
        with stopped(d.service_pid(MODULES["launcher"])):
            starts = [d.begin("plugin", "start", f"one{number}") for number in range(3)]
            wait_for(lambda: sum(p["state"] == "starting" for p in d.json("plugin", "list")) >= 2)
            assert d.stop(seconds(60)) == 0
        for start in starts:
            start.communicate()
        assert d.json("gc", "--dry-run") == []


@contextlib.contextmanager
def stopped(pid: int) -> Iterator[None]:
    """Have a process hang."""
    os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGCONT)
