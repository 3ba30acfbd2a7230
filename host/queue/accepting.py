"""An event on its way into the queue."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from host.queue.consumer import SqliteConsumer
from host.queue.interface import Accepted, Event, NewEvent, Subscriber

Answer = Callable[[Accepted | None, Exception | None], None]


@dataclass
class Accepting:
    """An event between ``accept`` and its sync."""

    new: NewEvent
    event: Event
    admitted: list[tuple[Subscriber, SqliteConsumer]]
    """Each with its consumer: a plugin that takes the name of one that was removed has another."""
    counted: set[str]
    """The plugins among them whose first attempt is counted with the event."""
    overflowed: list[Subscriber]
    done: Answer
    earlier: Event | None = None
    """The event that already has this ``dedupe_key``."""
    others: tuple[str, ...] = ()
    """Plugins that get it later, from the log of a cluster."""

    def accepted(self) -> Accepted:
        """The answer to the caller, once it is safe."""
        if self.earlier is not None:
            return Accepted(self.earlier, (), duplicate=True)
        overflowed = tuple(s.plugin for s in self.overflowed)
        return Accepted(self.event, (*(s.plugin for s, _ in self.admitted), *overflowed, *self.others), overflowed)
