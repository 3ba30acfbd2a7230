"""Only the plugin's own doing counts against it and its events: no fault of the daemon, no exit code of a delivery."""

from __future__ import annotations

import contextlib
import re
from pathlib import Path

from tests.support.processes import children
from tests.support.sidecars import oneshot
from tests.support.timeouts import seconds
from tests.system.daemon import Daemon, daemon, event, kill_9, wait_for, write_plugin

HOST_TOML = '[restart]\ncrashes = 2\nbackoff_min = "0.1s"\n'
ATTEMPTS = 4


def _of(d: Daemon, kind: str) -> list[dict[str, object]]:
    return [r["data"] for r in d.records() if r["type"] == kind and r["plugin"] == "echo"]


def _delivered(d: Daemon, emitted: str) -> dict[str, object]:
    def final() -> dict[str, object] | None:
        (delivery,) = d.json("event", "show", emitted)["deliveries"]
        return delivery if delivery["state"] not in ("queued", "retry", "in_flight") else None

    found: dict[str, object] = wait_for(final, seconds(90), "it was never final")
    return found


def _launcher(d: Daemon) -> int:
    """The launcher's pid, 0 between two; a cage's first process, which it cloned, has a pid of its own inside too."""
    assert d.process is not None
    for child in children(d.process.pid, "isolator.launcher.server"):
        with contextlib.suppress(OSError):
            if re.search(r"^NSpid:\t\d+$", Path(f"/proc/{child}/status").read_text(), re.MULTILINE):
                return child
    return 0


def test_event_and_plugin_survive_deaths_of_the_launcher(tmp_path: Path) -> None:
    script = oneshot(f'if params["_meta"]["attempt"] < {ATTEMPTS}:\n    time.sleep(1000)\nreturn {{"status": "ok"}}')
    with daemon(host_toml=HOST_TOML) as d:
        d.cli("plugin", "add", str(write_plugin(tmp_path / "echo", script, delivery={"timeout": "60s"})), "--yes")
        emitted = d.json("event", "emit", "deploy.completed", event(1))["id"]
        for number in range(1, ATTEMPTS):
            wait_for(lambda number=number: len(_of(d, "event.dispatched")) == number, seconds(60))
            wait_for(lambda: _launcher(d))
            kill_9(_launcher(d))
            wait_for(lambda number=number: len(_of(d, "plugin.crashed")) == number, seconds(60))
        delivery = _delivered(d, emitted)
        assert (delivery["state"], delivery["attempts"]) == ("ok", ATTEMPTS)
        assert {end["origin"] for end in _of(d, "plugin.crashed")} == {"daemon"}
        assert d.json("plugin", "show", "echo")["state"] == "running"


def test_exit_codes_of_deliveries_do_not_give_the_plugin_up(tmp_path: Path) -> None:
    script = oneshot(
        f'if params["_meta"]["attempt"] < {ATTEMPTS}:\n    raise OSError("503")\nreturn {{"status": "ok"}}'
    )
    with daemon(host_toml=HOST_TOML) as d:
        d.cli("plugin", "add", str(write_plugin(tmp_path / "echo", script)), "--yes")
        emitted = d.json("event", "emit", "deploy.completed", event(1))["id"]
        delivery = _delivered(d, emitted)
        assert (delivery["state"], delivery["attempts"]) == ("ok", ATTEMPTS)
        assert [(end["exit_code"], end["origin"]) for end in _of(d, "plugin.crashed")] == [(1, "plugin")] * 3
        assert not _of(d, "plugin.failed")
