"""Promises of a durable delivery queue, whatever keeps it.

A queue accepts an event once and delivers it to each subscribed plugin at least once. ``accept`` returns when the
event and all its deliveries are safe. Per plugin a ``Consumer`` hands out deliveries: in the order of acceptance
within one key, keys in parallel, and never two of one key at a time. The taker ends each with exactly one of four
calls, named as in NATS JetStream: ``ack`` (handled), ``term`` (given up), ``nak`` (again later) or ``release`` (as if
never taken).
"""

from __future__ import annotations

import sqlite3
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple, Protocol

from isolator.base.pacing import Backoff
from isolator.ipc.body import Body

State = Literal[
    "queued", "starting", "in_flight", "retry", "ok", "skipped", "dead", "expired", "quarantined", "cancelled", "moved"
]
DEFAULT_TTL = 7 * 86400.0
"""Seconds after which an undelivered event expires."""
FINAL: frozenset[str] = frozenset({"ok", "skipped", "dead", "expired", "quarantined", "cancelled", "moved"})
"""``moved``: another host of the cluster has the plugin, and goes on with the delivery."""
QUEUE_FULL = "queue_full"
"""Reason of a delivery that is dead from the start: the plugin's queue had no room."""
RETRY_BACKOFF = Backoff(1.0, 600.0, spread=0.2)
"""Pauses before a failed delivery's next attempt: 1·2ⁿ seconds, at most ten minutes, ±20 %."""


class Event(NamedTuple):
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


class NewEvent(NamedTuple):
    """An event as ``accept`` takes it; ``ttl`` in seconds, ``payload`` compact JSON."""

    name: str
    payload: str
    subject: str = ""
    dedupe_key: str | None = None
    ttl: float = DEFAULT_TTL
    trace: str | None = None
    by: str | None = None
    on_behalf_of: str | None = None
    """The person for whom ``by`` emits it, on the caller's word."""


class Subscriber(NamedTuple):
    """A plugin that gets the event; ``key`` is None where no order is kept."""

    plugin: str
    key: str | None


Prepare = Callable[[Event], None]
"""Prepares the request of the first attempt of an event, which is sent once that is safe, or never."""


class Accepted(NamedTuple):
    """The outcome of ``accept``; ``overflowed`` names the plugins whose queue was full (their delivery is dead)."""

    event: Event
    plugins: tuple[str, ...]
    overflowed: tuple[str, ...] = ()
    duplicate: bool = False


@dataclass(slots=True, eq=False)
class Delivery:
    """One event on its way to one plugin. ``attempts`` counts attempts that were sent, this one not included.

    ``due`` and ``expires`` are loop times in seconds; ``due`` 0 means at once.
    """

    seq: int
    plugin: str
    key: str | None
    attempts: int = 0
    crashes: int = 0
    expires: float = 0.0
    ready_at: float = 0.0
    """Loop time at which it could first be taken; only for latency figures."""
    counted: bool = False
    """Its next attempt is in the database already, though not in ``attempts``: it was counted with the event."""
    unreadable: int = 0
    """Answers that were no reply, since this process started."""
    due: float = 0.0
    event: Event | None = None
    """The event while a taker has the delivery, and of some that will soon be taken."""
    event_id: str = ""
    """Its name, once it was loaded."""
    taken: bool = False
    """A taker has it; otherwise it waits in its lane, unless it is ``final``."""
    final: bool = False
    """Set once the delivery has left its lane for good; a late ``ack``, ``nak``, ``term``, ``release`` does nothing."""
    busy: int = 0
    """Requests that were answered busy since this process started."""
    place: int = 0
    """Number of its newest entry in its lane's order."""
    ahead: Delivery | None = field(default=None, repr=False)
    """The one before it in the order of its key, in its lane."""
    behind: Delivery | None = field(default=None, repr=False)
    """The one after it."""
    epoch: int = 0
    """In a cluster the number of the lease under which it is sent; a later holder of its plugin has a higher one."""

    @property
    def id(self) -> str:
        """Name of the delivery in listings and in the trail; the event must have been loaded once."""
        assert self.event_id
        return f"{self.event_id}.{self.plugin}"

    def load(self, event: Event | None) -> None:
        """Hold the event; None: it is no longer stored."""
        self.event = event
        if event is not None:
            self.event_id = event.id


class Result(NamedTuple):
    """How an attempt ended, as it is stored: ``reply`` is already redacted and cut."""

    state: State
    status: str | None = None
    detail: str | None = None
    reply: str | None = None
    latency_us: int | None = None


class KeptState(Body):
    """A delivery's figures that are in no database, on their way to another host."""

    seq: int
    unreadable: int
    busy: int


class Consumer(Protocol):
    """One plugin's deliveries, for one taker."""

    @property
    def depth(self) -> int:
        """Deliveries that are not final, those in flight included."""

    @property
    def next_attempt(self) -> float | None:
        """Unix time at which the earliest delivery that waits for its retry is due; None if none waits."""

    @property
    def held_by(self) -> str | None:
        """Id of the event whose retry is that one."""

    async def take(
        self,
        on_delivery_pending: Callable[[bool], Prepare | None] | None = None,
        send_now: Callable[[Delivery], bool] | None = None,
        room: Callable[[], float] = lambda: 1.0,
    ) -> Delivery:
        """Wait for the next delivery that may be sent now; its event is loaded.

        ``on_delivery_pending(alone)`` is called while the taker waits and its next delivery is on the way to disk;
        ``alone``: it is the only one of its event. It returns None unless that delivery will be sent as soon as it is
        there: then its first attempt is counted with the event, and what it returns may be called meanwhile.
        ``send_now`` may be called while the taker waits, with a delivery that may be sent, and must not raise. It
        returns whether that is begun or concluded: then the taker goes on waiting, and else it takes the delivery.
        ``room()`` is the share of what it may have at a time that is free. Without any it goes on waiting for the end
        of a delivery, with which it is offered the next; with little, deliveries wait a moment to be offered together.
        """

    def ack(self, delivery: Delivery, result: Result) -> None:
        """End a taken delivery that the plugin handled: ``ok`` or ``skipped``."""

    def term(self, delivery: Delivery, result: Result) -> None:
        """Give a delivery up, taken or waiting, or end it on demand; only a replay repeats it."""

    def nak(self, delivery: Delivery, result: Result, *, delay: float) -> None:
        """Deliver again after ``delay`` seconds, also after a restart; later events of its key wait."""

    def release(self, delivery: Delivery) -> None:
        """Put a taken delivery back where it was: nothing was sent, no attempt counts."""

    def expedite(self, delivery: Delivery) -> Delivery | None:
        """Let a delivery that waits go at once; returns the earlier one of its key that has to go first, if any."""

    def count_crash(self, delivery: Delivery) -> None:
        """Count a crash of the plugin that the delivery is held responsible for."""

    def find(self, seq: int) -> Delivery | None:
        """The delivery of that event, unless it is final."""

    def retake(self, seq: int) -> Delivery | None:
        """The delivery of that event, which another host had taken and whose request it has sent; its event is loaded.

        None when there is no such delivery any more. Only for those that the queue was opened with (``in_flight``).
        """

    def pass_on(self) -> tuple[KeptState, ...]:
        """Let no attempt count that was not begun; returns what the database does not have, for another host."""

    def restore(self, kept: Iterable[KeptState]) -> None:
        """Take over what another host's consumer passed on."""


class Queue(Protocol):
    """A queue as dispatch and the control API use it, on one host or on several."""

    async def accept(self, event: NewEvent, subscribers: Sequence[Subscriber]) -> Accepted:
        """Keep the event and one delivery per subscriber; returns when both are safe."""

    def consumer(self, plugin: str) -> Consumer:
        """The deliveries of one plugin."""

    async def sent(self, deliveries: Sequence[Delivery]) -> None:
        """Count an attempt of each, of any plugins; they may be sent once this returns: the count survives a crash."""

    async def replay(self, event_id: str, plugin: str | None = None) -> list[str]:
        """Queue deliveries that were given up again, with ``plugin`` also what succeeded there; returns the plugins."""

    async def retry(self, event_id: str, plugin: str | None = None) -> list[Changed]:
        """Try deliveries that wait for their retry at once, each in its place; returns them."""

    async def end(self, event_id: str, plugin: str | None, result: Result) -> list[Changed]:
        """End the deliveries of an event that wait, in any way; returns them, none while one of them is in flight."""

    async def purge(self, plugin: str) -> int:
        """Forget a removed plugin's deliveries; returns how many were not final."""


@dataclass(frozen=True, slots=True)
class Changed:
    """A delivery that was changed on demand, with the attempts before."""

    plugin: str
    attempts: int


Beside = Callable[[sqlite3.Connection, Sequence[Changed]], None]
"""Something to write in the transaction of a change, which may run again."""


def nothing(_: sqlite3.Connection, __: Sequence[Changed]) -> None:
    """Write nothing beside a change."""


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
    host: str | None = None
    """The other host of the cluster that has it, or had it at its end; None: this one, or nobody."""


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
    size: int = 0
    """Bytes of its payload and replies here."""
    cut: bool = False
    """They are left out."""
