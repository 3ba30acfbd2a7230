"""Bulk through the broker: whole, in turns, and held back with its plugin."""

from __future__ import annotations

import asyncio
import random
import socket
import tracemalloc

import pytest

from isolator.base.pacing import TokenBucket
from isolator.broker import relay
from isolator.broker.relay import Pipe, Scratch
from isolator.broker.turns import HOLD, Turns
from isolator.ipc.fence import LOST, Fence
from isolator.linux.boottime import boottime
from tests.support.timeouts import seconds

DATA = random.Random(1).randbytes(6 << 20)


class Flow:
    """One direction: what is written to ``source`` comes out of ``sink``."""

    def __init__(self, scratch: Scratch | None = None, turns: Turns | None = None) -> None:
        self.source, inner = socket.socketpair()
        outer, self.sink = socket.socketpair()
        self.sockets = (self.source, inner, outer, self.sink)
        for sock in self.sockets:
            sock.setblocking(False)
            # Room for more than one read at a time, so that reads are full.
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4 * relay.CHUNK)
        self.fence, self.scratch = Fence(), scratch or Scratch()
        self.pipe = Pipe(inner, outer, self.scratch, self.fence, turns or Turns())
        self.pipe.carry()
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
        for sock in self.sockets:
            sock.close()


class _Watched:
    """A socket that notes how much is read of it at a time."""

    def __init__(self, sock: socket.socket, sizes: set[int]) -> None:
        self._sock, self._sizes = sock, sizes

    def recv_into(self, buffer: memoryview, size: int) -> int:
        self._sizes.add(size)
        return self._sock.recv_into(buffer, size)


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


async def test_bytes_that_wait_are_counted_with_the_piece_that_they_hold_in_memory() -> None:
    flow, loop = Flow(), asyncio.get_running_loop()
    for sock in flow.sockets[2:]:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, relay.CHUNK // 8)
    tracemalloc.start()
    try:
        before, _ = tracemalloc.get_traced_memory()
        await loop.sock_sendall(flow.source, DATA[: relay.CHUNK])
        got, smallest = 0, relay.CHUNK
        async with asyncio.timeout(seconds(30)):
            while got < relay.CHUNK:
                got += len(await loop.sock_recv(flow.sink, 10_000))
                if rest := len(flow.pipe._rest):
                    smallest = min(smallest, rest)
                    held = tracemalloc.get_traced_memory()[0] - before
                    assert held < flow.scratch.waiting + relay.CHUNK // 4
        assert 0 < smallest < relay.CHUNK // 2
        assert flow.scratch.waiting == 0
        assert tracemalloc.get_traced_memory()[0] - before < relay.CHUNK // 4
    finally:
        tracemalloc.stop()
    flow.close()


async def test_cage_whose_connections_all_stall_leaves_others_their_large_reads() -> None:
    """As many as a cage may have open by default (``connects_open``), and the peers of none take what it sends."""
    scratch, turns = Scratch(), Turns(TokenBucket(1e9, 1e9))
    stalled = [Flow(scratch, turns) for _ in range(64)]
    writing = [asyncio.create_task(flow.write(DATA)) for flow in stalled]
    async with asyncio.timeout(seconds(30)):
        while not all(flow.pipe._rest for flow in stalled):  # noqa: ASYNC110 # a few turns
            await asyncio.sleep(0)
    assert scratch.waiting < relay.SHARE + relay.CHUNK + 64 * relay.SMALL < relay.BUDGET
    other = Flow(scratch, Turns())
    sizes = set[int]()
    other.pipe._source = _Watched(other.pipe._source, sizes)  # type: ignore[assignment]
    writing.append(asyncio.create_task(other.write(DATA)))
    assert await other.read() == DATA
    assert sizes == {relay.CHUNK}
    for task in writing:
        task.cancel()
    for flow in (*stalled, other):
        flow.close()
    assert scratch.waiting == turns.held == 0


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
