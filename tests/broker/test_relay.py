"""Bulk through the broker: whole, in turns, and held back with its plugin."""

from __future__ import annotations

import asyncio
import random
import socket

import pytest

from isolator.broker import relay
from isolator.broker.relay import Pipe, Scratch
from isolator.broker.turns import HOLD, Turns
from isolator.ipc.fence import LOST, Fence
from isolator.linux.boottime import boottime
from tests.support.timeouts import seconds

DATA = random.Random(1).randbytes(6 << 20)


class Flow:
    """One direction: what is written to ``source`` comes out of ``sink``."""

    def __init__(self) -> None:
        self.source, inner = socket.socketpair()
        outer, self.sink = socket.socketpair()
        self.sockets = (self.source, inner, outer, self.sink)
        for sock in self.sockets:
            sock.setblocking(False)
            # Room for more than one read at a time, so that reads are full.
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4 * relay.CHUNK)
        self.fence, self.scratch = Fence(), Scratch()
        self.pipe = Pipe(inner, outer, self.scratch, self.fence, Turns())
        self.pipe.start()

    async def write(self, data: bytes) -> None:
        await asyncio.get_running_loop().sock_sendall(self.source, data)
        self.source.shutdown(socket.SHUT_WR)

    async def read(self) -> bytes:
        """Everything to the end, a piece at a time."""
        got, loop = bytearray(), asyncio.get_running_loop()
        async with asyncio.timeout(seconds(30)):
            while part := await loop.sock_recv(self.sink, 100_000):
                got += part
        return bytes(got)

    def close(self) -> None:
        self.pipe.stop()
        assert self.scratch.waiting == 0
        for sock in self.sockets:
            sock.close()


async def test_bulk_comes_through_whole() -> None:
    flow = Flow()
    writing = asyncio.create_task(flow.write(DATA))
    assert await flow.read() == DATA
    await writing
    assert flow.pipe.total == len(DATA)
    flow.close()


async def test_bulk_is_read_until_the_part_of_a_turn_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    now, sends = [0.0], [0]
    read, send = Pipe._read_some, Pipe._send

    def counted(self: Pipe, end: float) -> None:
        sends[0] = 0
        read(self, end)
        assert sends[0] <= 1

    def slow(self: Pipe, data: memoryview) -> bool:
        sends[0] += 1
        now[0] += HOLD
        return send(self, data)

    monkeypatch.setattr(relay, "thread_time", lambda: now[0])
    monkeypatch.setattr(Pipe, "_read_some", counted)
    monkeypatch.setattr(Pipe, "_send", slow)
    flow = Flow()
    writing = asyncio.create_task(flow.write(DATA))
    assert await flow.read() == DATA
    await writing
    flow.close()


async def test_bulk_waits_past_the_deadline_and_goes_on_after_it(monkeypatch: pytest.MonkeyPatch) -> None:
    flow, send = Flow(), Pipe._send

    def closing(self: Pipe, data: memoryview) -> bool:
        if flow.fence.until is None and len(data) == relay.CHUNK:
            flow.fence.move(LOST)
        return send(self, data)

    monkeypatch.setattr(Pipe, "_send", closing)
    writing = asyncio.create_task(flow.write(DATA))
    reading = asyncio.create_task(flow.read())
    async with asyncio.timeout(seconds(10)):
        while flow.fence.until is None:  # noqa: ASYNC110 # it is moved within a call of the loop's
            await asyncio.sleep(0)
    passed = flow.pipe.total
    assert flow.scratch.waiting > 0
    for _ in range(100):
        await asyncio.sleep(0)
    assert flow.pipe.total == passed < len(DATA)
    flow.fence.move(boottime() + 600)
    assert await reading == DATA
    await writing
    flow.close()
