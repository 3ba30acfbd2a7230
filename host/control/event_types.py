"""Verbs and answers about events and their deliveries."""

from __future__ import annotations

from dataclasses import field
from typing import Annotated, Any, NotRequired, TypedDict

from host.control.parameters import Flag, Number, Object, OneOf, Request, Text, Whole
from host.control.terms import LARGEST, Name, OptionalText
from isolator.audit.schema import MAX_ID

MAX_WAIT = 3600.0
"""Seconds that ``event.wait`` may take."""
MAX_TTL = 31 * 86400.0
"""Seconds after which an event may expire at the latest."""
STORED_STATES = tuple("queued retry in_flight ok skipped dead expired quarantined cancelled moved".split())
"""States of deliveries as ``event.list`` can look for them."""


class Delivery(TypedDict):
    """One delivery of an event; ``holding``, of one that is not final: the reason why nothing is sent.

    ``host`` is the other host of the cluster that has it, or had it at its end.
    """

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
    next_attempt: float | None
    host: str | None
    holding: NotRequired[str | None]


class Event(TypedDict):
    """One event with its deliveries; ``cut``: its payload and their replies are left out here."""

    id: str
    name: str
    time: str
    accepted: float
    subject: str
    payload: dict[str, Any]
    by: str | None
    deliveries: list[Delivery]
    cut: NotRequired[bool]


class Emitted(TypedDict):
    """``kept_back``: why the event waits in this host's outbox, where the cluster's log takes none at the moment."""

    id: str
    plugins: list[str]
    overflowed: list[str]
    duplicate: bool
    kept_back: NotRequired[str]


class Events(TypedDict):
    events: list[Event]


class Deliveries(TypedDict):
    deliveries: list[Delivery]


class ChangedEvent(TypedDict):
    """An event, and the plugins whose deliveries were changed."""

    id: str
    plugins: list[str]


class Recovery(TypedDict):
    """A recovery as planned: the number of deliveries, and the id of its job; null where nothing was begun."""

    job: str | None
    plugin: str
    count: int


class RecoveryJob(TypedDict):
    """A recovery job; ``done`` of about ``total`` deliveries are queued; ``state``: running, done or cancelled."""

    id: str
    plugin: str
    dead: bool
    missed: bool
    rate: float
    by: str
    created: float
    state: str
    total: int
    done: int


class RecoveryJobs(TypedDict):
    jobs: list[RecoveryJob]


class EventEmit(Request, verb="event.emit", role="emitter", result=Emitted):
    """Accept one event; it and its deliveries are on disk when the answer comes.

    ``on_behalf_of``: the person for whom it is emitted; it is in the record ``event.accepted``, and gives no right.
    """

    name: Name
    payload: Annotated[dict[str, Any], Object("event", "the payload must be an object")] = field(default_factory=dict)
    dedupe_key: Annotated[str | None, Text(256, nullable=True)] = None
    ttl: Annotated[float | None, Number(MAX_TTL, nullable=True)] = None
    trace: Annotated[str | None, Text(128, least=0, nullable=True)] = None
    on_behalf_of: Annotated[str | None, Text(MAX_ID, nullable=True)] = None


class EventWait(Request, verb="event.wait", role="emitter", result=Event):
    """Wait until every delivery of an event is final, at most ``timeout`` seconds."""

    id: Name
    timeout: Annotated[float, Number(MAX_WAIT)] = 30.0


class EventList(Request, verb="event.list", role="viewer", result=Events):
    """List the newest events: those of one name, since a Unix time, with a delivery at a plugin and in a state.

    ``brief``: without payloads and replies, of which one answer has 4 MiB at most.
    """

    limit: Annotated[int, Whole(10_000)] = 50
    event: OptionalText = None
    plugin: OptionalText = None
    state: Annotated[str | None, OneOf(STORED_STATES)] = None
    since: Annotated[float, Number(LARGEST)] = 0.0
    brief: Annotated[bool, Flag()] = False


class EventShow(Request, verb="event.show", role="viewer", result=Event):
    """Show one event with its deliveries."""

    id: Name


class EventDead(Request, verb="event.dead", role="viewer", result=Deliveries):
    """List the dead letters, or those of one plugin."""

    plugin: OptionalText = None
    limit: Annotated[int, Whole(100_000)] = 1000


class EventReplay(Request, verb="event.replay", role="operator", recorded=True, result=ChangedEvent):
    """Queue the dead letters of an event again; with ``plugin`` also a delivery there that succeeded."""

    id: Name
    plugin: OptionalText = None


class EventRetry(Request, verb="event.retry", role="operator", recorded=True, result=ChangedEvent):
    """Try deliveries of an event that wait for their next attempt at once, each in its place in its key's order."""

    id: Name
    plugin: OptionalText = None


class EventSkip(Request, verb="event.skip", role="operator", recorded=True, result=ChangedEvent):
    """Pass an event over: its waiting deliveries, or that of one plugin, end as skipped, and their keys go on."""

    id: Name
    plugin: OptionalText = None


class EventCancel(Request, verb="event.cancel", role="operator", recorded=True, result=ChangedEvent):
    """Cancel an event (every delivery of it that is not final), or a recovery job: what it has queued stays."""

    id: Name


class EventRecover(Request, verb="event.recover", role="operator", recorded=True, result=Recovery):
    """Begin a job that queues what a plugin has missed, or was given up there, since a Unix time, at ``rate`` a second.

    Without ``dead`` and ``missed`` it is both. With ``dry_run`` only the plan is returned.
    """

    plugin: Name
    since: Annotated[float, Number(LARGEST)]
    dead: Annotated[bool, Flag()] = False
    missed: Annotated[bool, Flag()] = False
    rate: Annotated[float, Number(10_000.0)] = 20.0
    dry_run: Annotated[bool, Flag()] = False


class EventJobs(Request, verb="event.jobs", role="viewer", result=RecoveryJobs):
    """List the recovery jobs, those that ended too, the newest first."""
