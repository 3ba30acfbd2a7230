"""Reloads, and ends, that come upon the first start of launcher and broker."""

from __future__ import annotations

import sys
from pathlib import Path

from tests.support.timeouts import seconds
from tests.system.daemon import Daemon, daemon, wait_for, write_plugin


def test_reload_that_comes_upon_the_first_plugin_goes_on_with_it(tmp_path: Path) -> None:
    with daemon() as d:
        adding = d.begin("plugin", "add", str(write_plugin(tmp_path / "first")), "--yes")
        wait_for(lambda: d.service_pid("broker.service", missing_ok=True))
        d.cli("reload")
        assert adding.wait(seconds(60)) == 0, adding.communicate()
        d.cli("plugin", "start", "first")
        wait_for(lambda: d.json("plugin", "show", "first")["state"] == "running")
        found = d.json("status")
        assert all(one["up"] for one in found["services"]) and not found["alarms"], found


def test_daemon_that_ends_with_its_first_cage_under_way_leaves_nothing(tmp_path: Path) -> None:
    with daemon() as d:
        adding = d.begin("plugin", "add", str(write_plugin(tmp_path / "first")), "--yes")
        wait_for(lambda: d.service_pid("broker.service", missing_ok=True) or adding.poll() is not None)
        assert d.stop() == 0
        adding.wait(seconds(60))


def test_reload_of_a_daemon_without_plugins_begins_nothing_that_only_cages_need(tmp_path: Path) -> None:
    with daemon() as d:
        before = {one["name"]: one["pid"] for one in d.json("status")["services"]}
        d.cli("reload")
        after = {one["name"]: one["pid"] for one in d.json("status")["services"]}
        assert after.keys() == before.keys() == {"supervisor", "audit", "host"}
        assert after["supervisor"] == before["supervisor"] and after["host"] != before["host"]
        assert not any(d.service_pid(one, missing_ok=True) for one in ("broker.service", "launcher.server"))
        assert not [line for line in d.log.read_text().splitlines() if "not named" in line or "Traceback" in line]
        d.cli("plugin", "add", str(write_plugin(tmp_path / "first")), "--yes")
        d.cli("plugin", "start", "first")
        wait_for(lambda: d.json("plugin", "show", "first")["state"] == "running")
        d.cli("reload")
        assert d.json("plugin", "show", "first")["state"] == "running"
        assert all(one["up"] for one in d.json("status")["services"])


READS = """
import asyncio, os, sys
from pathlib import Path
from isolator.supervisor.reload import reloader
until_idle, begun = reloader._until_idle, []
policy = Path(sys.argv[2], "etc/isolator/policies/first.toml")
async def at_rest(daemon, busy, *, threads=False):
    await until_idle(daemon, busy, threads=threads)
    if threads and not begun:
        begun.append(True)
        policy.write_text(policy.read_text())
        while len(os.listdir("/proc/self/task")) == 1:
            await asyncio.sleep(0.001)
        await until_idle(daemon, busy, threads=threads)
reloader._until_idle = at_rest
from host.cli.main import main
sys.exit(main())
"""


class Reads(Daemon):
    """A daemon that reads a policy anew as it has just come to rest for a reload."""

    def command(self) -> list[str]:
        return [sys.executable, "-I", "-c", READS, "--root", str(self.root), "serve"]


def test_reload_goes_on_after_a_policy_was_read_that_changed_as_the_daemon_came_to_rest(tmp_path: Path) -> None:
    """``plugin add`` writes one: the thread that had read it kept a reload that followed at once from its rest."""
    with daemon(kind=Reads) as d:
        d.cli("plugin", "add", str(write_plugin(tmp_path / "first")), "--yes")
        d.cli("reload")
