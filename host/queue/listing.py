"""Events and deliveries of the queue as commands ask for them."""

from __future__ import annotations

from host.database.store import Store
from host.queue import rows
from host.queue.interface import DeliveryRow, Event, EventRow
from isolator.errors import NotFoundError, UsageError


class Listing:
    """The queue's tables, read."""

    store: Store

    async def list_events(
        self,
        *,
        limit: int = 50,
        name: str | None = None,
        since: float = 0.0,
        plugin: str | None = None,
        state: str | None = None,
        brief: bool = False,
    ) -> list[EventRow]:
        """Events with their deliveries, newest first; ``since`` in Unix time.

        With ``plugin`` and ``state`` those with such a delivery; ``brief``: without payloads and replies.
        """
        room = 0 if brief else rows.LISTED
        return await self.store.scan(lambda db: rows.events(db, limit, name, since, plugin, state, room))

    def show(self, event_id: str) -> EventRow:
        """Show one event with its deliveries; raises NotFoundError."""
        row = self.store.read(lambda db: rows.event_row(db, "id=?", event_id))
        if row is None:
            raise NotFoundError(f"event {event_id}", "is not stored", "see 'isolator event list'")
        return row

    async def complete(self, row: EventRow) -> EventRow:
        """The event as ``show`` has it, with what only other hosts know of its deliveries, where there are such."""
        return row

    async def list_dead(self, *, plugin: str | None = None, limit: int = 1000) -> list[DeliveryRow]:
        """Deliveries that were given up, newest first."""
        return await self.store.scan(lambda db: rows.dead(db, plugin, limit))

    def resolve(self, text: str) -> str:
        """The id of the one stored event whose id begins with ``text``.

        Raises NotFoundError when there is none, UsageError when several begin so.
        """
        found = self.store.read(lambda db: rows.ids(db, text, 3))
        if text in found:
            return text
        if not found:
            raise NotFoundError(f"event {text}", "is not stored", "see 'isolator event list'")
        if len(found) > 1:
            raise UsageError(f"event {text}", f"several ids begin so: {', '.join(found)}", "write more of it")
        return found[0]

    def name_of(self, event_id: str) -> str | None:
        """The name of an event; None when it is not stored."""
        event = self.store.read(lambda db: rows.event(db, "id=?", event_id))
        return event.name if event is not None else None

    def _event(self, event_id: str) -> Event:
        event = self.store.read(lambda db: rows.event(db, "id=?", event_id))
        if event is None:
            raise NotFoundError(f"event {event_id}", "is not stored", "see 'isolator event list'")
        return event
