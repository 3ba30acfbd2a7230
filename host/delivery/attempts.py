"""Start of attempts: each is counted in the database and on record in the trail before its first byte is sent.

So nothing is ever delivered more often than its attempts count, whoever is killed, and a plugin's acts on an event are
recorded after it. The attempts of all plugins that are ready in one turn of the event loop begin together:
one transaction counts them, one packet hands their records over, and then all of them are written at once. An event
for fifty plugins waits for each of these things once and not for each of them fifty times.
"""

from __future__ import annotations

import asyncio
import hashlib
from typing import Protocol

from host.queue.interface import Delivery, Queue
from isolator.audit.client import AuditClient, Moment, moment
from isolator.audit.schema import EventDispatched
from isolator.ipc.tasks import essential_at_once


class Attempt(Protocol):
    """A delivery that is about to be tried."""

    delivery: Delivery
    run: str
    request: bytes

    def send(self) -> None:
        """Write the request at once, or gather it; never raises."""

    def listen(self) -> None:
        """Write what was gathered and await the reply, once every request of this turn is sent; never raises."""


class Attempts:
    """Begins the attempts of all workers; with ``wait_for_trail`` none is sent before the kernel holds its record."""

    def __init__(self, queue: Queue, audit: AuditClient, *, wait_for_trail: bool) -> None:
        self._queue, self._audit = queue, audit
        self._wait_for_trail = wait_for_trail
        self._loop = asyncio.get_running_loop()
        self._gathered: list[Attempt] = []
        self._scheduled = False
        self._tasks: set[asyncio.Task[None]] = set()

    def begin(self, attempt: Attempt) -> None:
        """Count, record and send an attempt, by the loop's next turn if database and trail can be written."""
        self._gathered.append(attempt)
        if not self._scheduled:
            self.schedule()

    def schedule(self) -> None:
        """Begin in the loop's next turn the attempts that have gathered by then.

        Called as workers are woken, that saves a turn: their attempts are sent in the turn in which they run.
        """
        if not self._scheduled:
            self._scheduled = True
            self._loop.call_soon(self._begin_scheduled)

    def begin_gathered(self) -> None:
        """Begin in this turn the attempts that have gathered."""
        if not self._gathered:
            return
        task = essential_at_once(self._begin(), "attempts")
        if task is not None:
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    def _begin_scheduled(self) -> None:
        self._scheduled = False
        self.begin_gathered()

    async def _begin(self) -> None:
        attempts, self._gathered = self._gathered, []
        await self._queue.sent([attempt.delivery for attempt in attempts])
        now, at = self._loop.time(), moment()
        for attempt in attempts:
            self._record(attempt, now, at)
        if self._wait_for_trail:
            await self._audit.flushed()
        else:
            self._audit.flush()
        for attempt in attempts:
            attempt.send()
        for attempt in attempts:
            attempt.listen()

    def _record(self, attempt: Attempt, now: float, at: Moment) -> None:
        delivery = attempt.delivery
        assert delivery.event is not None
        waited = now - delivery.ready_at if delivery.ready_at else None
        delivery.ready_at = 0.0
        self._audit.record(
            EventDispatched(
                attempt=delivery.attempts,
                queued_us=int(waited * 1e6) if waited is not None else None,
                request_bytes=len(attempt.request),
                request_sha256=hashlib.sha256(attempt.request).hexdigest(),
                **({"busy": delivery.busy} if delivery.busy else {}),
            ),
            plugin=delivery.plugin,
            run=attempt.run,
            event_id=delivery.event.id,
            delivery_id=delivery.id,
            at=at,
        )

    @property
    def unsettled(self) -> bool:
        """Whether an attempt is being counted and recorded, and not sent yet."""
        return bool(self._tasks or self._gathered)

    async def close(self) -> None:
        """Begin no more; an attempt that was counted has an unknown outcome at the next start."""
        self._gathered.clear()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
