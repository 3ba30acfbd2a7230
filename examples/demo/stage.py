"""Stage of the demo, shared by its steps: the daemon, the pretend internet, the trail, and the promises so far."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import internet
import report
from daemon import Daemon, DemoError, Record, Trail, caused_by, event_id_of
from report import Promise

NOTIFIER = "slack-deploy-notifier"
HOSTILE = "hostile"
EXAMPLES = Path(__file__).resolve().parents[1]
DATABASE_PORT = 5432


@dataclass
class Demo:
    """Everything the steps share."""

    root: Path
    work: Path
    daemon: Daemon
    net: internet.Internet
    trail: Trail
    database_contacts: list[str]
    promises: list[Promise] = field(default_factory=list)
    deliveries: dict[str, list[float]] = field(default_factory=dict)
    """Milliseconds of the notifier's deliveries, by the time of the demo they belong to."""
    story: str = ""

    def promise(self, text: str, held: bool, evidence: str) -> None:
        self.promises.append(Promise(text, held, evidence))

    def pid_of_running(self, plugin: str) -> int | None:
        """The process of a plugin that was started, by its number on the host."""
        started = self.trail.kinds("plugin.started", plugin)
        return int(started[-1]["data"]["pid"]) if started else None

    def pid_of(self, plugin: str) -> int:
        """The same of one that must have been started; raises DemoError."""
        pid = self.pid_of_running(plugin)
        if pid is None:
            raise DemoError(f"the audit has no plugin.started of {plugin}")
        return pid

    def deliver(self, name: str, payload: dict[str, Any], when: str, *, show: bool = False) -> str:
        """Emit one event to the notifier, wait for it, remember its latency; its id."""
        words = ["event", "emit", name, json.dumps(payload), "--wait"]
        if show:
            code, text = 0, self.daemon.show(*words)
            event_id = text.split()[0]
        else:
            code, text = self.daemon.run(*words, "--json")
            event_id = event_id_of(text)
        done = self.trail.wait(lambda r: response_of(r, event_id, NOTIFIER), 20)
        if code != 0:
            raise DemoError(f"{name} was not delivered to {NOTIFIER}: {text.strip()[:300]}")
        if done is None:
            raise DemoError(
                f"no event.response of {event_id} in 'audit tail -f' ({self.trail.words or 'it is silent'})"
            )
        asked = next(r for r in self.trail.of(event_id) if r["type"] == "event.dispatched" and r["plugin"] == NOTIFIER)
        took = done["data"]["latency_us"] / 1000
        self.deliveries.setdefault(when, []).append(took)
        if show:
            queued = (asked["data"]["queued_us"] or 0) / 1000
            report.say(f"It waited {queued:.1f} ms for the plugin, which answered in {took:.1f} ms.")
        return event_id


def response_of(record: Record, event_id: str, plugin: str) -> bool:
    """Is it the plugin's answer to that event, or the record that there was none?"""
    return record["type"] == "event.response" and record.get("plugin") == plugin and caused_by(record, event_id)


def deploy(number: int) -> dict[str, Any]:
    return {"project_id": "shop", "deployment_id": f"dep_{number:03}"}
