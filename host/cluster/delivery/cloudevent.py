"""Text of an event in the log: a CloudEvent, with what the queue keeps of an event beside it."""

from __future__ import annotations

import re
from datetime import datetime
from typing import Any, Final, NamedTuple

from host.events import MAX_PAYLOAD, NAME, format_time
from host.queue.interface import Event, NewEvent
from host.wire.strict_json import MAX_DEPTH, dumps, parse_object

LONGEST_TTL: Final = 31 * 86400.0
"""Seconds after its acceptance at which an event of another host expires at the latest."""
_ID = re.compile(r"ev_[0-9a-f]{28}\Z")
_SHORT = 1024
"""Characters of a subject, and of the other texts beside the payload."""


class Emitted(NamedTuple):
    """An event as another host emitted it; ``expires`` in Unix time, ``payload`` compact JSON, not validated yet."""

    id: str
    name: str
    time: str
    subject: str
    expires: float
    payload: str
    trace: str | None
    by: str | None


def write(event: Event, new: NewEvent, source: str) -> str:
    """The text of an event that ``source``, a host, emits."""
    attributes: dict[str, Any] = {
        "specversion": "1.0",
        "id": event.id,
        "source": source,
        "type": event.name,
        "time": event.time,
        "expirytime": format_time(event.expires),
        "datacontenttype": "application/json",
    }
    others = {"subject": event.subject, "traceparent": event.trace, "by": new.by}
    attributes |= {name: value for name, value in others.items() if value}
    return f'{dumps(attributes)[:-1]},"data":{event.payload}}}'


def read(text: str) -> Emitted:
    """The event of a text, which may come from a hostile host; raises ValueError for one that no host writes."""
    found = parse_object(text.encode(), max_depth=MAX_DEPTH + 1)
    texts = {name: found.get(name, "") for name in ("id", "type", "time", "subject", "traceparent", "by")}
    if not all(isinstance(value, str) and len(value) <= _SHORT for value in texts.values()):
        raise ValueError("an attribute is no short text")
    if not _ID.match(texts["id"]) or not NAME.match(texts["type"]):
        raise ValueError("no id or type of an event")
    accepted, expires = _moment(texts["time"]), _moment(str(found.get("expirytime")))
    payload = dumps(found.get("data"))
    if not isinstance(found.get("data"), dict) or len(payload) > MAX_PAYLOAD:
        raise ValueError("its data are no payload")
    return Emitted(
        texts["id"],
        texts["type"],
        texts["time"],
        texts["subject"],
        min(expires, accepted + LONGEST_TTL),
        payload,
        texts["traceparent"] or None,
        texts["by"] or None,
    )


def _moment(text: str) -> float:
    moment = datetime.fromisoformat(text)
    if moment.tzinfo is None:
        raise ValueError("a time without an offset")
    return moment.timestamp()
