"""The durable delivery queue: what it promises (here), the embedded SQLite one, and the lanes it keeps in memory.

A queue accepts an event once and delivers it to each subscribed plugin at least once. ``accept`` returns when the
event and all its deliveries are safe. Per plugin a ``Consumer`` hands out deliveries: in the order of acceptance
within one key, keys in parallel, and never two of one key at a time. The taker must end each with exactly one of
``done``, ``again`` (later) or ``release`` (as if never taken).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

State = Literal["queued", "starting", "in_flight", "retry", "ok", "skipped", "dead", "expired", "quarantined"]
DEFAULT_TTL = 7 * 86400.0
"""Seconds after which an undelivered event expires."""
FINAL: frozenset[str] = frozenset({"ok", "skipped", "dead", "expired", "quarantined"})


@dataclass(frozen=True, slots=True)
class Event:
    """An accepted event; ``payload`` is compact JSON, times are Unix seconds."""

    seq: int
    id: str
    name: str
    time: str
    accepted: float
    expires: float
    payload: str
    subject: str = ""
    trace: str | None = None


@dataclass(frozen=True, slots=True)
class NewEvent:
    """What ``accept`` is asked to keep."""

    name: str
    payload: str
    subject: str = ""
    dedupe_key: str | None = None
    ttl: float = DEFAULT_TTL
    trace: str | None = None
    by: str | None = None


@dataclass(frozen=True, slots=True)
class Subscriber:
    """One plugin that gets the event; ``key`` is None where no order is kept."""

    plugin: str
    key: str | None


@dataclass(frozen=True, slots=True)
class Accepted:
    """The outcome of ``accept``; ``overflowed`` names the plugins whose queue was full (their delivery is dead)."""

    event: Event
    plugins: tuple[str, ...]
    overflowed: tuple[str, ...] = ()
    duplicate: bool = False


@dataclass(slots=True)
class Delivery:
    """One event on its way to one plugin. ``attempts`` counts attempts that were sent, this one not included."""

    seq: int
    plugin: str
    key: str | None
    attempts: int = 0
    crashes: int = 0
    due: float = 0.0
    expires: float = 0.0
    event: Event | None = None
    cancelled: bool = False
    taken: bool = False
    counted: bool = False
    """Its next attempt is in the database already, though not in ``attempts``: it was counted with the event."""
    ready_at: float = 0.0
    """Loop time at which it could first be taken; only for latency figures."""

    @property
    def id(self) -> str:
        """The delivery's name in listings and in the trail; the event must be loaded."""
        assert self.event is not None
        return f"{self.event.id}.{self.plugin}"


@dataclass(frozen=True, slots=True)
class Result:
    """How an attempt ended, as it is stored: ``reply`` is already redacted and cut."""

    state: State
    status: str | None = None
    detail: str | None = None
    reply: str | None = None
    latency_us: int | None = None


class Consumer(Protocol):
    """One plugin's deliveries."""

    @property
    def depth(self) -> int:
        """Deliveries not yet final, those in flight included."""

    async def take(self) -> Delivery:
        """The next delivery that may be sent now, with its event loaded."""

    def done(self, delivery: Delivery, result: Result) -> None:
        """Final: ok, skipped, dead, expired or quarantined."""

    def again(self, delivery: Delivery, result: Result, *, delay: float) -> None:
        """Deliver again after ``delay`` seconds; later events of its key wait."""

    def release(self, delivery: Delivery) -> None:
        """Give it back untouched: nothing was sent."""


class Queue(Protocol):
    """What dispatch and the control API need from any queue, on one host or on several."""

    async def accept(self, event: NewEvent, subscribers: Sequence[Subscriber]) -> Accepted:
        """Keep the event and one delivery per subscriber; returns when that is safe."""

    def consumer(self, plugin: str) -> Consumer:
        """The lane of one plugin."""

    async def sent(self, deliveries: Sequence[Delivery]) -> None:
        """Attempts begin, of any plugins; when this returns a crash of the host counts them: they may be sent."""

    async def replay(self, event_id: str, plugin: str | None = None) -> list[str]:
        """Queue finished deliveries again (those that are dead when no plugin is named); returns the plugins."""

    async def purge(self, plugin: str) -> int:
        """Forget a removed plugin's deliveries; returns how many were not final."""


@dataclass(frozen=True, slots=True)
class DeliveryRow:
    """One delivery as listings show it."""

    event_id: str
    event: str
    plugin: str
    state: str
    attempts: int
    status: str | None
    detail: str | None
    reply: str | None
    latency_us: int | None
    updated: float
    next_attempt: float | None = None


@dataclass(frozen=True, slots=True)
class EventRow:
    """One event as listings show it, with its deliveries."""

    id: str
    name: str
    time: str
    accepted: float
    subject: str
    payload: dict[str, Any]
    by: str | None = None
    deliveries: tuple[DeliveryRow, ...] = field(default=())
