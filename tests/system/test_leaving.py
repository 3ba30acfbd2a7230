"""Before a sidecar is stopped, for whatever reason, what it was sent is answered and ``shutdown`` is said."""

from __future__ import annotations

import json
from pathlib import Path

from tests.support.sidecars import oneshot, stream
from tests.support.timeouts import seconds
from tests.system.daemon import Daemon, daemon, event, wait_for, write_plugin

TIDY = stream(
    """
if method == "shutdown":
    print("shutdown", params["reason"], flush=True)
if method == "config.changed":
    print("changed", *params["keys"], flush=True)
else:
    send(id=id, result={})
""",
    hello='{"protocol": "1", "capabilities": ["shutdown", "config.changed"]}',
)
SLOW = oneshot('print("working", flush=True)\ntime.sleep(0.7)\nreturn {"status": "ok"}')


def _lines(d: Daemon, name: str) -> list[str]:
    path = d.root / f"var/log/isolator/plugins/{name}.log"
    return [json.loads(line)["line"] for line in path.read_text().splitlines()] if path.exists() else []


def _said(d: Daemon, reason: str) -> None:
    wait_for(
        lambda: f"shutdown {reason}" in _lines(d, "tidy"), what=lambda: f"no shutdown for {reason}: {_lines(d, 'tidy')}"
    )


def test_shutdown_is_said_before_every_graceful_stop(tmp_path: Path) -> None:
    manifest = {"transport": {"mode": "stream"}, "config_schema": {"color": {"type": "string"}}}
    folder = write_plugin(tmp_path / "tidy", TIDY, **manifest)
    with daemon() as d:
        d.cli("plugin", "add", str(folder), "--yes")

        def up() -> None:
            (delivery,) = d.json("event", "emit", "deploy.completed", event(1), "--wait")["deliveries"]
            assert delivery["state"] == "ok"

        up()
        d.cli("plugin", "stop", "tidy")
        _said(d, "operator")
        up()
        d.cli("plugin", "restart", "tidy")
        _said(d, "restart")
        up()
        d.cli("plugin", "config", "tidy", "set", "color=red")
        _said(d, "config")
        assert _lines(d, "tidy").index("changed color") < _lines(d, "tidy").index("shutdown config")
        up()
        write_plugin(folder, TIDY, version="1.1.0", activation={"idle": "1s"}, **manifest)
        d.cli("plugin", "update", "tidy")
        _said(d, "update")
        up()
        _said(d, "idle")
        wait_for(lambda: d.json("plugin", "show", "tidy")["state"] == "stopped")
        up()
        d.cli("plugin", "disable", "tidy")
        _said(d, "disabled")
        d.cli("plugin", "enable", "tidy")
        up()
        assert d.stop() == 0
        assert "shutdown the daemon stops" in _lines(d, "tidy")
        assert not [r for r in d.records() if r["type"] == "plugin.crashed"]


def test_what_is_in_flight_is_answered_before_the_stop(tmp_path: Path) -> None:
    """Killed in the middle of an event it would get the event a second time."""
    with daemon() as d:
        d.cli("plugin", "add", str(write_plugin(tmp_path / "slow", SLOW)), "--yes")
        first = d.json("event", "emit", "deploy.completed", event(1))["id"]
        second = d.json("event", "emit", "deploy.completed", event(2))["id"]
        wait_for(lambda: "working" in _lines(d, "slow"))
        d.cli("plugin", "restart", "slow")
        for emitted in (first, second):
            wait_for(
                lambda emitted=emitted: d.json("event", "show", emitted)["deliveries"][0]["state"] == "ok", seconds(30)
            )
            (delivery,) = d.json("event", "show", emitted)["deliveries"]
            assert delivery["attempts"] == 1
