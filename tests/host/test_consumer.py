"""Taking from the embedded queue: a backlog that nobody is sent takes the event loop from nobody."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from host.database.store import Store
from host.queue.consumer import AT_ONCE
from host.queue.interface import NewEvent, Result, Subscriber
from host.queue.sqlite import SqliteQueue
from tests.support.timeouts import seconds

BACKLOG = 1000


async def _turns(done: asyncio.Event) -> int:
    """The turns of the event loop until then."""
    turns = 0
    while not done.is_set():
        await asyncio.sleep(0)
        turns += 1
    return turns


@pytest.mark.parametrize("expired", [False, True], ids=["left out by a filter", "expired"])
async def test_backlog_that_is_given_up_leaves_the_loop_to_others(tmp_path: Path, expired: bool) -> None:
    store, done = Store(tmp_path / "host.db"), asyncio.Event()
    ended: list[int] = []
    queue = SqliteQueue(store, on_expired=lambda delivery: ended.append(delivery.seq))
    events = (NewEvent("deploy.completed", "{}", ttl=0.0 if expired else 60.0) for _ in range(BACKLOG))
    await asyncio.gather(*(queue.accept(event, [Subscriber("p", None)]) for event in events))
    consumer = queue.consumer("p")

    async def give_up() -> None:
        while True:
            delivery = await consumer.take()
            consumer.term(delivery, Result("dead"))
            ended.append(delivery.seq)

    others = asyncio.create_task(_turns(done))
    taker = asyncio.create_task(give_up())
    async with asyncio.timeout(seconds(60)):
        while consumer.depth:  # noqa: ASYNC110 # turns are what is counted
            await asyncio.sleep(0)
    done.set()
    assert ended == [*range(1, BACKLOG + 1)]
    assert await others >= BACKLOG / AT_ONCE
    taker.cancel()
    await store.close()
