"""Bulk through the broker: the kernel moves it through one pipe that all flows share, so nothing may be left in it."""

from __future__ import annotations

import asyncio
import os
import random
import socket
from collections.abc import AsyncIterator, Callable

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

    def __init__(self, scratch: Scratch) -> None:
        self.source, inner = socket.socketpair()
        outer, self.sink = socket.socketpair()
        self.sockets = (self.source, inner, outer, self.sink)
        for sock in self.sockets:
            sock.setblocking(False)
            # Room for more than one read at a time, so that reads are full.
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4 * relay.CHUNK)
        self.fence = Fence()
        self.pipe = Pipe(inner, outer, scratch, self.fence, Turns())
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


@pytest.fixture
async def scratch(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Scratch]:
    """A scratch whose pipe was used by the end of the test, and is empty."""
    made = Scratch()
    yield made
    assert made.waiting == 0
    assert "bulk" in vars(made), "nothing was moved by the kernel"
    with pytest.raises(BlockingIOError):
        os.read(made.bulk[0], 1)
    made.close()


async def test_bulk_comes_through_whole(scratch: Scratch) -> None:
    flow = Flow(scratch)
    writing = asyncio.create_task(flow.write(DATA))
    assert await flow.read() == DATA
    await writing
    assert flow.pipe.total == len(DATA)
    flow.close()


def once_in_the_pipe(scratch: Scratch, patch: pytest.MonkeyPatch, act: Callable[[], object]) -> None:
    """Call ``act`` when bytes are in the pipe for the first time, before they leave it."""
    splice, left = os.splice, [act]

    def splice_and_act(*arguments: int, flags: int) -> int:
        moved = splice(*arguments, flags=flags)
        if left and arguments[1] == scratch.bulk[1]:
            left.pop()()
        return moved

    patch.setattr(os, "splice", splice_and_act)


async def test_nothing_of_a_flow_that_broke_off_is_in_the_next(
    scratch: Scratch, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken = Flow(scratch)
    once_in_the_pipe(scratch, monkeypatch, broken.sink.close)
    writing = asyncio.create_task(broken.write(bytes(4 << 20)))
    reading = asyncio.create_task(broken.read())
    async with asyncio.timeout(seconds(10)):
        await broken.pipe.ended
    assert isinstance(broken.pipe.error, BrokenPipeError)
    for task in (writing, reading):
        task.cancel()
    await asyncio.gather(writing, reading, return_exceptions=True)
    flow = Flow(scratch)
    writing = asyncio.create_task(flow.write(DATA))
    assert await flow.read() == DATA
    await writing
    flow.close()
    broken.close()


async def test_bulk_is_moved_until_the_part_of_a_turn_is_used_and_not_read_in_the_next(
    scratch: Scratch, monkeypatch: pytest.MonkeyPatch
) -> None:
    splice, now, moves, sizes = os.splice, [0.0], [0], list[int]()
    move, read = Pipe._move, Pipe._send

    def slow(*arguments: int, flags: int) -> int:
        moves[0] += arguments[1] == scratch.bulk[1]
        now[0] += HOLD
        return splice(*arguments, flags=flags)

    def counted(self: Pipe, end: float) -> None:
        moves[0] = 0
        move(self, end)
        assert moves[0] <= 1

    def sent(self: Pipe, data: memoryview) -> bool:
        sizes.append(len(data))
        return read(self, data)

    monkeypatch.setattr(relay, "thread_time", lambda: now[0])
    monkeypatch.setattr(os, "splice", slow)
    monkeypatch.setattr(Pipe, "_move", counted)
    monkeypatch.setattr(Pipe, "_send", sent)
    flow = Flow(scratch)
    writing = asyncio.create_task(flow.write(DATA))
    assert await flow.read() == DATA
    await writing
    assert sum(sizes) < len(DATA) / 2, "after one full read the kernel moves the rest"
    flow.close()


async def test_bulk_waits_past_the_deadline_and_goes_on_after_it(
    scratch: Scratch, monkeypatch: pytest.MonkeyPatch
) -> None:
    flow = Flow(scratch)
    once_in_the_pipe(scratch, monkeypatch, lambda: flow.fence.move(LOST))
    writing = asyncio.create_task(flow.write(DATA))
    reading = asyncio.create_task(flow.read())
    async with asyncio.timeout(seconds(10)):
        while flow.fence.until is None:  # noqa: ASYNC110 # it is moved within a call of the loop's
            await asyncio.sleep(0)
    passed = flow.pipe.total
    assert scratch.waiting > 0
    for _ in range(100):
        await asyncio.sleep(0)
    assert flow.pipe.total == passed < len(DATA)
    flow.fence.move(boottime() + 600)
    assert await reading == DATA
    await writing
    flow.close()


async def test_bulk_is_copied_when_no_pipe_can_be_made(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(flags: int) -> tuple[int, int]:
        raise OSError(24, "too many open files")

    monkeypatch.setattr(os, "pipe2", full)
    flow = Flow(Scratch())
    writing = asyncio.create_task(flow.write(DATA))
    assert await flow.read() == DATA
    await writing
    flow.close()
