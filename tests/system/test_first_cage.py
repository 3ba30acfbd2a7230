"""Reloads, and ends, that come upon the first start of launcher and broker."""

from __future__ import annotations

from pathlib import Path

from tests.support.timeouts import seconds
from tests.system.daemon import daemon, wait_for, write_plugin


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
        assert not d.service_pid("broker.service", missing_ok=True)
        assert not [line for line in d.log.read_text().splitlines() if "not named" in line or "Traceback" in line]
        d.cli("plugin", "add", str(write_plugin(tmp_path / "first")), "--yes")
        d.cli("plugin", "start", "first")
        wait_for(lambda: d.json("plugin", "show", "first")["state"] == "running")
        d.cli("reload")
        assert d.json("plugin", "show", "first")["state"] == "running"
        assert all(one["up"] for one in d.json("status")["services"])
