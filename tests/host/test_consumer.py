"""Taking from the embedded queue: a backlog that nobody is sent takes the event loop from nobody."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from host.database.store import Store
from host.queue import consumer as module
from host.queue.consumer import AT_ONCE
from host.queue.interface import Delivery, NewEvent, Result, Subscriber
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


async def test_taker_without_room_is_offered_the_next_with_the_end_of_a_delivery(tmp_path: Path) -> None:
    store = Store(tmp_path / "host.db")
    queue = SqliteQueue(store)
    consumer = queue.consumer("p")
    sent: list[Delivery] = []

    def send_now(delivery: Delivery) -> bool:
        sent.append(delivery)
        return True

    def room() -> float:
        return 1.0 if not sent or sent[-1].final else 0.0

    taking = asyncio.create_task(consumer.take(None, send_now, room))
    await asyncio.sleep(0)
    for key in "abc":
        await queue.accept(NewEvent("deploy.completed", "{}"), [Subscriber("p", key)])
    second = consumer.find(2)
    assert second is not None
    assert [delivery.seq for delivery in sent] == [1]
    assert not (second.taken or taking.done()), "it waits in its lane, where it can be skipped"
    consumer.ack(sent[0], Result("ok"))
    assert sent[1:] == [second] and second.taken
    consumer.term(second, Result("dead"))
    assert [delivery.seq for delivery in sent] == [1, 2, 3] and not taking.done()
    taking.cancel()
    await store.close()


async def test_taker_with_little_room_is_offered_deliveries_together_and_never_lacks_half_of_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "GATHER", 3600.0)
    store = Store(tmp_path / "host.db")
    queue = SqliteQueue(store)
    consumer = queue.consumer("p")
    sent: list[Delivery] = []

    def send_now(delivery: Delivery) -> bool:
        sent.append(delivery)
        return True

    taking = asyncio.create_task(
        consumer.take(None, send_now, lambda: 1 - sum(not delivery.final for delivery in sent) / 4)
    )
    await asyncio.sleep(0)
    await asyncio.gather(*(queue.accept(NewEvent("deploy.completed", "{}"), [Subscriber("p", None)]) for _ in range(8)))
    assert [delivery.seq for delivery in sent] == [1, 2, 3], "more than half of what it may have"
    consumer.ack(sent[0], Result("ok"))
    assert [delivery.seq for delivery in sent] == [1, 2, 3, 4, 5]
    consumer.ack(sent[1], Result("ok"))
    assert len(sent) == 5 and consumer._gathering is not None
    consumer.ack(sent[2], Result("ok"))
    assert [delivery.seq for delivery in sent] == [1, 2, 3, 4, 5, 6, 7]
    consumer.ack(sent[3], Result("ok"))
    consumer._gathering.cancel()
    consumer._gathered()
    assert len(sent) == 8 and not taking.done(), "after a moment all the same"
    taking.cancel()
    await store.close()


async def test_delivery_that_waits_for_company_is_offered_after_a_moment(tmp_path: Path) -> None:
    store, queue_filled = Store(tmp_path / "host.db"), asyncio.Event()
    queue = SqliteQueue(store)
    sent: list[int] = []

    def send_now(delivery: Delivery) -> bool:
        sent.append(delivery.seq)
        if len(sent) == 4:
            queue_filled.set()
        return True

    consumer = queue.consumer("p")
    taking = asyncio.create_task(consumer.take(None, send_now, lambda: 1 - len(sent) / 4))
    await asyncio.sleep(0)
    for _ in range(4):
        await queue.accept(NewEvent("deploy.completed", "{}"), [Subscriber("p", None)])
    await asyncio.wait_for(queue_filled.wait(), seconds(5))
    taking.cancel()
    await store.close()


async def test_taker_that_waits_is_offered_what_may_go_and_takes_what_it_cannot_send_at_once(tmp_path: Path) -> None:
    store = Store(tmp_path / "host.db")
    queue = SqliteQueue(store)
    consumer = queue.consumer("p")
    offered: list[Delivery] = []

    def send_now(delivery: Delivery) -> bool:
        offered.append(delivery)
        return len(offered) != 3

    async def accept(key: str) -> int:
        return (await queue.accept(NewEvent("deploy.completed", "{}"), [Subscriber("p", key)])).event.seq

    taking = asyncio.create_task(consumer.take(send_now=send_now))
    await asyncio.sleep(0)
    first, behind = await accept("a"), await accept("a")
    assert [delivery.seq for delivery in offered] == [first], "the second one is behind it in the order of its key"
    assert offered[0].taken
    consumer.ack(offered[0], Result("ok"))
    assert [delivery.seq for delivery in offered] == [first, behind]
    third = await accept("b")
    taken = await asyncio.wait_for(taking, seconds(5))
    assert taken is offered[2]
    assert (taken.seq, taken.taken) == (third, True)
    await accept("c")
    assert len(offered) == 3, "nobody waits"
    await store.close()


async def test_retry_is_offered_to_the_taker_that_waits_when_it_is_due(tmp_path: Path) -> None:
    store, again = Store(tmp_path / "host.db"), asyncio.Event()
    queue = SqliteQueue(store)
    consumer = queue.consumer("p")
    offered: list[Delivery] = []

    def send_now(delivery: Delivery) -> bool:
        if delivery.event is None:
            return False
        offered.append(delivery)
        if len(offered) == 2:
            again.set()
        return True

    async def work() -> None:
        while True:
            send_now(await consumer.take(send_now=send_now))

    working = asyncio.create_task(work())
    await asyncio.sleep(0)
    await queue.accept(NewEvent("deploy.completed", "{}"), [Subscriber("p", None)])
    consumer.nak(offered[0], Result("retry"), delay=0.01)
    await asyncio.wait_for(again.wait(), seconds(30))
    assert offered[0] is offered[1]
    working.cancel()
    await store.close()


async def test_backlog_that_the_taker_gives_up_as_it_is_offered_leaves_the_loop_to_others(tmp_path: Path) -> None:
    store, done = Store(tmp_path / "host.db"), asyncio.Event()
    queue = SqliteQueue(store)
    consumer = queue.consumer("p")
    ended: list[int] = []

    def give_up(delivery: Delivery) -> bool:
        consumer.term(delivery, Result("dead"))
        ended.append(delivery.seq)
        return True

    async def work() -> None:
        while True:
            give_up(await consumer.take(send_now=give_up))

    first = await queue.accept(NewEvent("deploy.completed", "{}"), [Subscriber("p", "key")])
    held = await consumer.take()
    working = asyncio.create_task(work())
    events = (NewEvent("deploy.completed", "{}") for _ in range(BACKLOG))
    await asyncio.gather(*(queue.accept(event, [Subscriber("p", "key")]) for event in events))
    assert ended == [], "all are behind the first one in the order of their key"
    others = asyncio.create_task(_turns(done))
    await asyncio.sleep(0)
    consumer.ack(held, Result("ok"))
    async with asyncio.timeout(seconds(60)):
        while consumer.depth:  # noqa: ASYNC110 # turns are what is counted
            await asyncio.sleep(0)
    done.set()
    assert ended == [*range(first.event.seq + 1, first.event.seq + BACKLOG + 1)]
    assert await others >= BACKLOG / AT_ONCE / 2
    working.cancel()
    await store.close()
