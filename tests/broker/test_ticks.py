"""Cages that have nothing to look after are not ticked, and those that have are, until it is done."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator

import pytest

from isolator.audit.schema import NetDenied
from isolator.broker import ticks
from isolator.broker.flow import FlowTable
from isolator.broker.repeats import RepeatCounter
from isolator.broker.ticks import Ticks
from isolator.policy.denial import DenialRule
from tests.broker.test_outbound import Line
from tests.support.timeouts import seconds


@pytest.fixture
async def ticking(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Ticks]:
    monkeypatch.setattr(ticks, "SECONDS", 0.001)
    made = Ticks()
    running = asyncio.create_task(made.run())
    yield made
    running.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await running


class Cage:
    """Has something to look after for so many ticks."""

    def __init__(self, left: int) -> None:
        self.left, self.done = left, asyncio.Event()

    def tick(self) -> bool:
        assert self.left > 0, "it is ticked though nothing is left"
        self.left -= 1
        if not self.left:
            self.done.set()
        return self.left > 0


async def test_cage_is_ticked_until_nothing_is_left_and_again_when_something_comes(ticking: Ticks) -> None:
    first, second = Cage(3), Cage(1)
    for one in (first, second, first):
        ticking.want(one.tick)
    async with asyncio.timeout(seconds(10)):
        await first.done.wait()
        await second.done.wait()
        second.left = 2
        second.done.clear()
        ticking.want(second.tick)
        await second.done.wait()


async def test_cage_is_ticked_again_that_gets_something_to_look_after_in_its_tick(ticking: Ticks) -> None:
    """As when the last flow is ended there, and that is counted."""
    ticked = asyncio.Queue[None](2)

    def tick() -> bool:
        ticked.put_nowait(None)
        if not ticked.full():
            ticking.want(tick)
        return False

    ticking.want(tick)
    async with asyncio.timeout(seconds(10)):
        while not ticked.full():  # noqa: ASYNC110 # until both are there
            await asyncio.sleep(0.001)


async def test_cage_that_has_ended_is_not_ticked(ticking: Ticks) -> None:
    ended, other = Cage(0), Cage(2)
    ticking.want(ended.tick)
    ticking.want(other.tick)
    ticking.drop(ended.tick)
    async with asyncio.timeout(seconds(10)):
        await other.done.wait()


async def test_first_flow_and_first_count_ask_for_ticks() -> None:
    asked: list[str] = []
    line = Line()
    table = FlowTable(2, lambda *_: None, lambda: asked.append("flow"))
    for _ in range(2):
        table.add(line.flow)
    table.remove(line.flow)
    table.add(line.flow)
    counter = RepeatCounter(lambda *_, **__: None, lambda: 0.0, busy=lambda: asked.append("count"))
    for _ in range(2):
        counter.add(NetDenied(rule=DenialRule.RECORDS_LOST))
    assert asked == ["flow", "flow", "count"]
    await line.close()


async def test_tick_of_a_cage_tells_whether_anything_is_left() -> None:
    line = Line()
    assert not line.cage.tick()
    line.cage._flows.add(line.flow)
    assert line.cage.tick()
    line.cage._flows.remove(line.flow)
    line.cage._records.count(NetDenied(rule=DenialRule.RECORDS_LOST))
    assert line.cage.tick(), "its count is not written yet"
    await line.close()
