"""The story of one event: in order, in 80 columns, with everything it caused and nothing else."""

from __future__ import annotations

import json
import re
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from isolator.audit.record import Record
from isolator.audit.story import story_lines
from isolator.errors import NotFoundError, printable
from tests.audit.any_record import any_record
from tests.audit.conftest import Daemon
from tests.audit.test_reader import run
from tests.audit.test_service import durable


async def happen(daemon: Daemon) -> None:
    await daemon.start()
    host, broker, supervisor = [await daemon.source(n) for n in ("host", "broker", "supervisor")]
    one: dict[str, Any] = {"plugin": "slack-deploy-notifier", "run": "r1"}
    other: dict[str, Any] = {"plugin": "google-indexer", "run": "r2"}
    supervisor.record(any_record("plugin.started", reason="eager", pid=9, uid=70001), **other)
    await durable(supervisor)
    host.record(
        any_record("event.accepted", event="deploy.completed", subject="project-7", bytes=259, plugins=["a", "b"]),
        event_id="evt-1",
    )
    await durable(host)
    supervisor.record(
        any_record("plugin.started", reason="first event", pid=4711, uid=70000, milliseconds={"exec": 1.2}), **one
    )
    await durable(supervisor)
    host.record(
        any_record("event.dispatched", attempt=1, queued_us=5300, request_bytes=400),
        **one,
        event_id="evt-1",
        delivery_id="evt-1.s",
    )
    host.record(any_record("event.dispatched", attempt=1), **other, event_id="evt-0", delivery_id="evt-0.g")
    host.record(any_record("event.dispatched", attempt=1), **other, event_id="evt-1", delivery_id="evt-1.g")
    await durable(host)
    broker.record(
        any_record("net.query", name="hooks.slack.com", type="A", verdict="allowed", rule="hooks.slack.com:443"), **one
    )
    broker.record(
        any_record(
            "net.connect",
            flow=1,
            name="hooks.slack.com",
            address="198.51.100.7",
            port=443,
            verdict="allowed",
            rule="hooks.slack.com:443",
        ),
        **one,
    )
    broker.record(
        any_record(
            "net.denied",
            name=None,
            address="169.254.169.254",
            port=80,
            protocol="tcp",
            verdict="denied",
            rule="blocked-address",
        ),
        **one,
    )
    broker.record(
        any_record("net.denied", name="\u202emoc.live" + "x" * 200, address="203.0.113.5", port=25, rule="not listed"),
        **other,
    )
    await durable(broker)
    supervisor.record(any_record("syscall.denied", call="ptrace", count=3), **one)
    await durable(supervisor)
    host.record(
        any_record(
            "event.response", attempt=1, outcome="ok", status="ok", latency_us=84_210, response_bytes=30,
            response='{"status":"ok","text":"posted \x1b[31m"}',
        ), **one, event_id="evt-1", delivery_id="evt-1.s",
    )  # fmt: skip
    await durable(host)
    broker.record(
        any_record(
            "net.closed",
            flow=1,
            name="hooks.slack.com",
            address="198.51.100.7",
            port=443,
            sent=812,
            received=402,
            duration_ms=61.2,
        ),
        **one,
    )
    broker.record(any_record("net.query", name="later.example", type="A", verdict="denied"), **one)
    await durable(broker)
    await daemon.stop()


async def test_story_of_an_event_in_80_columns(daemon: Daemon) -> None:
    await happen(daemon)
    result = run(daemon, "story", "evt-1")
    assert result.exit_code == 0
    lines = result.output.splitlines()
    assert all(len(line) <= 80 and printable(line) == line and line.isascii() for line in lines)
    types = [m[1] for line in lines if (m := re.match(r" *\+\d+\.\d (?:ms|s) [AB ][* ] ([a-z.]+)", line))]
    assert types == [
        "accepted", "plugin.started", "dispatched", "dispatched", "net.query", "net.connect", "net.denied",
        "net.denied", "syscall.denied", "response", "net.closed",
    ]  # fmt: skip
    assert lines[0] == "evt-1  deploy.completed of project-7"
    text = " ".join(result.output.split())
    verdict = r" A slack-deploy-notifier: ok at the first attempt, [\d.]+ ms after; 1 connection, 3 calls denied"
    assert re.search(verdict, text)
    assert " B google-indexer: attempt 1 is under way or was cut short; 1 connection denied" in text
    assert "ok, after 84.2 ms" in text
    assert "B* net.denied" in text and "several events were in flight" in text
    assert "blocked-address" in text
    assert "later.example" not in text and "eager" not in text


async def test_story_as_json_and_of_an_unknown_event(daemon: Daemon) -> None:
    await happen(daemon)
    story = json.loads(run(daemon, "story", "evt-1", "--json").output)
    assert story["event_id"] == "evt-1"
    assert len(story["records"]) == 11
    assert isinstance(run(daemon, "story", "evt-9").exception, NotFoundError)


def story_of(
    *happened: tuple[float, str, str | None, dict[str, Any]], deliveries: list[dict[str, Any]] | None = None
) -> list[str]:
    """The story of e1 made of: seconds since it was accepted, type, plugin, data; and what the daemon knows."""
    begin = datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC)
    records = [
        Record(
            number, (begin + timedelta(seconds=after)).strftime("%Y-%m-%dT%H:%M:%S.%fZ"), type, "host", plugin, None,
            "e1", None, data, "", "", {},
        )
        for number, (after, type, plugin, data) in enumerate(happened, 1)
    ]  # fmt: skip
    return [line.text for line in story_lines("e1", records, deliveries=deliveries)]


ACCEPTED = (0.0, "event.accepted", None, {"event": "deploy.failed", "subject": "p1", "plugins": ["one"], "by": "uid:0"})


@pytest.mark.parametrize(
    ("happened", "verdict"),
    [
        ([], "one: no request to it is on record here"),
        ([(0.5, "event.dispatched", "one", {})], "one: attempt 1 is under way or was cut short"),
        (
            [(0.5, "event.dispatched", "one", {}), (0.6, "event.response", "one", {"outcome": "unknown"})],
            "one: 1 attempt failed, the last unknown; to be tried again",
        ),
        (
            [(1, "event.dispatched", "one", {}), (5000, "event.dispatched", "one", {}),
             (5001, "event.response", "one", {"outcome": "ok"})],
            "one: ok at attempt 2, 83.3 min after",
        ),
        ([(9, "event.dead", "one", {"reason": "expired", "attempts": 0})], "one: given up: expired"),
        ([(9, "event.dead", "one", {"reason": 'x "y', "attempts": 1})], 'one: given up: "x \\"y"'),
        ([(9, "event.quarantined", "one", {"reason": "crashed twice"})], "one: quarantined: crashed twice"),
        ([(8, "event.dead", "one", {}), (9, "event.replayed", "one", {"by": "uid:0"})], "one: queued again"),
    ],
)  # fmt: skip
def test_story_begins_with_the_outcome_for_each_plugin(
    happened: list[tuple[float, str, str, dict[str, Any]]], verdict: str
) -> None:
    lines = story_of(ACCEPTED, *happened)
    assert lines[:2] == ["e1  deploy.failed of p1", "  accepted 2026-01-02 03:04:05.000 UTC by uid:0"]
    assert lines[2] == f"  A  {verdict}"


def test_story_of_an_event_that_was_recorded_late_says_when_it_was_accepted() -> None:
    late = {**ACCEPTED[3], "accepted_at": "2026-01-02T03:04:04.500000Z"}
    lines = story_of((0.0, "event.dispatched", "one", {}), (0.2, "event.accepted", None, late))
    assert lines[:2] == ["e1  deploy.failed of p1", "  accepted 2026-01-02 03:04:04.500 UTC by uid:0"]
    assert lines[-1].endswith("by uid:0, recorded later")


SENT = (0.5, "event.dispatched", "one", {})
FAILED = (0.6, "event.response", "one", {"outcome": "unknown"})
DONE = (0.6, "event.response", "one", {"outcome": "ok"})


@pytest.mark.parametrize(
    ("happened", "state", "detail", "host", "verdict"),
    [
        ([], "queued", None, None, "not sent yet"),
        ([], "queued", "no host holds the plugin", None, "not sent yet: no host holds the plugin"),
        ([], "dead", "it is broken", None, "dead: it is broken"),
        ([], "ok", "on h2", "h2", "ok on h2; its records are there: isolator audit story e1 on h2"),
        ([SENT], "queued", "on h2", "h2", "queued on h2; its records are there: isolator audit story e1 on h2"),
        ([SENT, FAILED], "ok", "on h2", "h2", "ok on h2; its records are there: isolator audit story e1 on h2"),
        ([SENT, DONE], "ok", "on h2", "h2", "ok at the first attempt, 600.0 ms after"),
        ([SENT, FAILED], "retry", None, None, "1 attempt failed, the last unknown; to be tried again"),
    ],
)
def test_story_says_which_host_of_a_cluster_has_a_delivery(
    happened: list[tuple[float, str, str, dict[str, Any]]],
    state: str, detail: str | None, host: str | None, verdict: str,
) -> None:  # fmt: skip
    known = {"plugin": "one", "state": state, "detail": detail, "host": host}
    text = " ".join(" ".join(line.split()) for line in story_of(ACCEPTED, *happened, deliveries=[known]))
    assert f"A one: {verdict}" in text


def test_story_names_a_plugin_that_only_another_host_has() -> None:
    known = {"plugin": "two", "state": "ok", "detail": "on h2", "host": "h2"}
    lines = " ".join(story_of(ACCEPTED, SENT, DONE, deliveries=[known]))
    assert "A  one: ok at" in lines and "B  two: ok on h2" in lines


def test_long_text_is_wrapped_and_complete() -> None:
    name = ".".join(["x" * 60] * 4)
    lines = story_of(ACCEPTED, (90000, "net.query", "one", {"name": name, "type": "A", "verdict": "denied"}))
    assert all(len(line) <= 80 for line in lines)
    assert name in "".join(line.strip() for line in lines)
    assert any(line.lstrip().startswith("+25.0 h A  net.query") for line in lines)
