"""Records of events and their deliveries."""

from __future__ import annotations

from typing import Literal

from isolator.audit.schema.base import ABSENT, HOST, RecordData, Summed


class EventAccepted(RecordData, type="event.accepted", sources=(HOST,)):
    """An event and its deliveries are on disk."""

    event: str
    """Name of the event's type."""
    subject: str
    """Key within which events stay in order."""
    bytes: int
    """Size of the payload."""
    sha256: str
    """Of the payload."""
    plugins: list[str]
    """Plugins that it is delivered to."""
    by: str | None
    """``uid:N`` of the caller."""
    number: int = ABSENT
    """Number of the event in the queue; grows, with gaps. A queue that is restored from before is noticed by it."""
    on_behalf_of: str = ABSENT
    """The person for whom the caller emitted it, on the caller's word."""
    accepted_at: str = ABSENT
    """UTC time when it was accepted, in a record that a later host process made: the one that accepted it ended first,
    or the machine. ``plugins`` are then those with a delivery on this host, and ``on_behalf_of`` is not known."""


class EventLost(RecordData, type="event.lost", sources=(HOST,)):
    """Events that a plugin of this host, of a cluster, will never get: nobody whom it can ask has them."""

    sender: str
    """The host that accepted them."""
    series: int
    """Of its outbox: numbers of another one are others'."""
    first: int
    last: int | None
    """Both of the numbers that the sender gave; null: up to its last of the series. Not all need be for the plugin."""
    why: str


class EventDispatched(
    RecordData,
    type="event.dispatched",
    sources=(HOST,),
    summed=Summed("after a reply of busy", covers=lambda data: "busy" in data),
):
    """An attempt begins: its first byte is sent after this record."""

    attempt: int
    """1 for the first."""
    queued_us: int | None
    """Time since the delivery was due; null when that is not known."""
    request_bytes: int
    request_sha256: str
    busy: int = ABSENT
    """Earlier requests of this delivery that were answered busy; such a reply is no attempt."""


class EventResponse(
    RecordData,
    type="event.response",
    sources=(HOST,),
    summed=Summed("`outcome` busy", covers=lambda data: data.get("outcome") == "busy"),
):
    """An attempt ended."""

    attempt: int
    outcome: Literal["ok", "skipped", "retry", "busy", "rejected", "failed", "unknown"]
    status: str | None
    """The plugin's own."""
    detail: str | None
    """The plugin's reason, or the fault; redacted."""
    latency_us: int
    """Duration from request to reply."""
    response_bytes: int
    response_sha256: str | None
    response: str | None
    """First 4 KiB of the reply, redacted."""


class _GivenUp(RecordData):
    reason: str
    attempts: int


class EventDead(_GivenUp, type="event.dead", sources=(HOST,)):
    """A delivery was given up."""


class EventQuarantined(_GivenUp, type="event.quarantined", sources=(HOST,)):
    """A delivery was given up because the plugin crashed of it."""


class EventReplayed(_GivenUp, type="event.replayed", sources=(HOST,)):
    """A delivery was queued again on demand."""

    by: str
    """``uid:N`` of the caller."""


class EventRetried(RecordData, type="event.retried", sources=(HOST,)):
    """A delivery that waited for its next attempt was tried at once, on demand."""

    attempts: int
    """Attempts before."""
    by: str
    """``uid:N`` of the caller."""


class EventSkipped(EventRetried, type="event.skipped", sources=(HOST,)):
    """A delivery that waited was passed over on demand; later events of its key go on."""


class EventCancelled(EventRetried, type="event.cancelled", sources=(HOST,)):
    """A delivery that waited was cancelled on demand, with all of its event's."""
