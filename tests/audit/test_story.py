"""The story of one event: in order, in 80 columns, with everything it caused and nothing else."""

from __future__ import annotations

import json
import re
from typing import Any

from isolator.audit.text import printable
from isolator.errors import NotFoundError
from tests.audit.conftest import Daemon
from tests.audit.test_reader import run
from tests.audit.test_service import settled


async def happen(daemon: Daemon) -> None:
    await daemon.start()
    host, broker, supervisor = [await daemon.source(n) for n in ("host", "broker", "supervisor")]
    one: dict[str, Any] = {"plugin": "slack-deploy-notifier", "run": "r1"}
    other: dict[str, Any] = {"plugin": "google-indexer", "run": "r2"}
    supervisor.record("plugin.started", **other, reason="eager", pid=9, uid=70001)
    await settled(supervisor)
    host.record(
        "event.accepted", event_id="evt-1", event="deploy.completed", subject="project-7", bytes=259, plugins=["a", "b"]
    )
    await settled(host)
    supervisor.record("plugin.started", **one, reason="first event", pid=4711, uid=70000, milliseconds={"exec": 1.2})
    await settled(supervisor)
    host.record(
        "event.dispatched", **one, event_id="evt-1", delivery_id="evt-1.s", attempt=1, queued_us=5300, request_bytes=400
    )
    host.record("event.dispatched", **other, event_id="evt-0", delivery_id="evt-0.g", attempt=1)
    host.record("event.dispatched", **other, event_id="evt-1", delivery_id="evt-1.g", attempt=1)
    await settled(host)
    broker.record("net.query", **one, name="hooks.slack.com", type="A", verdict="allowed", rule="hooks.slack.com:443")
    broker.record(
        "net.connect",
        **one,
        flow=1,
        name="hooks.slack.com",
        address="198.51.100.7",
        port=443,
        verdict="allowed",
        rule="hooks.slack.com:443",
    )
    broker.record(
        "net.denied",
        **one,
        name=None,
        address="169.254.169.254",
        port=80,
        protocol="tcp",
        verdict="denied",
        rule="always-blocked",
    )
    broker.record(
        "net.denied", **other, name="\u202emoc.live" + "x" * 200, address="203.0.113.5", port=25, rule="not listed"
    )
    await settled(broker)
    supervisor.record("syscall.denied", **one, call="ptrace", count=3)
    await settled(supervisor)
    host.record("event.response", **one, event_id="evt-1", delivery_id="evt-1.s", attempt=1, outcome="ok", status="ok",
                latency_us=84_210, response_bytes=30, response='{"status":"ok","text":"posted \x1b[31m"}')  # fmt: skip
    await settled(host)
    broker.record(
        "net.closed",
        **one,
        flow=1,
        name="hooks.slack.com",
        address="198.51.100.7",
        port=443,
        sent=812,
        received=402,
        duration_ms=61.2,
    )
    broker.record("net.query", **one, name="later.example", type="A", verdict="denied")
    await settled(broker)
    await daemon.stop()


async def test_story(daemon: Daemon) -> None:
    await happen(daemon)
    result = run(daemon, "story", "evt-1")
    assert result.exit_code == 0
    lines = result.output.splitlines()
    assert all(len(line) <= 80 and printable(line) == line and line.isascii() for line in lines)
    told = [m[1] for line in lines if (m := re.match(r" *\+\d+\.\d [AB ][* ] ([a-z.]+)", line))]
    assert told == [
        "accepted", "plugin.started", "dispatched", "dispatched", "net.query", "net.connect", "net.denied",
        "net.denied", "syscall.denied", "response", "net.closed",
    ]  # fmt: skip
    text = " ".join(result.output.split())
    assert "ok, after 84.2 ms" in text
    assert "B* net.denied" in text and "several events were in flight" in text
    assert "always-blocked" in text
    assert "later.example" not in text and "eager" not in text


async def test_story_as_json_and_of_nothing(daemon: Daemon) -> None:
    await happen(daemon)
    story = json.loads(run(daemon, "story", "evt-1", "--json").output)
    assert story["event_id"] == "evt-1"
    assert len(story["records"]) == 11
    assert isinstance(run(daemon, "story", "evt-9").exception, NotFoundError)
