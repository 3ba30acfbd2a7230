"""Processes of the daemon that hang (SIGSTOP) are noticed and replaced; plugins and events come through."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest

from tests.support.timeouts import seconds
from tests.system.daemon import alive, daemon, event, wait_for, write_plugin

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
        wait_for(
            lambda: "d1" in (d.root / "var/lib/isolator/state/echo/mnt/state/seen").read_text(), what=d.log.read_text()
        )
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
