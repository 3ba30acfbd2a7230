"""Runs that a reload has taken over are watched, limited, counted and ended as those that the daemon has started."""

from __future__ import annotations

import json
import os
import signal
import subprocess
from pathlib import Path

import pytest

from isolator.paths import Paths
from isolator.recovery.daemon import subtree_folders
from tests.support.processes import start_time
from tests.support.sidecars import OK, oneshot
from tests.support.timeouts import seconds
from tests.system.daemon import EVENT, Daemon, daemon, wait_for, write_plugin
from tests.system.reload.test_reload import STATE, running

HOST_TOML = """
[restart]
backoff_min = "0.1s"
crashes = 2
[audit]
snapshot_interval = "1s"
"""
LATE = OK.replace(
    "\npath = os.environ",
    """
while not os.path.exists(os.environ["PLUGIN_STATE_DIR"] + "/bind"):
    time.sleep(0.05)
path = os.environ""",
    1,
)
SCRIPTS = {
    "flushed": OK,
    "widened": OK,
    "hungry": oneshot("x = bytearray(1 << 30)\nx[::4096] = b'x' * len(x[::4096])"),
    "dies": OK,
    "late": LATE,
}
CAUSES = {
    "flushed": "its network rules were changed",
    "widened": "its control groups were changed",
    "hungry": "out of memory",
    "dies": "signal",
}


def run_of(d: Daemon, plugin: str) -> str:
    return str(d.json("plugin", "show", plugin)["run"])


def causes(d: Daemon, runs: dict[str, str]) -> dict[str, str]:
    """Why those of these runs have ended that have."""
    crashed = [one for one in d.records() if one["type"] == "plugin.crashed"]
    return {one["plugin"]: one["data"]["cause"] for one in crashed if one["run"] == runs[one["plugin"]]}


@pytest.mark.wide
def test_run_from_before_a_reload_is_watched_and_ended_as_any_other(shared_dir: Path) -> None:
    with daemon(host_toml=HOST_TOML) as d:
        for name, script in SCRIPTS.items():
            hooks = ["deploy.failed" if name == "hungry" else "deploy.completed"]
            patience = {"restart": {"start_timeout": "2m"}} if name == "late" else {}
            folder = write_plugin(shared_dir / name, script, sandbox=STATE, hooks=hooks, **patience)
            d.cli("plugin", "add", str(folder), "--yes")
        for name in CAUSES:
            d.cli("plugin", "start", name)
        late = d.begin("plugin", "start", "late")
        wait_for(lambda: set(running(d)) == set(SCRIPTS))
        first = running(d)["dies"][0]
        os.kill(first, signal.SIGKILL)  # a crash that counts after the reload, too
        wait_for(lambda: d.json("plugin", "show", "dies")["pid"] not in (None, first))
        before, runs = running(d), {name: run_of(d, name) for name in SCRIPTS}
        d.cli("reload")
        assert running(d) == before

        subprocess.run(["nsenter", f"--net=/proc/{before['flushed'][0]}/ns/net", "nft", "flush", "ruleset"], check=True)
        for folder in subtree_folders(Paths.of(d.root)):
            for cap in folder.glob(f"widened.{runs['widened']}/pids.max"):
                cap.write_text("500")
        payload = {"project_id": EVENT["project_id"], "deployment_id": "d1", "error_code": "none"}
        d.cli("event", "emit", "deploy.failed", json.dumps(payload))
        os.kill(before["dies"][0], signal.SIGKILL)
        wait_for(lambda: set(causes(d, runs)) == set(CAUSES), what=d.log.read_text)
        assert causes(d, runs) == CAUSES
        assert "; 2 crashes in" in d.json("plugin", "show", "dies")["error"]

        (d.state_of("late") / "bind").touch()
        assert late.wait(seconds(60)) == 0, (late.communicate(), d.log.read_text())
        late.communicate()
        assert start_time(before["late"][0]) == before["late"][1]
        assert run_of(d, "late") == runs["late"]
