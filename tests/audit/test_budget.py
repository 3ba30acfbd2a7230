"""Budgets: noise is counted, what matters is written, and what was there before a flood is there after it."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import pytest

from isolator.audit import files
from isolator.audit.budget import BURST, CALLERS, LABELS, OTHER, RATE, Budgets
from isolator.audit.client import AuditClient
from isolator.audit.record import Incoming
from isolator.audit.schema import RECORDS, RecordData
from tests.audit.any_record import any_record
from tests.audit.conftest import Daemon
from tests.audit.test_service import check, durable
from tests.support.timeouts import seconds

FLOOD = 10_000
SUMMED = {
    "plugin.health", "event.dispatched", "event.response", "net.query", "net.connect", "net.closed", "net.denied",
    "syscall.denied", "fs.denied", "api.called", "control.called", "tool.called",
}  # fmt: skip
"""All types of which the writer may count records; a change here is a change of the trail's promise."""


def test_types_that_may_be_summed_up_are_these() -> None:
    assert {type for type, kind in RECORDS.items() if kind.SUMMED is not None} == SUMMED


def refusal(uid: int, verdict: str = "denied") -> RecordData:
    return any_record("control.called", verb="plugin.list", uid=uid, pid=1, role=None, verdict=verdict)


async def send(
    client: AuditClient, records: Callable[[int], RecordData], count: int, plugin: str | None = None
) -> None:
    for number in range(count):
        client.record(records(number), plugin=plugin)
        if number % 2000 == 0:
            async with asyncio.timeout(seconds(30)):
                await client.durable(within=10_000)
    await durable(client)


async def test_refusals_beyond_the_budget_of_a_caller_are_summed_up(daemon: Daemon) -> None:
    await daemon.start()
    host = await daemon.source("host")
    await send(host, lambda _: refusal(1001), FLOOD)
    host.record(refusal(1002))
    host.record(refusal(1001, "ok"))
    host.record(refusal(1001, "unknown"))
    await durable(host)
    await daemon.flush()
    await daemon.stop()
    of = [r["data"] for r in daemon.of_type("control.called")]
    written = [d for d in of if d["uid"] == 1001 and d["verdict"] == "denied"]
    summaries = [r["data"] for r in daemon.of_type("audit.summary")]
    assert BURST <= len(written) < FLOOD
    assert len(written) + sum(s["count"] for s in summaries) == FLOOD
    assert {(s["type"], s["source"], s["uid"]) for s in summaries} == {("control.called", "host", 1001)}
    assert all(s["by"] == {"plugin.list": s["count"]} and s["first"] <= s["last"] for s in summaries)
    # Another caller's refusal, what was done, and what may have been, stand for themselves.
    others = [(1002, "denied"), (1001, "ok"), (1001, "unknown")]
    assert [(d["uid"], d["verdict"]) for d in of if d not in written] == others
    assert not daemon.of_type("audit.gap") and not check(daemon).misfits


@pytest.mark.parametrize(
    ("source", "type", "data"),
    [
        ("host", "api.called", {"method": "whoami", "verdict": "granted"}),
        ("host", "event.dispatched", {"attempt": 1, "busy": 7}),
        ("host", "event.response", {"attempt": 1, "outcome": "busy"}),
        ("host", "plugin.health", {"ok": False, "detail": "protocol"}),
        ("broker", "net.query", {"rule": "no-grant", "name": "x"}),
        ("broker", "net.connect", {"rule": "x:1", "name": "x"}),
        ("broker", "net.closed", {"name": "x"}),
        ("broker", "net.denied", {"rule": "port", "count": 3}),
        ("supervisor", "syscall.denied", {"call": "ptrace", "count": 2}),
        ("supervisor", "fs.denied", {"path": "/x", "count": 1, "why": "y"}),
    ],
)
async def test_noise_of_a_plugin_is_summed_up(daemon: Daemon, source: str, type: str, data: dict[str, Any]) -> None:
    await daemon.start()
    sender = await daemon.source(source)
    await send(sender, lambda _: any_record(type, **data), FLOOD // 2, plugin="noisy")
    sender.record(any_record(type, **data), plugin="quiet")
    await durable(sender)
    await daemon.stop()
    records, summaries = daemon.of_type(type), daemon.of_type("audit.summary")
    assert len(records) < FLOOD // 2
    assert len(records) - 1 + sum(s["data"]["count"] for s in summaries) == FLOOD // 2
    assert {s["plugin"] for s in summaries} == {"noisy"}
    times = data.get("count", 1)
    assert all(s["data"].get("total", s["data"]["count"]) == times * s["data"]["count"] for s in summaries)
    assert [r["plugin"] for r in records][-1] == "quiet"


@pytest.mark.parametrize(
    ("source", "type", "data"),
    [
        ("host", "event.accepted", {}),
        ("host", "event.dispatched", {"attempt": 1}),
        ("host", "event.response", {"attempt": 1, "outcome": "ok"}),
        ("host", "control.called", {"verb": "plugin.stop", "uid": 0, "verdict": "ok"}),
        ("host", "config.changed", {"names": ["a"]}),
        ("supervisor", "plugin.started", {"pid": 1}),
        ("supervisor", "plugin.crashed", {"cause": "exit"}),
    ],
)
async def test_changes_and_events_are_never_summed_up(
    daemon: Daemon, source: str, type: str, data: dict[str, Any]
) -> None:
    await daemon.start()
    sender = await daemon.source(source)
    await send(sender, lambda _: any_record(type, **data), FLOOD // 2, plugin="p")
    await daemon.stop()
    assert len(daemon.of_type(type)) == FLOOD // 2
    assert not daemon.of_type("audit.summary")


async def test_next_writer_does_not_take_counted_records_for_lost_ones(daemon: Daemon) -> None:
    await daemon.start()
    host = await daemon.source("host")
    await send(host, lambda _: refusal(1001), FLOOD // 2)
    await daemon.stop()
    counted = sum(r["data"]["count"] for r in daemon.of_type("audit.summary"))
    assert counted > 0
    await daemon.start()
    await daemon.source("host", host)
    host.record(any_record("event.accepted"))
    await durable(host)
    await daemon.stop()
    assert not daemon.of_type("audit.gap")


async def test_past_outlasts_a_flood_and_the_disk_stays_bounded(daemon: Daemon) -> None:
    """Every kind of noise at once, many times what the trail has room for."""
    room = 4 << 20
    await daemon.start(rotate_size=1 << 20, keep_files=4)
    host, broker = await daemon.source("host"), await daemon.source("broker")
    host.record(any_record("config.changed", names=["before"], filler="x" * 200), plugin="p")
    await durable(host)
    for _ in range(3):
        await send(host, lambda n: refusal(1000 + n % 300), FLOOD)
        await send(host, lambda n: any_record("api.called", method=f"m{n}", verdict="unknown"), FLOOD, plugin="p")
        await send(broker, lambda n: any_record("net.denied", rule="port", port=n), FLOOD, plugin="p")
    host.record(any_record("config.changed", names=["after"]), plugin="p")
    await durable(host)
    await daemon.stop()
    assert sum(path.stat().st_size for path in files.trail(daemon.paths.audit_log)) < room + (1 << 20)
    assert [r["data"]["names"] for r in daemon.of_type("config.changed")] == [["before"], ["after"]]
    written = len([r for r in daemon.records() if r["type"] in SUMMED])
    assert written + sum(r["data"]["count"] for r in daemon.of_type("audit.summary")) == 9 * FLOOD
    report = check(daemon)
    assert not report.misfits and report.first == 1


async def test_trail_that_fills_up_raises_an_alarm_and_stays_bounded(daemon: Daemon) -> None:
    """Records that are never summed up: the room is the limit, also for what is younger than it should get."""
    await daemon.start(rotate_size=65536, keep_files=4)
    host, broker = await daemon.source("host"), await daemon.source("broker")
    told: list[str | None] = []
    host.on_alarm = told.append
    await send(host, lambda n: any_record("event.accepted", number=n, filler="x" * 200), 2000)
    assert host.alarm is not None and "7 days are wanted" in host.alarm and "keep_files" in host.alarm
    assert told and told[-1] == host.alarm
    broker.record(any_record("net.query"))
    await durable(broker)
    assert broker.alarm is not None  # every process knows
    late = await daemon.source("supervisor")
    late.record(any_record("resources"))
    await durable(late)
    assert late.alarm is not None  # one that comes later, too
    await daemon.stop()
    assert len(files.rotated(daemon.paths.audit_log)) <= 4
    report = check(daemon)
    assert not report.misfits and report.retired > 0


@pytest.mark.parametrize(("min_age", "kept"), [(0.0, 2), (3600.0, 5)])
async def test_files_younger_than_min_age_are_kept_within_the_room(daemon: Daemon, min_age: float, kept: int) -> None:
    await daemon.start(rotate_age=0.05, keep_files=2, min_age=min_age)
    host = await daemon.source("host")
    while not (rotated := files.rotated(daemon.paths.audit_log)) or (files.first_of(rotated[-1]) or 0) < 20:
        host.record(any_record("event.accepted"))
        await durable(host)
        await asyncio.sleep(0.06)  # a file gets older than it may, so that the next record ends it
    await daemon.stop()
    found = files.rotated(daemon.paths.audit_log)
    assert len(found) == 2 if kept == 2 else len(found) >= kept
    assert host.alarm is None  # the room is not nearly taken
    assert not check(daemon).misfits


class Clock:
    now = 1000.0

    def __call__(self) -> float:
        return self.now


def called(uid: Any, *, plugin: str | None = None, verb: str = "x") -> Incoming:
    data = {"verb": verb, "uid": uid, "verdict": "denied"}
    return Incoming(
        "2026-01-02T03:04:05.000006Z", "control.called", plugin, data=data, source="host", number="00000000:1"
    )


def test_user_with_thousands_of_uids_has_the_budget_of_a_few() -> None:
    budgets = Budgets(Clock())
    written = sum(budgets.admit(called(uid), "host") for uid in range(100_000, 165_000) for _ in range(2))
    assert written <= 4 * BURST
    summaries = budgets.due(everything=True)
    assert len(summaries) <= CALLERS + 1
    assert written + sum(s.data["count"] for s in summaries) == 130_000


def test_budget_comes_back_and_a_summary_waits_for_its_window() -> None:
    clock = Clock()
    budgets = Budgets(clock)
    while budgets.admit(called(7), "host"):
        pass
    assert budgets.counting and budgets.due() == []
    clock.now += 1
    (summary,) = budgets.due()
    assert (summary.data["count"], budgets.counting) == (1, False)
    assert sum(budgets.admit(called(7), "host") for _ in range(1000)) == RATE
    clock.now += BURST
    assert sum(budgets.admit(called(7), "host") for _ in range(2 * int(BURST))) == BURST


def test_tight_budgets_write_less_and_sum_up_less_often() -> None:
    clock = Clock()
    budgets = Budgets(clock)
    budgets.tighten(True)
    written = sum(budgets.admit(called(7), "host") for _ in range(1000))
    assert 0 < written <= BURST / 10
    clock.now += 2
    assert budgets.due() == []
    clock.now += 60
    (summary,) = budgets.due()
    assert summary.data["count"] == 1000 - written
    budgets.tighten(False)
    assert sum(budgets.admit(called(7), "host") for _ in range(2 * int(BURST))) == BURST


def test_names_that_a_plugin_chooses_do_not_grow_a_summary() -> None:
    budgets = Budgets(Clock())
    while budgets.admit(called(7), "host"):
        pass
    for number in range(1000):
        budgets.admit(called(7, plugin=f"p{number}", verb=f"{number:04}" * 100), "host")
    (summary,) = budgets.due(everything=True)
    assert len(summary.data["by"]) == LABELS + 1 and sum(summary.data["by"].values()) == 1001
    assert OTHER in summary.data["by"] and max(map(len, summary.data["by"])) == 80
    assert summary.plugin is None  # of several


@pytest.mark.parametrize("uid", [None, "7", 1.5])
def test_caller_that_is_no_uid_is_counted_with_the_rest(uid: Any) -> None:
    budgets = Budgets(Clock())
    for _ in range(2 * int(BURST)):
        budgets.admit(called(uid), "host")
    (summary,) = budgets.due(everything=True)
    assert "uid" not in summary.data
