"""Plugins that say which version they are, and how one stands."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tests.system.daemon import ECHO, Daemon, event, write_plugin

BROKEN = "#!/bin/sh\nexit 7\n"
SILENT = "#!/bin/sh\nsleep 1000\n"


def answers(version: str) -> str:
    """A plugin that says which version it is."""
    return ECHO.replace('"status": "ok"', f'"status": "ok", "version": "{version}"')


def make(folder: Path, version: str, script: str | None = None, **manifest: Any) -> Path:
    return write_plugin(folder, answers(version) if script is None else script, version=version, **manifest)


def add(d: Daemon, folder: Path, *, start: bool = True) -> None:
    d.cli("plugin", "add", str(folder), "--yes")
    if start:
        d.cli("plugin", "start", folder.name)


def shown(d: Daemon, name: str) -> dict[str, Any]:
    found: dict[str, Any] = d.json("plugin", "show", name)
    return found


def version_that_answers(d: Daemon, name: str, number: str) -> str:
    """Deliver an event, and say which version replied."""
    emitted = d.json("event", "emit", "deploy.completed", event(f"{name}-{number}"), "--wait")
    (reply,) = [
        r["data"]["response"]
        for r in d.records()
        if r["type"] == "event.response" and r["plugin"] == name and r["event_id"] == emitted["id"]
    ]
    return str(json.loads(reply)["result"]["version"])


def of_type(d: Daemon, name: str, kind: str) -> list[dict[str, Any]]:
    return [r for r in d.records() if r["type"] == kind and r["plugin"] == name]


def states(d: Daemon) -> dict[str, str]:
    return {entry["name"]: entry["state"] for entry in d.json("plugin", "list")}


def whole(d: Daemon, name: str) -> None:
    """The plugin is there with all of its parts, or nothing of it is."""
    import pwd

    from isolator.paths import Paths

    listed = name in states(d)
    parts = {
        "files": (d.root / f"var/lib/isolator/plugins/{name}/plugin.state").exists(),
        "policy": (d.root / f"etc/isolator/policies/{name}.toml").exists(),
        "user": f"plugin-{name}-{Paths.of(d.root).instance}" in {entry.pw_name for entry in pwd.getpwall()},
    }
    assert set(parts.values()) == {listed}, (listed, parts)
    if not listed:
        assert not (d.root / f"var/lib/isolator/plugins/{name}").exists()
        assert not (d.root / f"var/lib/isolator/state/{name}").exists()
