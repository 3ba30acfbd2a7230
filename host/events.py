"""Event catalogue: the types of events, the shapes of their payloads, and the field that orders each.

A payload is checked by a shape: unknown fields, wrong types and missing required fields are refused when the platform
emits, so that a plugin never sees anything else. Times are RFC 3339 text in UTC. Fields that the host can know
itself (``finished_at`` and the like) are filled in. A hook may be subscribed by an older spelling; the plugin then
receives that spelling as its method.

Adding an optional field is a minor change. Removing, renaming or retyping one makes a new major: the event type
then carries a ``down`` function to the major below, and plugins whose ``api_version`` is lower get the translation.
"""

from __future__ import annotations

import functools
import os
import re
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any, NamedTuple

from host.schemas.check import check_of
from host.schemas.compatible import difference
from host.schemas.publish import json_schema
from host.schemas.shape import Choice, Many, Property, Record, Scalar, Shape, Table, read
from host.wire.strict_json import dumps
from isolator.audit.client import utc_second
from isolator.base.core import SchemaValidator, ValidationError
from isolator.errors import NotFoundError, UsageError, nearest
from isolator.policy.names import OLDER_HOOKS

OPERATIONAL = "isolator."
"""Begin of the names of operational events, which the daemon alone emits."""
MAX_PAYLOAD = 64 * 1024
NAME = re.compile(r"[a-z][a-z0-9_]*(\.[a-z][a-z0-9_]*){1,4}\Z")


@functools.lru_cache(maxsize=256)
def _timestamp(value: str) -> str:
    """RFC 3339 with an offset, normalised to UTC with ``Z``."""
    try:
        moment = datetime.fromisoformat(value)
    except ValueError:
        raise ValueError("not an RFC 3339 time such as 2026-03-12T10:11:12Z") from None
    if moment.tzinfo is None:
        raise ValueError("a time needs an offset, such as 2026-03-12T10:11:12Z")
    return moment.astimezone(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


def format_time(seconds: float) -> str:
    """Unix time as RFC 3339 text: UTC, milliseconds, ``Z``. Events that come together have the same."""
    return _format_milliseconds(int(seconds * 1000))


def new_event_id(now: float) -> str:
    """Make an event id: ``ev_``, 12 hex digits of milliseconds, 16 random ones. Sorts by time, cannot be guessed."""
    return f"ev_{int(now * 1000):012x}{random_hex()}"


def _random_hexes() -> Iterator[str]:
    while True:
        drawn = os.urandom(512).hex()
        for start in range(0, len(drawn), 16):
            yield drawn[start : start + 16]


random_hex = _random_hexes().__next__
"""16 hex digits that nobody can guess: 64 bits of the kernel's, drawn for many at a time."""


@functools.lru_cache(maxsize=4)
def _format_milliseconds(since: int) -> str:
    seconds, rest = divmod(since, 1000)
    return f"{utc_second(seconds)}.{rest:03d}Z"


_ID = Scalar("string", {"minLength": 1, "maxLength": 128})
_SHORT = Scalar("string", {"maxLength": 256})
_TEXT = Scalar("string", {"maxLength": 2000})
_COUNT = Scalar("integer", {"minimum": 0})
_TIME = Scalar("string", {"maxLength": 64}, ("2026-03-12T10:11:12.000Z",), then=_timestamp)
_URL = Scalar("string", {"maxLength": 2048, "pattern": r"^https?://[^\s]+$"}, ("https://shop.example",))
_FIELDS: dict[str, Shape] = {
    **dict.fromkeys("project_id deployment_id error_id fingerprint plugin event_id".split(), _ID),
    **dict.fromkeys(
        "project_name environment branch commit_sha trigger actor error_code stage name slug repo_url default_branch"
        " framework title tls event version".split(),
        _SHORT,
    ),
    **dict.fromkeys("commit_message message".split(), _TEXT),
    **dict.fromkeys("started_at finished_at created_at added_at first_seen last_seen at".split(), _TIME),
    **dict.fromkeys("duration_ms count record depth limit".split(), _COUNT),
    **dict.fromkeys("url log_url".split(), _URL),
    "exit_code": Scalar("integer"),
    "is_primary": Scalar("boolean"),
    "domain": Scalar("string", {"minLength": 1, "maxLength": 253}, ("shop.example",)),
    "level": Choice(("debug", "info", "warning", "error", "fatal")),
    "state": Choice(("dead", "quarantined")),
    "kind": Choice(("connection", "lookup", "call", "file", "api")),
}
"""Shapes of the fields of built-in events, which are the same in all of them."""


# In one-shot mode optional fields are dropped in this order until the request fits; others follow, longest first.
DROP_ORDER = ("commit_message", "message", "title", "log_url", "branch", "environment", "project_name", "actor")


@dataclass(frozen=True)
class EventType:
    """Event type: one entry of the catalogue."""

    name: str
    shape: Record
    """The values that its payloads may have."""
    order_by: str | None
    """Payload field whose value orders deliveries; None means no order is kept."""
    filled: str | None = None
    """Time field set by the host when the platform leaves it out."""
    version: int = 1
    down: Mapping[int, Callable[[dict[str, Any]], dict[str, Any]]] = field(default_factory=dict)
    """``down[n]`` turns a payload of major n into one of major n - 1."""
    about: str = ""

    @functools.cached_property
    def check(self) -> SchemaValidator:
        """The check of its payloads, which sets ``filled``; raises UsageError when none can be made of its shape."""
        return check_of(self.name, self.shape, self.filled, lambda: format_time(time.time()))

    def surprise(self, newer: EventType) -> str | None:
        """Find what a plugin that knows this type would not expect of a newer payload; None if all is as before."""
        if self.order_by != newer.order_by:
            return f"events are ordered by {newer.order_by or 'nothing'} instead of {self.order_by or 'nothing'}"
        return difference(self.shape, newer.shape, keeps_optional=True)

    def lacks(self, older: EventType) -> str | None:
        """Find what a plugin that knows this type would not expect of an older payload."""
        return difference(self.shape, older.shape)

    def optional_fields(self) -> tuple[str, ...]:
        """Return the optional fields in the order in which one-shot requests drop them."""
        names = [name for name, one in self.shape.fields.items() if not one.required]
        return (*(n for n in DROP_ORDER if n in names), *(n for n in names if n not in DROP_ORDER))

    def translate(self, payload: dict[str, Any], major: int) -> dict[str, Any]:
        """Translate a payload for a plugin of an older major; steps without a translation change nothing."""
        for version in range(self.version, max(major, 1), -1):
            step = self.down.get(version)
            if step is not None:
                payload = step(payload)
        return payload

    def schema(self) -> dict[str, Any]:
        """Return the JSON Schema of the payload."""
        title = "".join(part.title() for part in re.split(r"[._]", self.name.removeprefix(OPERATIONAL)))
        schema = json_schema(self.shape, title, self.about)
        return {**schema, "$id": f"isolator:schema/{self.name}/{self.version}"}


class Validated(NamedTuple):
    """Payload that passed: its fields and its compact JSON."""

    type: EventType
    fields: dict[str, Any]
    json: str


def _built_in(name: str, about: str, fields: str, order_by: str | None, filled: str | None = None) -> EventType:
    """Declare a type by its fields in order, those that may be missing with a question mark."""
    declared = {
        key.removesuffix("?"): Property(_FIELDS[key.removesuffix("?")], key[-1] != "?") for key in fields.split()
    }
    return EventType(name, Record(name, declared), order_by, filled, about=about)


BUILT_IN = (
    _built_in(
        "deploy.started", "A deployment began.",
        "project_id deployment_id started_at project_name? environment? branch? commit_sha? commit_message? trigger?"
        " actor?",
        "project_id", "started_at",
    ),
    _built_in(
        "deploy.completed", "A deployment succeeded and serves ``url``.",
        "project_id deployment_id url duration_ms finished_at commit_sha? project_name? environment? branch?"
        " commit_message?",
        "project_id", "finished_at",
    ),
    _built_in(
        "deploy.failed", "A deployment failed; ``error_code`` says in which way.",
        "project_id deployment_id error_code finished_at stage? message? exit_code? duration_ms? commit_sha?"
        " environment? branch? log_url?",
        "project_id", "finished_at",
    ),
    _built_in(
        "project.created", "A project was created.",
        "project_id name created_at slug? repo_url? default_branch? framework?",
        "project_id", "created_at",
    ),
    _built_in(
        "error.detected", "An application reported errors that share ``fingerprint``.",
        "project_id error_id fingerprint level count title? environment? deployment_id? url? first_seen? last_seen?",
        "fingerprint",
    ),
    _built_in(
        "domain.added", "A domain was attached to a project.",
        "project_id domain added_at environment? is_primary? tls?",
        "domain", "added_at",
    ),
    # Operational: ``record`` is the number of the trail's record with the details, ``at`` when it was made.
    _built_in(
        "isolator.plugin.failed", "A plugin failed too often and is not started again by itself.",
        "record at? plugin", "plugin",
    ),
    _built_in(
        "isolator.delivery.dead", "A plugin's delivery was given up, the first one since its last success.",
        "record at? plugin state event_id? event?", "plugin",
    ),
    _built_in(
        "isolator.denied",
        "A plugin was refused a thing of this kind, for the first time in this version and grant.",
        "record at? plugin kind", "plugin",
    ),
    _built_in(
        "isolator.update.pending", "A version waits for an operator's approval.",
        "record at? plugin version", "plugin",
    ),
    _built_in(
        "isolator.queue.high",
        "A plugin's queue has reached four fifths of its limit; it has to fall below half before the next event.",
        "record at? plugin depth limit", "plugin",
    ),
    _built_in(
        "isolator.audit.blocked",
        "The trail cannot be written; ``record`` is the last that was seen before.",
        "record at?", None, "at",
    ),
)  # fmt: skip


class Catalogue:
    """Event types of this daemon: those it ships and those the platform registered."""

    def __init__(self) -> None:
        self._types: dict[str, EventType] = {}
        for event_type in BUILT_IN:
            self.register(event_type)

    def __iter__(self) -> Iterator[EventType]:
        return iter(self._types.values())

    def check(self, event_type: EventType) -> None:
        """Raise UsageError for an event with a bad or taken name, or an order by a field that it does not have."""
        if not NAME.match(event_type.name):
            raise UsageError(f"event {event_type.name!r}", "not a dotted lower-case name", "such as 'backup.failed'")
        if event_type.name.startswith(OPERATIONAL) and event_type not in BUILT_IN:
            raise UsageError(f"event {event_type.name}", f"{OPERATIONAL}* are the daemon's own", "choose another name")
        built_in = self._types.get(event_type.name)
        if built_in is not None and built_in in BUILT_IN:
            raise UsageError(f"event {event_type.name}", "is built in", "choose another name")
        if event_type.order_by is not None and event_type.order_by not in event_type.shape.fields:
            why = f"order_by names no field: {event_type.order_by}"
            raise UsageError(f"event {event_type.name}", why, f"one of {', '.join(event_type.shape.fields)}")

    def register(self, event_type: EventType) -> None:
        """Add or replace a platform's event; raises UsageError as ``check`` does."""
        self.check(event_type)
        self._types[event_type.name] = event_type

    def unregister(self, name: str) -> None:
        """Forget a platform's event; raises NotFoundError for one that is not there, UsageError for a built-in one."""
        if self.need(name) in BUILT_IN:
            raise UsageError(f"event {name}", "is built in", "only a platform's own events can be unregistered")
        del self._types[name]

    def get(self, name: str) -> EventType | None:
        """Find an event type by its canonical name."""
        return self._types.get(name)

    def canonical(self, hook: str) -> str:
        """Return the canonical name of a hook's event, whichever way it is spelled."""
        return OLDER_HOOKS.get(hook, hook)

    def need(self, name: str) -> EventType:
        """Find an event type by either spelling of its name; raises NotFoundError."""
        event_type = self._types.get(self.canonical(name))
        if event_type is None:
            close = nearest(name, self._types)
            hint = f"did you mean {close}?" if close else "see 'isolator event types'"
            raise NotFoundError(f"event {name}", "no such event", hint)
        return event_type

    def validate(self, name: str, payload: Mapping[str, Any]) -> Validated:
        """Check a payload and fill in the fields that the host knows; raises NotFoundError or UsageError."""
        event_type = self.need(name)
        try:
            fields = event_type.check.validate_python(payload)
        except ValidationError as error:
            raise UsageError(f"event {name}", explain(error, event_type.shape)) from None
        text = dumps(fields)
        if len(text) > MAX_PAYLOAD:
            raise UsageError(f"event {name}", f"payload of {len(text)} bytes exceeds {MAX_PAYLOAD}")
        return Validated(event_type, fields, text)


def explain(error: ValidationError, shape: Record) -> str:
    """Describe the errors of a document in one line, with a suggestion for a misspelt key."""
    parts: list[str] = []
    # A misspelt field first: it explains the missing one.
    problems = sorted(error.errors(), key=lambda item: item["type"] != "extra_forbidden")
    for item in problems[:3]:
        where = ".".join(str(part) for part in item["loc"]) or "the document"
        if item["type"] == "missing":
            parts.append(f"{where} is required")
        elif item["type"] == "extra_forbidden":
            close = nearest(str(item["loc"][-1]), _fields_at(shape, item["loc"][:-1]))
            parts.append(f"unknown field {where}" + (f" (did you mean {close}?)" if close else ""))
        else:
            parts.append(f"{where}: {item['msg'].removeprefix('Value error, ')}")
    more = len(problems) - 3
    return "; ".join(parts) + (f"; and {more} more" if more > 0 else "")


def _fields_at(shape: Shape, loc: tuple[int | str, ...]) -> list[str]:
    for step in loc:
        match shape:
            case Record():
                shape = shape.fields[str(step)].shape
            case Many():
                shape = shape.item
            case Table():
                shape = shape.value
    return list(shape.fields) if isinstance(shape, Record) else []


def from_schema(
    name: str, schema: Mapping[str, Any], order_by: str | None = None, version: int = 1, *, stored: bool = False
) -> EventType:
    """Make a platform's event type from the JSON Schema of its payload; ``stored``: it was registered before.

    Raises UsageError for a keyword that would not be checked, and for names that the daemon or nobody has.
    """
    made = EventType(name, read(name, schema, stored=stored), order_by, version=version)
    if not stored:
        _ = made.check  # of one that is stored at the first payload
    return made
