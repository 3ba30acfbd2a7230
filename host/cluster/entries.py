"""Entries of a cluster's log, and the messages that carry them.

The log holds two subjects for each host: events (``ev``) and decisions (``ctl``). A message is a batch of entries of
one host, numbered one by one; it is sent again, byte by byte the same, until its sender has read it back. The sender is
known by the message's subject, never by its body.

Bodies come from other hosts, which may be hostile: ``decode`` takes them within its bounds or raises ValueError, and
readers pass over what they cannot read.
"""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass as plain_dataclass
from dataclasses import field
from typing import Annotated, Any, Final, Literal, NamedTuple, TypeAlias

from pydantic import ConfigDict, Field, StringConstraints, TypeAdapter
from pydantic.dataclasses import dataclass

FORMAT: Final = 1
MAX_MESSAGE: Final = 256 << 10
"""Bytes of a message."""
MAX_ENTRIES: Final = 4096
MAX_OPEN: Final = 1000
"""Deliveries of a shard that are not final: whoever holds it reads no further."""
MAX_TIMES: Final = 1_000_000
"""Attempts of a delivery that a position tells of; more are no more."""
MAX_READ: Final = 1000
"""Senders that a position tells of."""
MAX_LOST: Final = 256
"""Ranges of events that one entry calls lost."""
MAX_SCHEMA: Final = 64 << 10
"""Characters of the schema of an event type."""
_RANDOM_BITS = 20
MAX_NUMBER: Final = (1 << 53) - 1
"""The largest whole number that every JSON reader keeps exactly."""

Stream = Literal["ev", "ctl"]
Parting = Literal["", "stopped", "left"]
Name = Annotated[str, StringConstraints(max_length=1024)]
Host = Annotated[str, StringConstraints(max_length=63)]
Whole = Annotated[int, Field(ge=0, le=MAX_NUMBER)]
Times = Annotated[int, Field(ge=0, le=MAX_TIMES)]
_SUBJECT = re.compile(r"iso\.(ev|ctl)\.([a-z0-9](?:[a-z0-9-]{0,61}[a-z0-9])?)\Z")
_FORMAT_ALONE = re.compile(rb'"format":(?!1\})[0-9]+\}\Z')
_CHECKED = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False)


class Number(NamedTuple):
    """The place of an entry among those of its host and subject.

    ``series`` is the outbox's generation for events (random for each database), and the session for decisions, which
    ``next_session`` makes.
    """

    series: Whole
    number: Whole


def next_session(last: int, random: int) -> int:
    """A session after the ``last`` of this host that its database or the log knows; ``random`` is below 2**20.

    The higher session is the newer. By its random part it differs from one that is still under way from before the
    database was lost, whose decisions would be taken for this session's.
    """
    return ((last >> _RANDOM_BITS) + 1 << _RANDOM_BITS) + random


NOTHING: Final = Number(0, 0)
"""The number of a sender's entries before its first."""


class EventRef(NamedTuple):
    """An event of any host, by its sender's number."""

    host: Host
    series: Whole
    number: Whole


class Range(NamedTuple):
    """Numbers of a sender's events, both ends included; ``last`` is ``MAX_NUMBER`` where nobody knows it."""

    host: Host
    series: Whole
    first: Whole
    last: Whole

    def has(self, ref: EventRef) -> bool:
        """Whether an event is among them."""
        return (ref.host, ref.series) == (self.host, self.series) and self.first <= ref.number <= self.last

    def __str__(self) -> str:
        if self.first == self.last:
            return f"{self.host} {self.first}"
        return f"{self.host} {self.first} to {self.last if self.last < MAX_NUMBER else 'its last'}"


class Opened(NamedTuple):
    """A delivery that is not final, with the attempts that were sent and those that ended in a crash."""

    event: EventRef
    attempts: Times
    crashes: Times


@dataclass(frozen=True, slots=True, config=_CHECKED)
class Event:
    """An event for whoever subscribes; ``cloudevent`` is its JSON text, ``unique`` its dedupe key or empty."""

    cloudevent: str
    unique: Name = ""
    kind: Literal["event"] = "event"


@dataclass(frozen=True, slots=True, config=_CHECKED)
class Replay:
    """The wish to deliver an event once more to a plugin."""

    event: EventRef
    plugin: Name
    kind: Literal["replay"] = "replay"


@dataclass(frozen=True, slots=True, config=_CHECKED)
class OfHolder:
    """An entry that the holder of a shard writes, in the epoch in which it holds that."""

    plugin: Name
    shard: Whole
    epoch: Whole


@dataclass(frozen=True, slots=True, config=_CHECKED)
class Position(OfHolder):
    """How far a holder is with a shard: the last number that it read of each sender, and what it has open of them."""

    read: Annotated[tuple[EventRef, ...], Field(max_length=MAX_READ)] = ()
    open: Annotated[tuple[Opened, ...], Field(max_length=MAX_OPEN)] = ()


@dataclass(frozen=True, slots=True, config=_CHECKED)
class Beat:
    """A host's sign of life. ``place`` and ``digest`` say how far its fold is, and what it came to there.

    ``ready`` names the plugins that it could hold: it has the cluster's version of them, and they are enabled;
    ``lacking`` those that it does not take, because it does not have the events that wait for them. A host that ends
    its part says so with its last one (``parting``): it has ``stopped``, or has ``left`` the cluster.
    """

    labels: tuple[Name, ...] = ()
    version: Name = ""
    clock: Annotated[float, Field(ge=0)] = 0.0
    place: Whole = 0
    digest: Name = ""
    ready: tuple[Name, ...] = ()
    lacking: tuple[Name, ...] = ()
    positions: tuple[Position, ...] = ()
    parting: Parting = ""
    kind: Literal["beat"] = "beat"


NO_BEAT: Final = Beat()


@dataclass(frozen=True, slots=True, config=_CHECKED)
class Claim:
    """The wish to hold a shard of a plugin.

    It cites the last decision of the shard's holder; where there is none, ``holder`` is empty and ``cited`` is
    ``(0, P)`` with the place from which the shard is free.
    """

    plugin: Name
    shard: Whole
    digest: Name
    holder: Name = ""
    cited: Number = NOTHING
    kind: Literal["claim"] = "claim"


@dataclass(frozen=True, slots=True, config=_CHECKED)
class Release(OfHolder):
    """The end of a holder's work on a shard."""

    kind: Literal["release"] = "release"


@dataclass(frozen=True, slots=True, config=_CHECKED)
class KeyValue(OfHolder):
    """A value that a plugin keeps (``kv.set``); None removes it."""

    key: Name
    value: str | None
    kind: Literal["kv"] = "kv"


@dataclass(frozen=True, slots=True, config=_CHECKED)
class Ended(OfHolder):
    """A delivery that was given up, with its reason."""

    event: EventRef
    state: Name
    why: Name
    kind: Literal["ended"] = "ended"


@dataclass(frozen=True, slots=True, config=_CHECKED)
class Lost(OfHolder):
    """Events behind which a holder goes on although the plugin never got them: nobody whom it can ask has them."""

    events: Annotated[tuple[Range, ...], Field(max_length=MAX_LOST)]
    kind: Literal["lost"] = "lost"


@dataclass(frozen=True, slots=True, config=_CHECKED)
class Plugin:
    """A plugin of the cluster. The first one after a removal begins another incarnation."""

    name: Name
    digest: Name
    placement: Literal["one", "all"] = "one"
    shards: Annotated[int, Field(ge=1, le=64)] = 1
    labels: tuple[Name, ...] = ()
    removed: bool = False
    hooks: tuple[Name, ...] = ()
    """The events that this version wants: no host can change their types as if nobody minded."""
    kind: Literal["plugin"] = "plugin"


@dataclass(frozen=True, slots=True, config=_CHECKED)
class EventType:
    """A registered type of event, by its schema's text, or the wish to forget it.

    It counts if the type is still the one that it was compared with (``replaces``, its digest; empty: there was none),
    and, with ``unread``, if no plugin of the cluster wants such events.
    """

    name: Name
    schema: Annotated[str, StringConstraints(max_length=MAX_SCHEMA)]
    order_by: Name | None = None
    version: Annotated[int, Field(ge=0, le=1_000_000)] = 1
    by: Name = ""
    replaces: Name = ""
    unread: bool = False
    removed: bool = False
    kind: Literal["type"] = "type"

    @property
    def digest(self) -> str:
        """What tells this type from another of its name."""
        return hashlib.sha256(f"{self.version}\n{self.order_by or ''}\n{self.schema}".encode()).hexdigest()[:32]


@dataclass(frozen=True, slots=True, config=_CHECKED)
class VoidLeases:
    """The end of every lease: the log has lost its tail, so nobody knows who was promised what."""

    why: Name
    kind: Literal["void"] = "void"


OfEvents: TypeAlias = Event | Replay
OfDecisions: TypeAlias = Beat | Claim | Release | KeyValue | Ended | Lost | Plugin | EventType | VoidLeases
Entry: TypeAlias = OfEvents | OfDecisions


@dataclass(frozen=True, slots=True, config=_CHECKED)
class _Events:
    first: Number
    entries: Annotated[tuple[Annotated[OfEvents, Field(discriminator="kind")], ...], Field(max_length=MAX_ENTRIES)]
    format: Whole = FORMAT


@dataclass(frozen=True, slots=True, config=_CHECKED)
class _Decisions:
    first: Number
    entries: Annotated[tuple[Annotated[OfDecisions, Field(discriminator="kind")], ...], Field(max_length=MAX_ENTRIES)]
    format: Whole = FORMAT


_FORMS: dict[Stream, Any] = {"ev": _Events, "ctl": _Decisions}
_BODIES: dict[Stream, TypeAdapter[Any]] = {stream: TypeAdapter(form) for stream, form in _FORMS.items()}


class UnknownFormatError(ValueError):
    """A message of a newer version: whoever cannot read it does not know what the others decide."""


@plain_dataclass(frozen=True, slots=True)
class Message:
    """A batch of entries; the first has the number ``first``, each further one the next. ``body`` is as it was read."""

    host: str
    stream: Stream
    first: Number
    entries: tuple[Entry, ...]
    body: bytes = field(default=b"", compare=False, repr=False)


def subject(host: str, stream: Stream) -> str:
    """The subject that this host alone may publish to."""
    return f"iso.{stream}.{host}"


def encode(message: Message) -> bytes:
    """The body of a message; raises ValueError for one that no reader takes."""
    body = _BODIES[message.stream].dump_json(_FORMS[message.stream](message.first, message.entries))
    if len(body) > MAX_MESSAGE:
        raise ValueError(f"a message of {len(body)} bytes is too large")
    return body


def decode(published_to: str, body: bytes) -> Message:
    """The message of a subject; raises ValueError for anything that no host of this version writes."""
    match = _SUBJECT.match(published_to)
    if match is None:
        raise ValueError(f"no subject of hosts: {published_to[:100]!r}")
    if len(body) > MAX_MESSAGE:
        raise ValueError(f"a message of {len(body)} bytes is too large")
    stream: Stream = "ev" if match[1] == "ev" else "ctl"
    try:
        read: _Events | _Decisions = _BODIES[stream].validate_json(body)
    except ValueError:
        if _FORMAT_ALONE.search(body):
            raise UnknownFormatError("a message of a newer version") from None
        raise
    if read.format != FORMAT:
        raise UnknownFormatError(f"format {read.format}, which this version does not read")
    if read.first.number + len(read.entries) > MAX_NUMBER:
        raise ValueError("a number is too large")
    return Message(match[2], stream, read.first, read.entries, body)
