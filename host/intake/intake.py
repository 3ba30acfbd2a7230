"""Events on their way in: validated, addressed, queued, on record, and never far ahead of the trail."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from host.events import Catalogue
from host.plugins.registry import Registry
from host.queue.accepting import Answer
from host.queue.interface import DEFAULT_TTL, QUEUE_FULL, Accepted, Delivery, NewEvent
from host.queue.sqlite import SqliteQueue
from isolator.audit.client import AuditClient, Moment
from isolator.audit.schema import EventAccepted, EventDead

AUDIT_AHEAD = 8000
"""Records not yet written beyond which accepting waits for the trail."""


class EventIntake:
    """The way of an event from the platform into the queue.

    ``wait_for_trail``: accept nothing while the trail cannot be written (``[audit] disk_full = "stop"``).
    """

    def __init__(
        self, catalogue: Catalogue, registry: Registry, queue: SqliteQueue, audit: AuditClient, *, wait_for_trail: bool
    ) -> None:
        self._catalogue, self._registry, self._queue, self._audit = catalogue, registry, queue, audit
        self._wait_for_trail = wait_for_trail

    def emit(
        self,
        name: str,
        payload: Mapping[str, Any],
        done: Answer,
        *,
        by: str,
        dedupe_key: str | None = None,
        ttl: float | None = None,
        trace: str | None = None,
        on_behalf_of: str | None = None,
    ) -> None:
        """Validate and accept one event; ``done(accepted, error)`` when it and its deliveries are on disk.

        Raises NotFoundError for an unknown event and UsageError for a payload that does not fit.
        """
        checked = self._catalogue.validate(name, payload)
        subscribers = self._registry.subscribers(checked.type, checked.fields)
        subject = str(checked.fields.get(checked.type.order_by or "project_id", ""))
        lifetime = DEFAULT_TTL if ttl is None else ttl
        event = NewEvent(checked.type.name, checked.json, subject, dedupe_key, lifetime, trace, by, on_behalf_of)
        self._queue.submit(event, subscribers, done)

    def full(self) -> bool:
        """Whether accepting should wait for the trail."""
        if not self._wait_for_trail and self._audit.blocked is not None:
            return False
        return self._audit.sent - self._audit.acked > AUDIT_AHEAD

    async def room(self) -> None:
        """Wait until accepting more would not run too far ahead of the trail."""
        await self._audit.durable(within=AUDIT_AHEAD // 2, or_blocked=not self._wait_for_trail)


def accepted_record(
    number: int, name: str, subject: str, payload: str, plugins: Iterable[str], by: str | None, **more: str
) -> EventAccepted:
    """The record of an accepted event; ``more``: fields that not every one has."""
    data = payload.encode()
    return EventAccepted(
        event=name, subject=subject, bytes=len(data), sha256=hashlib.sha256(data).hexdigest(), plugins=list(plugins),
        by=by, number=number, **more,
    )  # fmt: skip


class EventRecords:
    """Records of the fates of events in the queue."""

    def __init__(self, record: Callable[..., None]) -> None:
        self._record = record

    def accepted(self, event: NewEvent, accepted: Accepted, at: Moment) -> None:
        """Record an event that was accepted ``at`` this moment, and the deliveries for which there was no room."""
        stored = accepted.event
        more = {"on_behalf_of": event.on_behalf_of} if event.on_behalf_of else {}
        record = accepted_record(
            stored.seq, stored.name, stored.subject, stored.payload, accepted.plugins, event.by, **more
        )
        self._record(record, event_id=stored.id, at=at)
        for name in accepted.overflowed:
            self.dead(name, stored.id, QUEUE_FULL, 0)

    def expired(self, delivery: Delivery) -> None:
        """Record a delivery whose time ran out."""
        self.dead(delivery.plugin, delivery.event_id or None, "expired", delivery.attempts)

    def dead(self, plugin: str, event_id: str | None, reason: str, attempts: int) -> None:
        """Record a dead letter."""
        delivery_id = f"{event_id}.{plugin}" if event_id else None
        dead = EventDead(reason=reason, attempts=attempts)
        self._record(dead, plugin=plugin, event_id=event_id, delivery_id=delivery_id)
