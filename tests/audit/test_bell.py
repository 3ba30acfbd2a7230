"""The bell: a host's records are with the kernel before what they tell of, and wake the writer behind it."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path

import pytest

from isolator.audit import writer as module
from isolator.audit.client import AuditClient
from isolator.audit.writer import Writer
from isolator.ipc import channel as ipc
from isolator.ipc.packet import send_packet
from isolator.ipc.succession import Departure, Descriptors
from tests.audit.any_record import any_record
from tests.audit.own_writer import written

TURNS = 20
"""Turns of the loop, in the first of which a writer that listens to the socket would have read it."""


def _record(client: AuditClient) -> None:
    client.record(any_record("event.accepted"), event_id="ev", urgent=True)


async def _rings(writer: Writer, client: AuditClient) -> None:
    """Return once the writer has heard the bell, and read all that there was."""
    while not writer._sources[0]._rings:
        _record(client)
        await client.durable()
    await writer.flush()


async def test_bell_is_rung_in_the_turn_behind_that_of_the_record() -> None:
    writer, ours = ipc.pair()
    client = AuditClient(ours)
    bell, theirs = os.pipe2(os.O_NONBLOCK)
    send_packet(writer, b"{}", [theirs])
    os.close(theirs)
    async with asyncio.timeout(20):
        while client._bell < 0:  # noqa: ASYNC110 # the loop has to read it
            await asyncio.sleep(0)
        _record(client)
        assert writer.recv(ipc.MAX_PACKET)
        with pytest.raises(BlockingIOError):
            os.read(bell, 1)
        await asyncio.sleep(0)
        assert os.read(bell, 2) == b"\0"
    client.close()
    assert os.read(bell, 1) == b""
    os.close(bell)
    writer.close()


async def test_packet_of_a_host_that_rings_wakes_nobody_before_it_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_FEW", 0)  # no socket is left alone
    async with written(tmp_path) as (writer, client):
        await _rings(writer, client)
        ring = client._ring
        monkeypatch.setattr(client, "_ring", lambda: None)
        before = writer._sources[0].received
        _record(client)
        for _ in range(TURNS):
            await asyncio.sleep(0)
        assert writer._sources[0].received == before
        ring()
        await client.durable()


async def test_records_of_a_host_that_ended_before_it_rang_are_in_the_trail(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_FEW", 0)
    async with written(tmp_path) as (writer, client):
        await _rings(writer, client)
        monkeypatch.setattr(client, "_ring", lambda: None)
        before = writer._trail.seq
        _record(client)
        client.close()
        while writer._trail.seq == before:  # noqa: ASYNC110 # a thread of the writer's has to write
            await asyncio.sleep(0)


async def test_host_in_the_place_of_another_is_listened_to_and_rings(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_FEW", 0)
    async with written(tmp_path) as (writer, client):
        await _rings(writer, client)
        departure = Departure()
        state = client.pass_on(departure)
        successor = AuditClient(None)
        successor.take_over(state, Descriptors(departure._fds.release_all()))
        while successor._bell < 0:
            _record(successor)
            await successor.durable()
        await _rings(writer, successor)
        successor.close()


async def test_host_is_offered_a_bell_by_the_writer_in_the_place_of_another(tmp_path: Path) -> None:
    async with written(tmp_path) as (writer, client):
        await _rings(writer, client)
        departure = Departure()
        state = writer._sources[0].pass_on(departure)
        source = type(writer._sources[0]).taken_over(state, Descriptors(departure._fds.release_all()))
        writer._sources[0] = source
        writer._update_reading()
        assert not source._rings
        await _rings(writer, client)
