"""Plugins that events are delivered to, and the trail's figures about it: shared by the benchmarks of delivery."""

from __future__ import annotations

import json
import os
import time
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from host.client.client import Client
from tests.system.daemon import Daemon, write_plugin

HOST_TOML = """
[defaults]
cpu = "100%"
[ceiling]
cpu = "400%"
"""
ONESHOT = """\
    #!/usr/bin/python3
    import json, os, socket
    server = socket.socket(socket.AF_UNIX)
    server.bind(os.environ["PLUGIN_SOCKET"])
    server.listen(1)
    while True:
        connection, _ = server.accept()
        request = json.loads(connection.recv(4096))
        reply = {"jsonrpc": "2.0", "result": {"status": "ok"}, "id": request["id"]}
        connection.sendall(json.dumps(reply).encode() + b"\\n")
        connection.close()
"""
STREAM = """\
    #!/usr/bin/python3
    import json, os, socket
    server = socket.socket(socket.AF_UNIX)
    server.bind(os.environ["PLUGIN_SOCKET"])
    server.listen(1)
    while True:
        connection, _ = server.accept()
        for line in connection.makefile("rb"):
            request = json.loads(line)
            if "id" in request:
                result = {"protocol": "1"} if request["method"] == "host.hello" else {"status": "ok"}
                reply = {"jsonrpc": "2.0", "result": result, "id": request["id"]}
                connection.sendall(json.dumps(reply).encode() + b"\\n")
"""
EVENT = {
    "project_id": "proj_abc123", "deployment_id": "dep_xyz789", "url": "https://myapp.example.com",
    "commit_sha": "a1b2c3d", "duration_ms": 14200,
}  # fmt: skip


class Subject:
    """Plugin of the daemon, and the events that were sent to it."""

    def __init__(self, running: Daemon, name: str, hook: str, script: str, **manifest: Any) -> None:
        self.name, self.hook = name, hook
        folder = write_plugin(running.root / "src" / name, script, hooks=[hook], **manifest)
        running.cli("plugin", "add", str(folder), "--yes")
        self.ids: list[str] = []
        self.began: list[float] = []
        self.emits: list[float] = []

    def clear(self) -> None:
        """Drop all measurements so far."""
        for figures in (self.ids, self.began, self.emits):
            figures.clear()

    def once(self, client: Client, *, wait: bool = True) -> str:
        """Emit one event, and wait for its outcome."""
        self.began.append(time.time_ns() / 1000)
        began = time.perf_counter_ns()
        event = str(client.call("event.emit", name=self.hook, payload=payload(self.hook, len(self.ids)))["id"])
        self.emits.append((time.perf_counter_ns() - began) / 1000)
        self.ids.append(event)
        if wait:
            row = client.call("event.wait", id=event, timeout=30)
            if any(d["state"] != "ok" for d in row["deliveries"]):
                raise RuntimeError(f"{self.name}: {row['deliveries']}")
        return event


def payload(hook: str, number: int) -> dict[str, Any]:
    """Make a payload of that event, of one of 64 projects."""
    if hook == "deploy.completed":
        return {**EVENT, "project_id": f"proj_{number % 64}"}
    if hook == "deploy.started":
        return {"project_id": f"proj_{number % 64}", "deployment_id": "dep_xyz789"}
    if hook == "project.created":
        return {"project_id": f"proj_{number % 64}", "name": "shop"}
    return {"project_id": f"proj_{number % 64}", "deployment_id": "d", "error_code": "build"}


def _micros(text: str) -> float:
    return datetime.fromisoformat(text.replace("Z", "+00:00")).timestamp() * 1e6


@dataclass(frozen=True)
class Passage:
    """Times of a delivery, in µs of the clock that stamps the records."""

    accepted: float
    queued: float
    """From accepted until the attempt was on record."""
    replied: float
    latency: float
    """From written to the plugin until its reply was read."""

    @property
    def dispatch(self) -> float:
        """From accepted until it was written."""
        return self.round_trip - self.latency

    @property
    def round_trip(self) -> float:
        return self.replied - self.accepted


class Trail:
    """Records of events in the daemon's trail, by event and plugin."""

    def __init__(self, running: Daemon) -> None:
        self.accepted: dict[str, float] = {}
        self._queued: dict[tuple[str, str], float] = {}
        self._replied: dict[tuple[str, str], tuple[float, float]] = {}
        for file in sorted((running.root / "var/log/isolator/audit").glob("audit*.jsonl")):
            for line in file.read_text().splitlines():
                record = json.loads(line)
                event, plugin, data = record["event_id"], record["plugin"], record["data"]
                if record["type"] == "event.accepted":
                    self.accepted[event] = _micros(record["time"])
                elif record["type"] == "event.dispatched" and data["queued_us"] is not None:
                    self._queued[event, plugin] = data["queued_us"]
                elif record["type"] == "event.response":
                    self._replied[event, plugin] = _micros(record["time"]), data["latency_us"]

    def passages(self, plugin: str, events: list[str]) -> list[Passage]:
        """Return the deliveries of these events to a plugin, without those that waited for a retry."""
        return [
            Passage(self.accepted[event], self._queued[event, plugin], *self._replied[event, plugin])
            for event in events
            if (event, plugin) in self._queued and (event, plugin) in self._replied
        ]


def settle(running: Daemon, client: Client) -> None:
    """Wait until the trail has everything."""
    deadline = time.monotonic() + 60
    while client.call("status")["records_pending"] and time.monotonic() < deadline:
        time.sleep(0.05)


def one_sync(path: Path) -> float:
    """Append a block of 4 KiB to a file and sync it; returns µs."""
    fd = os.open(path, os.O_WRONLY | os.O_CREAT)
    try:
        os.lseek(fd, 0, os.SEEK_END)
        began = time.perf_counter_ns()
        os.write(fd, b"x" * 4096)
        os.fdatasync(fd)
        return (time.perf_counter_ns() - began) / 1000
    finally:
        os.close(fd)
