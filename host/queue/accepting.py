"""An event on its way into the queue."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable
from dataclasses import dataclass

from host.database.wal import WRITING
from host.queue.consumer import SqliteConsumer
from host.queue.interface import Accepted, Event, NewEvent, Prepare, Subscriber

Answer = Callable[[Accepted | None, Exception | None], None]

LONG = 4096
"""Characters of a payload from which on making its request would take longer than the disk."""


def prepare_requests(batch: list[Accepting]) -> None:
    """Prepare requests of these events while the disk writes them, for ``WRITING`` seconds."""
    until = time.perf_counter() + WRITING
    for entry in batch:
        if len(entry.event.payload) >= LONG:
            continue
        for prepare in entry.counted.values():
            with contextlib.suppress(Exception):  # it fails again, and is reported, as the request is to be sent
                prepare(entry.event)
            if time.perf_counter() >= until:
                return


@dataclass
class Accepting:
    """An event between ``accept`` and its sync."""

    new: NewEvent
    event: Event
    admitted: list[tuple[Subscriber, SqliteConsumer]]
    """Each with its consumer: a plugin that takes the name of one that was removed has another."""
    counted: dict[str, Prepare]
    """The plugins among them whose first attempt is counted with the event, each with what prepares its request."""
    overflowed: list[Subscriber]
    done: Answer
    earlier: Event | None = None
    """The event that already has this ``dedupe_key``."""
    others: tuple[str, ...] = ()
    """Plugins that get it later, from the log of a cluster."""

    def answer(self, accepted: Accepted | None, error: Exception | None) -> None:
        """Tell the caller; what goes wrong there keeps nobody else from an answer."""
        try:
            self.done(accepted, error)
        except Exception as failure:
            context = {"message": "the answer to an event's emitter failed", "exception": failure}
            asyncio.get_running_loop().call_exception_handler(context)

    def accepted(self) -> Accepted:
        """The answer to the caller, once it is safe."""
        if self.earlier is not None:
            return Accepted(self.earlier, (), duplicate=True)
        overflowed = tuple([s.plugin for s in self.overflowed])
        return Accepted(self.event, (*[s.plugin for s, _ in self.admitted], *overflowed, *self.others), overflowed)
