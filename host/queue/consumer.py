"""Consumer of the embedded queue: one plugin's lane in memory, kept in step with the rows on disk."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Protocol

from host.queue.interface import Delivery, Event, KeptState, Prepare, Result
from host.queue.lane import Lane

_CACHED = 4096
"""Deliveries per lane that keep their payload in memory; the rest is read back when its turn comes."""
_CACHED_BYTES = 1 << 20
"""Depth of the lane times size of the payload from which on it is read back, too: so a lane holds a few MiB at most."""
_PREFETCH = 64
"""Payloads that are read back together."""
AMPLE, GATHER = 0.5, 0.0003
"""Share of a taker's room that has to be free for it to be offered the next delivery at once, and seconds for which
that waits otherwise. Those that go together then share a transaction, a packet of records and a write; and who takes
many at a time has half of them meanwhile."""
AT_ONCE = 64
"""Deliveries that are taken before others have a turn: of a backlog that is given up none is waited for."""


class DeliveryRows(Protocol):
    """Rows of the deliveries on disk, as far as a consumer needs them."""

    def load(self, delivery: Delivery, upcoming: Sequence[Delivery]) -> None:
        """Read the payload of a delivery and of those that follow soon; ``event`` stays None where it is pruned."""

    def write(self, delivery: Delivery, result: Result, due: float) -> None:
        """Record the state of a delivery, with the Unix time of its next attempt (0: none)."""

    def write_due(self, delivery: Delivery, due: float) -> None:
        """Record the Unix time of a waiting delivery's next attempt (0: at once)."""

    def write_crashes(self, delivery: Delivery) -> None:
        """Record ``delivery.crashes``."""


class SqliteConsumer:
    """One plugin's deliveries; see ``host.queue.interface.Consumer``.

    ``on_expired`` is called for each delivery that expired unsent.
    """

    def __init__(self, rows: DeliveryRows, on_expired: Callable[[Delivery], None]) -> None:
        self._rows, self._on_expired = rows, on_expired
        self._loop = asyncio.get_running_loop()
        self._lane = Lane()
        self._waiter: asyncio.Future[None] | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._on_delivery_pending: Callable[[bool], Prepare | None] | None = None
        self._send_now: Callable[[Delivery], bool] | None = None
        self._room: Callable[[], float] = lambda: 1.0
        self._gathering: asyncio.TimerHandle | None = None
        """Until the taker, which has little room, is offered the next delivery."""
        self._offering = False
        """The taker that waits is being offered deliveries."""
        self._closed = False
        self._at_once = 0
        """Deliveries that were taken since others had a turn."""
        self._in_flight: dict[int, Delivery] = {}
        """Deliveries that another host has sent, until they are taken again."""
        self.reserved = 0
        """Deliveries that are being written: they count against the limit."""

    @property
    def depth(self) -> int:
        return self._lane.depth

    @property
    def oldest(self) -> int | None:
        """Number of the oldest event whose delivery is not final."""
        delivery = self._lane.oldest
        return delivery.seq if delivery is not None else None

    @property
    def next_attempt(self) -> float | None:
        due = self._lane.next_due()
        return None if due is None else time.time() + due - self._loop.time()

    @property
    def held_by(self) -> str | None:
        delivery = self._lane.next_waiting()
        if delivery is None:
            return None
        if delivery.event is None:
            self._rows.load(delivery, ())
        return delivery.event.id if delivery.event is not None else None

    def announce(self, alone: bool) -> Prepare | None:
        """Let a taker that waits for the one reserved delivery prepare; None unless it will send that one at once.

        ``alone``: the delivery is the only one of its event.
        """
        hook = self._on_delivery_pending
        return hook(alone) if hook is not None and self.reserved == 1 and self._lane.depth == 0 else None

    def add(self, delivery: Delivery, event: Event | None = None) -> None:
        """Let a delivery that is safe on disk enter the lane, unless everything was dropped meanwhile.

        With its ``event`` it need not be read back, where few wait before it.
        """
        if self._closed:
            delivery.final = True
            return
        depth = self._lane.depth
        if event is not None and depth < _CACHED and depth * len(event.payload) < _CACHED_BYTES:
            delivery.load(event)
        self._lane.add(delivery)
        self._wake(AMPLE)

    async def take(
        self,
        on_delivery_pending: Callable[[bool], Prepare | None] | None = None,
        send_now: Callable[[Delivery], bool] | None = None,
        room: Callable[[], float] = lambda: 1.0,
    ) -> Delivery:
        self._room = room
        while True:
            if self._at_once == AT_ONCE:
                self._at_once = 0
                await asyncio.sleep(0)
            delivery = self._lane.pop(self._loop.time())
            if delivery is None:
                self._at_once = 0
                await self._wait(on_delivery_pending, send_now)
                continue
            self._at_once += 1
            if delivery.event is None:
                self._load(delivery)
            if delivery.expires <= self._loop.time():
                self.term(delivery, Result("expired", detail="not delivered in time"))
                self._on_expired(delivery)
                continue
            if delivery.event is None:  # pruned or damaged: nothing can be sent any more
                self.term(delivery, Result("dead", detail="the event is no longer stored, or is damaged"))
                continue
            return delivery

    def ack(self, delivery: Delivery, result: Result) -> None:
        self.term(delivery, result)

    def term(self, delivery: Delivery, result: Result) -> None:
        if delivery.final:
            return
        self._lane.remove(delivery)
        self._rows.write(delivery, result, 0.0)
        if self._lane.has_next():
            self._wake(AMPLE)

    def nak(self, delivery: Delivery, result: Result, *, delay: float) -> None:
        if delivery.final:
            return
        self._rows.write(delivery, result, time.time() + delay)
        self._put_back(delivery, self._loop.time() + delay)
        self._wake()

    def release(self, delivery: Delivery) -> None:
        if delivery.final:
            return
        if delivery.counted:
            self._rows.write(delivery, Result("queued"), 0.0)
        self._put_back(delivery, delivery.due)
        self._wake()

    def expedite(self, delivery: Delivery) -> Delivery | None:
        before = self._lane.expedite(delivery)
        if before is None:
            self._rows.write_due(delivery, 0.0)
            self._wake()
        return before

    def _put_back(self, delivery: Delivery, due: float) -> None:
        """Let a delivery wait without its payload, which is read again when it is taken: many may wait for long."""
        delivery.event = None
        self._lane.put_back(delivery, due)

    def _load(self, delivery: Delivery) -> None:
        try:
            self._rows.load(delivery, self._lane.upcoming(_PREFETCH))
        except BaseException:
            self._put_back(delivery, delivery.due)  # nobody else would: it has not come to a taker
            raise

    def count_crash(self, delivery: Delivery) -> None:
        delivery.crashes += 1
        self._rows.write_crashes(delivery)

    def find(self, seq: int) -> Delivery | None:
        return next((delivery for delivery in self._lane.pending() if delivery.seq == seq), None)

    def add_in_flight(self, delivery: Delivery) -> None:
        """Let a delivery enter the lane whose request another host has sent: ``retake`` takes it."""
        delivery.taken = True
        self._lane.add(delivery)
        self._in_flight[delivery.seq] = delivery

    def retake(self, seq: int) -> Delivery | None:
        delivery = self._in_flight.get(seq)
        if delivery is None:
            return None
        self._rows.load(delivery, ())
        return self._in_flight.pop(seq) if delivery.event is not None else None

    def not_retaken(self) -> list[Delivery]:
        """The deliveries that were in flight and that nobody takes: their replies cannot come."""
        left, self._in_flight = list(self._in_flight.values()), {}
        return left

    def pass_on(self) -> tuple[KeptState, ...]:
        pending = self._lane.pending()
        for delivery in pending:
            if delivery.counted:
                self._rows.write(delivery, Result("queued"), 0.0)
        kept = (d for d in pending if d.unreadable or d.busy)
        return tuple(KeptState(seq=d.seq, unreadable=d.unreadable, busy=d.busy) for d in kept)

    def restore(self, kept: Iterable[KeptState]) -> None:
        figures = {one.seq: one for one in kept}
        for delivery in self._lane.pending() if figures else ():
            if delivery.seq in figures:
                delivery.unreadable, delivery.busy = figures[delivery.seq].unreadable, figures[delivery.seq].busy

    def drop_all(self) -> int:
        """Forget everything that is pending, and whatever still comes (the plugin is removed); returns how many."""
        self._closed = True
        pending = self._lane.pending()
        for delivery in pending:
            delivery.final = True
            delivery.ahead = delivery.behind = None  # or they keep each other
        self._in_flight.clear()
        self._lane = Lane()
        self._wake()
        return len(pending)

    async def _wait(
        self,
        on_delivery_pending: Callable[[bool], Prepare | None] | None,
        send_now: Callable[[Delivery], bool] | None,
    ) -> None:
        self._waiter = self._loop.create_future()
        self._on_delivery_pending, self._send_now = on_delivery_pending, send_now
        self._set_timer()
        try:
            await self._waiter
        finally:
            self._waiter = self._on_delivery_pending = self._send_now = None
            if self._timer is not None:
                self._timer.cancel()
                self._timer = None

    def _set_timer(self) -> None:
        """Let the taker look again when the first delivery that waits is due."""
        if self._timer is not None:
            self._timer.cancel()
        due = self._lane.next_due()
        self._timer = self._loop.call_at(due, self._wake) if due is not None else None

    def _gathered(self) -> None:
        self._gathering = None
        self._wake()

    def _wake(self, ample: float = 0.0) -> None:
        """Offer the taker that waits what may go now, or wake it; a moment later if it has less than ``ample`` room."""
        if self._waiter is None or self._waiter.done() or self._offering or (room := self._room()) <= 0:
            return
        if room < ample:
            if self._gathering is None:
                self._gathering = self._loop.call_later(GATHER, self._gathered)
        elif self._send_now is None or not self._offer(self._send_now):
            self._waiter.set_result(None)

    def _offer(self, send_now: Callable[[Delivery], bool]) -> bool:
        """Have deliveries sent without a turn of the loop; returns whether the taker may go on waiting."""
        now = self._loop.time()
        self._offering = True
        try:
            for _ in range(AT_ONCE):
                delivery = self._lane.pop(now)
                if delivery is None:
                    self._set_timer()
                    return True
                if delivery.event is None or delivery.expires <= now or not send_now(delivery):
                    self._lane.put_back(delivery, delivery.due)
                    break
                if not self._lane.has_next() or self._room() <= 0:
                    return True
        finally:
            self._offering = False
        return False
