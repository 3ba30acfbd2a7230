"""The fence of a plugin, as each process keeps it."""

from __future__ import annotations

import asyncio

import pytest

from isolator.ipc import fence as fences
from isolator.ipc.fence import LOST, Fence


class Clock:
    now = 100.0


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    made = Clock()
    monkeypatch.setattr(fences, "boottime", lambda: made.now)
    return made


def test_fence_closes_by_the_clock_alone_and_opens_when_it_is_moved(clock: Clock) -> None:
    fence = Fence()
    assert not fence.closed
    fence.move(110.0)
    assert not fence.closed
    clock.now = 110.0
    assert fence.closed
    fence.move(105.0)
    assert fence.closed
    fence.move(120.0)
    assert not fence.closed
    fence.move(LOST)
    assert fence.closed and fence.lost
    fence.move(None)
    assert not fence.closed and not fence.lost


def test_fence_tells_whether_it_was_closed_since_a_moment(clock: Clock) -> None:
    fence = Fence(110.0)
    assert not fence.closed_since(90.0), "it was never closed"
    clock.now = 111.0
    assert fence.closed_since(111.0)
    fence.move(130.0)
    clock.now = 115.0
    assert fence.closed_since(110.5) and not fence.closed_since(112.0)


def test_what_has_stalled_goes_on_once_when_the_deadline_lies_ahead(clock: Clock) -> None:
    fence, went_on = Fence(90.0), []
    fence.stall(lambda: went_on.append(1))
    fence.move(95.0)
    assert went_on == []
    fence.move(101.0)
    fence.move(102.0)
    assert went_on == [1]


async def test_whoever_waits_goes_on_only_while_it_is_open(clock: Clock) -> None:
    fence = Fence(90.0)
    waiting = asyncio.create_task(fence.opened())
    await asyncio.sleep(0)
    fence.move(100.5)
    clock.now = 100.5  # closed again before the task had its turn
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    assert not waiting.done()
    fence.move(None)
    await asyncio.wait_for(waiting, 5)
