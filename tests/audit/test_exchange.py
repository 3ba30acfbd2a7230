"""The audit process is exchanged: one chain, no record lost or doubled, each with its cause, one writer at a time."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path

import pytest

from isolator.audit import files
from isolator.audit.seal import load_public
from isolator.audit.verify import verify
from tests.audit.any_record import any_record
from tests.audit.conftest import Daemon

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="needs root to start a process under another user")


async def test_chain_goes_on_over_exchanges_and_no_record_is_lost_or_doubled(daemon: Daemon) -> None:
    await daemon.start(seal_records=50)
    host, broker = await daemon.source("host"), await daemon.source("broker")
    count = 0

    async def record() -> None:
        nonlocal count
        while True:
            host.record(any_record("event.accepted", bytes=count), event_id=f"e{count}")
            broker.record(any_record("net.query"), plugin="p", run="r")
            count += 1
            await asyncio.sleep(0.001)

    recording = asyncio.create_task(record())
    for _ in range(4):
        await daemon.renew()
        await asyncio.sleep(0.1)
    recording.cancel()
    async with asyncio.timeout(20):
        await asyncio.gather(host.durable(), broker.durable())
    assert await daemon.stop() == 0
    report = verify(files.trail(daemon.paths.audit_log), load_public(daemon.paths.audit_log / "public.pem"))
    assert not report.misfits, report.misfits
    assert [r["event_id"] for r in daemon.of_type("event.accepted")] == [f"e{n}" for n in range(count)]
    assert not daemon.of_type("audit.gap")
    counted = sum(r["data"]["count"] for r in daemon.of_type("audit.summary"))
    assert len(daemon.of_type("net.query")) + counted == count


async def test_records_find_their_event_across_an_exchange(daemon: Daemon) -> None:
    await daemon.start()
    host, broker = await daemon.source("host"), await daemon.source("broker")
    names = {"plugin": "p", "run": "r"}
    host.record(any_record("event.dispatched"), event_id="e1", delivery_id="e1.p", **names)
    await host.durable()
    broker.record(any_record("net.connect", flow="f1"), **names)
    await broker.durable()
    await daemon.renew()
    broker.record(any_record("net.connect", flow="f2"), **names)
    await broker.durable()
    host.record(any_record("event.response"), event_id="e1", delivery_id="e1.p", **names)
    await host.durable()
    await daemon.renew()
    for flow in ("f1", "f2"):
        broker.record(any_record("net.closed", flow=flow), **names)
    broker.record(any_record("net.connect", flow="f3"), **names)
    await broker.durable()
    found = [(r["type"], r["data"]["flow"], r["event_id"]) for r in daemon.of_type("net.connect", "net.closed")]
    assert found == [
        ("net.connect", "f1", "e1"), ("net.connect", "f2", "e1"), ("net.closed", "f1", "e1"),
        ("net.closed", "f2", "e1"), ("net.connect", "f3", None),
    ]  # fmt: skip


async def test_trail_has_one_writer_at_a_time_in_an_exchange(daemon: Daemon) -> None:
    await daemon.start()
    host = await daemon.source("host")
    for _ in range(5):
        host.record(any_record("event.accepted"), event_id="e")
        old = daemon.process
        assert old is not None
        await daemon.renew()
        assert daemon.process is not None and _writes(daemon.process.pid, daemon.paths.audit_log) == 1
        await host.durable()
    assert not daemon.of_type("audit.gap"), "a writer that finds the file longer than it knows says so"


def _writes(pid: int, folder: Path) -> int:
    links = [os.readlink(f"/proc/{pid}/fd/{fd}") for fd in os.listdir(f"/proc/{pid}/fd")]
    return sum(link == str(folder / files.LIVE) for link in links)
