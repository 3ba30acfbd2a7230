"""A plugin that does not wait for its first event."""

from __future__ import annotations

from pathlib import Path

from tests.system.daemon import ECHO, Daemon, alive, daemon, event, kill_9, wait_for, write_plugin


def _state(d: Daemon, state: str) -> None:
    wait_for(
        lambda: d.json("plugin", "show", "early")["state"] == state, what=lambda: f"not {state}: {d.log.read_text()}"
    )


def test_eager_is_up_with_the_daemon(tmp_path: Path) -> None:
    schema = {"color": {"type": "string", "required": True}}
    folder = write_plugin(tmp_path / "early", ECHO, activation={"start": "eager"}, config_schema=schema)
    with daemon() as d:
        assert "it starts by itself, without an event" in d.cli("plugin", "add", str(folder), "--yes").stdout
        assert d.json("plugin", "show", "early")["state"] == "stopped"  # something that it needs is missing
        d.cli("plugin", "config", "early", "set", "color=red")
        _state(d, "running")
        d.stop()
        d.start()
        _state(d, "running")
        # Who stopped it wants it stopped; that the host comes back is no reason to start it.
        d.cli("plugin", "stop", "early")
        host = d.service_pid("host.service")
        kill_9(host)
        wait_for(lambda: not alive(host) and d.service_pid("host.service", missing_ok=True) not in (0, host))
        wait_for(lambda: d.cli("plugin", "list", code=None).returncode == 0)
        assert d.json("plugin", "show", "early")["state"] == "stopped"
        d.cli("plugin", "disable", "early")
        d.cli("plugin", "enable", "early")
        _state(d, "running")
        write_plugin(folder, ECHO, version="2.0.0", activation={"start": "eager"}, config_schema=schema)
        d.cli("plugin", "stop", "early")
        d.cli("plugin", "update", "early")
        _state(d, "running")
        reasons = [r["data"]["reason"] for r in d.records() if r["type"] == "plugin.started"]
        assert reasons == ["eager"] * 4
        d.cli("event", "emit", "deploy.completed", event(1), "--wait")
