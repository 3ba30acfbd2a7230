"""Enabled, disabled, started, stopped, and what happens to an event that kills."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.support.timeouts import seconds
from tests.system.daemon import ECHO, Daemon, daemon, event, wait_for
from tests.system.updates.plugins import add, make, of_type, shown


def test_disabled_is_kept_stopped_and_its_events_wait(running: Daemon, tmp_path: Path, name: str) -> None:
    add(running, make(tmp_path / name, "1.0.0"))
    running.cli("plugin", "disable", name)
    running.cli("plugin", "disable", name)
    assert shown(running, name)["state"] == "disabled" and shown(running, name)["pid"] is None
    emitted = running.json("event", "emit", "deploy.completed", event("waits"))
    assert f"isolator plugin enable {name}" in running.cli("plugin", "start", name, code=4).stderr
    running.cli("plugin", "update", name, str(make(tmp_path / "second" / name, "1.1.0")))
    assert shown(running, name)["state"] == "disabled"
    running.cli("plugin", "enable", name)
    wait_for(
        lambda: (
            {d["plugin"]: d["state"] for d in running.json("event", "show", emitted["id"])["deliveries"]}[name] == "ok"
        )
    )
    run = shown(running, name)["run"]
    running.cli("plugin", "enable", name)
    running.cli("plugin", "start", name)
    assert shown(running, name)["run"] == run, "what runs already was started again"
    running.cli("plugin", "stop", name)
    running.cli("plugin", "stop", name)
    running.cli("plugin", "restart", name)
    assert shown(running, name)["state"] == "running"


@pytest.mark.parametrize("verb", ["start", "stop", "restart", "enable", "disable", "remove", "rollback", "approve"])
def test_unknown_names(running: Daemon, verb: str) -> None:
    result = running.cli("plugin", verb, "nobody", code=3)
    assert result.stderr.count("\n") == 1 and "nobody" in result.stderr


def test_two_crashes_on_one_event_quarantine_it(tmp_path: Path) -> None:
    script = ECHO.replace(
        "params = ", 'params = {} if "poison" not in str(request) else os.kill(os.getpid(), 9) or {}; params |= '
    )
    with daemon(host_toml='[restart]\nbackoff_min = "0.1s"\n') as d:
        name = "fragile"
        add(d, make(tmp_path / name, "1.0.0", script))
        poison = d.json("event", "emit", "deploy.completed", event("poison", project_id="p-bad"))
        good = d.json("event", "emit", "deploy.completed", event("fine", project_id="p-good"))

        def delivery(emitted: dict[str, Any]) -> str:
            (found,) = d.json("event", "show", emitted["id"])["deliveries"]
            return str(found["state"])

        wait_for(lambda: delivery(poison) == "quarantined", seconds(60), "it was never quarantined")
        wait_for(lambda: delivery(good) == "ok", seconds(60), "the plugin did not go on")
        crashes = of_type(d, name, "plugin.crashed")
        assert [(r["data"]["signal"], r["data"]["origin"]) for r in crashes] == [(9, "plugin")] * 2
        (record,) = of_type(d, name, "event.quarantined")
        assert "crashed 2 times" in record["data"]["reason"]
        wait_for(lambda: shown(d, name)["state"] == "running")
