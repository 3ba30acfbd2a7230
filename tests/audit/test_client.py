"""AuditClient: never fails, never blocks, loses no record without a gap."""

from __future__ import annotations

import asyncio
import json
import os
import socket
from pathlib import Path
from typing import Any

from isolator.audit import client as module
from isolator.audit.client import AuditClient
from isolator.ipc import channel as ipc
from tests.audit.any_record import any_record


class Writer:
    """The other end of a source socket, under the test's control."""

    def __init__(self) -> None:
        self.sock, self.theirs = ipc.pair()
        self.sock.setblocking(False)

    def read(self) -> list[dict[str, Any]]:
        records = []
        while True:
            try:
                packet = self.sock.recv(ipc.MAX_PACKET)
            except BlockingIOError:
                return records
            assert len(packet) <= ipc.MAX_PACKET
            records += [json.loads(line) for line in packet.split(b"\n")]

    def tell(self, **message: Any) -> None:
        self.sock.send(json.dumps(message).encode())


async def test_records_are_numbered_batched_and_acknowledged() -> None:
    writer = Writer()
    client = AuditClient(writer.theirs)
    for number in range(1000):
        client.record(any_record("net.query", name=str(number)), plugin="p")
    await asyncio.sleep(0)
    records = writer.read()
    assert [int(r["n"].split(":")[1]) for r in records] == list(range(1, len(records) + 1))
    writer.tell(acked=len(records))
    async with asyncio.timeout(5):
        await client.durable(within=1000 - len(records))
    assert client.acked == len(records)
    client.close()


async def test_writer_works_on_a_burst_before_the_turn_that_makes_it_ends() -> None:
    writer = Writer()
    client = AuditClient(writer.theirs)
    for number in range(1, 300):
        client.record(any_record("net.query", name=str(number)), plugin="p")
    sent = len(writer.read())
    assert 0 < sent < client.unacknowledged == 299
    await asyncio.sleep(0)
    assert sent + len(writer.read()) == 299
    client.close()


async def test_a_new_writer_gets_what_the_old_one_did_not_acknowledge_and_is_acknowledged_from_zero() -> None:
    first, second = Writer(), Writer()
    client = AuditClient(first.theirs)
    for number in range(10):
        client.record(any_record("net.query", name=str(number)), urgent=True)
    first.read()
    first.tell(acked=4)
    async with asyncio.timeout(5):
        await client.durable(within=6)
    client.reconnect(second.theirs)
    again = second.read()
    assert [r["data"]["name"] for r in again] == [str(n) for n in range(4, 10)]
    second.tell(acked=6)
    async with asyncio.timeout(5):
        await client.durable()
    assert client.sent == client.acked == 10
    client.close()


async def test_record_is_waited_for_and_no_later_one() -> None:
    writer = Writer()
    client = AuditClient(writer.theirs)
    client.record(any_record("net.query", name="first"), urgent=True)
    waiting = asyncio.create_task(client.durable())
    await asyncio.sleep(0)
    client.record(any_record("net.query", name="later"), urgent=True)
    writer.tell(acked=1)
    async with asyncio.timeout(5):
        await waiting
    client.close()


async def test_record_that_is_no_json_or_too_long_becomes_a_gap() -> None:
    writer = Writer()
    client = AuditClient(writer.theirs)
    circle: list[Any] = []
    circle.append(circle)
    client.record(any_record("net.query", value=float("nan")))
    client.record(any_record("net.query", value=circle))
    client.record(any_record("net.query", value="x" * (2 * ipc.MAX_PACKET)))
    client.record(any_record("net.query", value=Path("/fine")))
    await asyncio.sleep(0)
    records = writer.read()
    assert [r["type"] for r in records] == ["audit.gap", "audit.gap", "audit.gap", "net.query"]
    assert records[3]["data"] == {"value": "/fine"}
    client.close()


async def test_record_beyond_a_full_buffer_is_counted_and_reported_as_a_gap(monkeypatch: Any) -> None:
    monkeypatch.setattr(module, "MAX_PENDING", 10)
    writer = Writer()
    client = AuditClient(None)
    for number in range(15):
        client.record(any_record("net.query", name=str(number)))
    assert client.lost == 5
    client.reconnect(writer.theirs)
    writer.read()
    writer.tell(acked=10)
    async with asyncio.timeout(5):
        await client.durable()
    client.record(any_record("net.query", name="after"))
    await asyncio.sleep(0)
    gap, after = writer.read()
    assert (gap["type"], gap["data"]["count"]) == ("audit.gap", 5)
    assert after["data"]["name"] == "after"
    client.close()


async def test_flushed_waits_for_a_writer_that_is_behind() -> None:
    writer = Writer()
    client = AuditClient(writer.theirs)
    for number in range(5000):
        client.record(any_record("net.query", name="x" * 500 + str(number)))
    client.record(any_record("event.dispatched"), urgent=True)
    waiting = asyncio.create_task(client.flushed())
    await asyncio.sleep(0.05)
    assert not waiting.done()
    seen = 0
    async with asyncio.timeout(10):
        while not waiting.done():
            seen += len(writer.read())
            await asyncio.sleep(0)
    seen += len(writer.read())
    assert seen == 5001
    client.close()


async def test_writable_waits_while_the_writer_is_blocked() -> None:
    writer = Writer()
    client = AuditClient(writer.theirs)
    writer.tell(blocked="disk full")
    async with asyncio.timeout(5):
        await client._until(lambda: client.blocked is not None)
    waiting = asyncio.create_task(client.writable())
    await asyncio.sleep(0)
    assert not waiting.done()
    writer.tell(blocked=None)
    async with asyncio.timeout(5):
        await waiting
    client.close()


async def test_who_waits_for_the_trail_or_a_block_goes_on_as_the_writer_goes_away() -> None:
    writer = Writer()
    client = AuditClient(writer.theirs)
    client.record(any_record("net.query"), urgent=True)
    waiting = asyncio.create_task(client.durable(or_blocked=True))
    await asyncio.sleep(0)
    writer.sock.close()
    async with asyncio.timeout(5):
        await waiting
    assert client.unacknowledged == 1
    client.close()


async def test_writer_that_goes_away_costs_no_record() -> None:
    writer = Writer()
    client = AuditClient(writer.theirs)
    writer.sock.close()
    for _ in range(100):
        client.record(any_record("net.query"), urgent=True)
    again = Writer()
    client.reconnect(again.theirs)
    assert len(again.read()) == 100
    assert isinstance(again.sock, socket.socket)
    client.close()


async def test_client_that_takes_another_over_goes_on_with_its_numbers_and_records() -> None:
    writer = Writer()
    old = AuditClient(writer.theirs)
    for number in range(6):
        old.record(any_record("net.query", name=str(number)), urgent=True)
    before = [one["n"] for one in writer.read()]
    writer.tell(acked=2)
    async with asyncio.timeout(5):
        await old.durable(within=4)
    state = old.hand_over()
    writer.tell(acked=5)  # comes during the exec
    new = AuditClient(None)
    new.adopt(state.__class__.from_json(state.to_json() | {"socket": os.dup(state.socket)}, "state"))
    old.close()
    new.record(any_record("net.query", name="6"), urgent=True)
    assert [one["n"] for one in writer.read()] == [f"{before[0].split(':')[0]}:7"]
    async with asyncio.timeout(5):
        await new.durable(within=2)
    assert new.acked == 5
    writer.tell(acked=7)
    async with asyncio.timeout(5):
        await new.durable()
    new.close()
