"""One plugin's deliveries: the lane in memory, kept in step with the rows on disk."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Callable
from typing import TYPE_CHECKING

from host.queue.interface import Delivery, Result
from host.queue.lane import Lane

if TYPE_CHECKING:
    from host.queue.sqlite import SqliteQueue

_PREFETCH = 64
"""Payloads that are read back together."""


def backoff(attempts: int, *, spread: float = 0.2) -> float:
    """Seconds before the next attempt after ``attempts`` failed ones: 1·2ⁿ, at most ten minutes, ±20 %."""
    base = min(2.0 ** min(attempts - 1, 20), 600.0)
    return base * random.uniform(1 - spread, 1 + spread)


class SqliteConsumer:
    """One plugin's deliveries; see ``host.queue.interface.Consumer``."""

    def __init__(self, queue: SqliteQueue, plugin: str) -> None:
        self._queue = queue
        self._plugin = plugin
        self._lane = Lane()
        self._waiter: asyncio.Future[None] | None = None
        self._timer: asyncio.TimerHandle | None = None
        self.reserved = 0
        """Deliveries written but not yet synced: they count against the limit."""
        self.on_soon: Callable[[], bool] = lambda: False
        """Called when a delivery for an idle plugin is being written and will be there shortly.

        Answers whether it will be tried as soon as it is there: then its attempt is counted with it.
        """

    @property
    def depth(self) -> int:
        return self._lane.depth

    @property
    def idle(self) -> bool:
        """Whether the taker waits and the first delivery is on its way."""
        return self._waiter is not None and self._lane.depth == 0 and self.reserved == 1

    def add(self, delivery: Delivery) -> None:
        """A delivery that is safe enters the lane."""
        self._lane.add(delivery)
        if self._waiter is not None:
            self._wake()

    async def take(self) -> Delivery:
        loop = asyncio.get_running_loop()
        while True:
            delivery = self._lane.pop(loop.time())
            if delivery is None:
                await self._wait(loop)
                continue
            if delivery.expires <= loop.time():
                self.done(delivery, Result("expired", detail="not delivered in time"))
                self._queue.on_expired(delivery)
                continue
            if delivery.event is None:
                self._queue.load(delivery, self._lane.upcoming(_PREFETCH))
            if delivery.event is None:  # its event is gone: nothing can be sent any more
                self.done(delivery, Result("dead", detail="the event is no longer stored"))
                continue
            return delivery

    def done(self, delivery: Delivery, result: Result) -> None:
        if delivery.cancelled:
            return
        self._lane.done(delivery)
        self._queue.write(delivery, result, 0.0)
        self._queue.progressed(delivery)
        self._wake()

    def again(self, delivery: Delivery, result: Result, *, delay: float) -> None:
        if delivery.cancelled:
            return
        self._lane.put_back(delivery, asyncio.get_running_loop().time() + delay)
        self._queue.write(delivery, result, time.time() + delay)
        self._queue.progressed(delivery)
        self._wake()

    def release(self, delivery: Delivery) -> None:
        if delivery.cancelled:
            return
        if delivery.counted:
            self._queue.write(delivery, Result("queued"), 0.0)
        self._lane.put_back(delivery, delivery.due)
        self._wake()

    def cancel(self, seq: int, result: Result) -> Delivery | None:
        """End a delivery that waits for its retry, without sending it; None if it is not waiting here."""
        delivery = self._lane.find(seq)
        if delivery is None or delivery.taken:
            return None
        self._lane.cancel(delivery)
        self._queue.write(delivery, result, 0.0)
        self._queue.progressed(delivery)
        self._wake()
        return delivery

    def note_crash(self, delivery: Delivery) -> None:
        """Count a crash of the plugin while this delivery was in flight."""
        delivery.crashes += 1
        values = (delivery.crashes, delivery.seq, delivery.plugin)
        self._queue.store.submit(
            lambda db: db.execute("UPDATE deliveries SET crashes=? WHERE seq=? AND plugin=?", values)
        )

    def drop_all(self) -> int:
        """Forget everything that waits here (the plugin is removed)."""
        pending = self._lane.pending()
        for delivery in pending:
            delivery.cancelled = True
        self._lane = Lane()
        self._wake()
        return len(pending)

    async def _wait(self, loop: asyncio.AbstractEventLoop) -> None:
        self._waiter = loop.create_future()
        due = self._lane.next_due()
        self._timer = loop.call_at(due, self._wake) if due is not None else None
        try:
            await self._waiter
        finally:
            self._waiter = None
            if self._timer is not None:
                self._timer.cancel()
                self._timer = None

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)
