"""Event catalogue: the types of events, the models of their payloads, and the field that orders each.

A payload is a typed model: unknown fields, wrong types and missing required fields are refused when the platform
emits, so that a plugin never sees anything else. Times are RFC 3339 text in UTC. Fields that the host can know
itself (``finished_at`` and the like) are filled in. A hook may be subscribed by an older spelling; the plugin then
receives that spelling as its method.

Adding an optional field is a minor change. Removing, renaming or retyping one makes a new major: the event type
then carries a ``down`` function to the major below, and plugins whose ``api_version`` is lower get the translation.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError

from host.schemas.compatible import difference
from host.schemas.model import make
from host.schemas.shape import Record, read
from host.wire.strict_json import dumps
from isolator.errors import NotFoundError, UsageError
from isolator.policy.names import OLDER_HOOKS

OPERATIONAL = "isolator."
"""Begin of the names of operational events, which the daemon alone emits."""
MAX_PAYLOAD = 64 * 1024
NAME = re.compile(r"^[a-z][a-z0-9_]*(\.[a-z][a-z0-9_]*){1,4}$")


def _timestamp(value: str) -> str:
    """RFC 3339 with an offset, normalised to UTC with ``Z``."""
    try:
        moment = datetime.fromisoformat(value)
    except ValueError:
        raise ValueError("not an RFC 3339 time such as 2026-03-12T10:11:12Z") from None
    if moment.tzinfo is None:
        raise ValueError("a time needs an offset, such as 2026-03-12T10:11:12Z")
    return format_time(moment)


def format_time(moment: datetime) -> str:
    """A moment as RFC 3339 text: UTC, milliseconds, ``Z``."""
    return moment.astimezone(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


Time = Annotated[str, Field(max_length=64, examples=["2026-03-12T10:11:12.000Z"]), AfterValidator(_timestamp)]
Id = Annotated[str, Field(min_length=1, max_length=128)]
Short = Annotated[str, Field(max_length=256)]
Text = Annotated[str, Field(max_length=2000)]
Url = Annotated[str, Field(max_length=2048, pattern=r"^https?://[^\s]+$", examples=["https://shop.example"])]
Count = Annotated[int, Field(ge=0)]


class Payload(BaseModel):
    """Base of every payload: strict, closed, immutable."""

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True, defer_build=True, protected_namespaces=())


class DeployStarted(Payload):
    """A deployment began."""

    project_id: Id
    deployment_id: Id
    started_at: Time
    project_name: Short | None = None
    environment: Short | None = None
    branch: Short | None = None
    commit_sha: Short | None = None
    commit_message: Text | None = None
    trigger: Short | None = None
    actor: Short | None = None


class DeployCompleted(Payload):
    """A deployment succeeded and serves ``url``."""

    project_id: Id
    deployment_id: Id
    url: Url
    duration_ms: Count
    finished_at: Time
    commit_sha: Short | None = None
    project_name: Short | None = None
    environment: Short | None = None
    branch: Short | None = None
    commit_message: Text | None = None


class DeployFailed(Payload):
    """A deployment failed; ``error_code`` says in which way."""

    project_id: Id
    deployment_id: Id
    error_code: Short
    finished_at: Time
    stage: Short | None = None
    message: Text | None = None
    exit_code: int | None = None
    duration_ms: Count | None = None
    commit_sha: Short | None = None
    environment: Short | None = None
    branch: Short | None = None
    log_url: Url | None = None


class ProjectCreated(Payload):
    """A project was created."""

    project_id: Id
    name: Short
    created_at: Time
    slug: Short | None = None
    repo_url: Short | None = None
    default_branch: Short | None = None
    framework: Short | None = None


class ErrorDetected(Payload):
    """An application reported errors that share ``fingerprint``."""

    project_id: Id
    error_id: Id
    fingerprint: Id
    level: Literal["debug", "info", "warning", "error", "fatal"]
    count: Count
    title: Short | None = None
    environment: Short | None = None
    deployment_id: Id | None = None
    url: Url | None = None
    first_seen: Time | None = None
    last_seen: Time | None = None


class DomainAdded(Payload):
    """A domain was attached to a project."""

    project_id: Id
    domain: Annotated[str, Field(min_length=1, max_length=253, examples=["shop.example"])]
    added_at: Time
    environment: Short | None = None
    is_primary: bool | None = None
    tls: Short | None = None


class _About(Payload):
    """Base of operational events: the number of the trail's record with the details, and when it was made."""

    record: Count
    at: Time | None = None


class PluginFailed(_About):
    """A plugin failed too often and is not started again by itself."""

    plugin: Id


class DeliveryDead(_About):
    """A plugin's delivery was given up, the first one since its last success."""

    plugin: Id
    state: Literal["dead", "quarantined"]
    event_id: Id | None = None
    event: Short | None = None


class Denied(_About):
    """A plugin was refused a thing of this kind, for the first time in this version and grant."""

    plugin: Id
    kind: Literal["connection", "lookup", "call", "file", "api"]


class UpdatePending(_About):
    """A version waits for an operator's approval."""

    plugin: Id
    version: Short


class QueueHigh(_About):
    """A plugin's queue has reached four fifths of its limit; it has to fall below half before the next event."""

    plugin: Id
    depth: Count
    limit: Count


class AuditBlocked(_About):
    """The trail cannot be written; ``record`` is the last that was seen before."""


# In one-shot mode optional fields are dropped in this order until the request fits; others follow, longest first.
DROP_ORDER = ("commit_message", "message", "title", "log_url", "branch", "environment", "project_name", "actor")


@dataclass(frozen=True)
class EventType:
    """Event type: one entry of the catalogue."""

    name: str
    model: type[BaseModel]
    order_by: str | None
    """Payload field whose value orders deliveries; None means no order is kept."""
    filled: str | None = None
    """Time field set by the host when the platform leaves it out."""
    version: int = 1
    down: Mapping[int, Callable[[dict[str, Any]], dict[str, Any]]] = field(default_factory=dict)
    """``down[n]`` turns a payload of major n into one of major n - 1."""
    shape: Record | None = None
    """Values that its payloads may have; None for one that is built in."""

    def surprise(self, newer: EventType) -> str | None:
        """Find what a plugin that knows this type would not expect of a newer payload; None if all is as before."""
        if self.shape is None or newer.shape is None:
            return None
        if self.order_by != newer.order_by:
            return f"events are ordered by {newer.order_by or 'nothing'} instead of {self.order_by or 'nothing'}"
        return difference(self.shape, newer.shape, keeps_optional=True)

    def lacks(self, older: EventType) -> str | None:
        """Find what a plugin that knows this type would not expect of an older payload."""
        return difference(self.shape, older.shape) if self.shape is not None and older.shape is not None else None

    def optional_fields(self) -> tuple[str, ...]:
        """Return the optional fields in the order in which one-shot requests drop them."""
        names = [name for name, info in self.model.model_fields.items() if not info.is_required()]
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
        schema = self.model.model_json_schema()
        schema["$id"] = f"isolator:schema/{self.name}/{self.version}"
        return schema


@dataclass(frozen=True)
class Validated:
    """Payload that passed: its fields and its compact JSON."""

    type: EventType
    fields: dict[str, Any]
    json: str


BUILT_IN = (
    EventType("deploy.started", DeployStarted, "project_id", "started_at"),
    EventType("deploy.completed", DeployCompleted, "project_id", "finished_at"),
    EventType("deploy.failed", DeployFailed, "project_id", "finished_at"),
    EventType("project.created", ProjectCreated, "project_id", "created_at"),
    EventType("error.detected", ErrorDetected, "fingerprint"),
    EventType("domain.added", DomainAdded, "domain", "added_at"),
    EventType("isolator.plugin.failed", PluginFailed, "plugin"),
    EventType("isolator.delivery.dead", DeliveryDead, "plugin"),
    EventType("isolator.denied", Denied, "plugin"),
    EventType("isolator.update.pending", UpdatePending, "plugin"),
    EventType("isolator.queue.high", QueueHigh, "plugin"),
    EventType("isolator.audit.blocked", AuditBlocked, None, "at"),
)


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
        if event_type.order_by is not None and event_type.order_by not in event_type.model.model_fields:
            why = f"order_by names no field: {event_type.order_by}"
            raise UsageError(f"event {event_type.name}", why, f"one of {', '.join(event_type.model.model_fields)}")

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
            close = difflib.get_close_matches(name, self._types, 1)
            hint = f"did you mean {close[0]}?" if close else "see 'isolator event types'"
            raise NotFoundError(f"event {name}", "no such event", hint)
        return event_type

    def validate(self, name: str, payload: Mapping[str, Any]) -> Validated:
        """Check a payload and fill in the fields that the host knows; raises NotFoundError or UsageError."""
        event_type = self.need(name)
        if event_type.filled is not None and payload.get(event_type.filled) is None:
            payload = {**payload, event_type.filled: format_time(datetime.now(UTC))}
        try:
            model = event_type.model.model_validate(payload)
        except ValidationError as error:
            raise UsageError(f"event {name}", explain(error, event_type.model)) from None
        fields = model.model_dump(mode="json", exclude_none=True)
        text = dumps(fields)
        if len(text) > MAX_PAYLOAD:
            raise UsageError(f"event {name}", f"payload of {len(text)} bytes exceeds {MAX_PAYLOAD}")
        return Validated(event_type, fields, text)


def explain(error: ValidationError, model: type[BaseModel]) -> str:
    """Describe the errors of a document in one line, with a suggestion for a misspelt key."""
    parts: list[str] = []
    # A misspelt field first: it explains the missing one.
    problems = sorted(error.errors(), key=lambda item: item["type"] != "extra_forbidden")
    for item in problems[:3]:
        where = ".".join(str(part) for part in item["loc"]) or "the document"
        if item["type"] == "missing":
            parts.append(f"{where} is required")
        elif item["type"] == "extra_forbidden":
            close = difflib.get_close_matches(str(item["loc"][-1]), _fields_at(model, item["loc"][:-1]), 1)
            parts.append(f"unknown field {where}" + (f" (did you mean {close[0]}?)" if close else ""))
        else:
            parts.append(f"{where}: {item['msg'].removeprefix('Value error, ')}")
    more = len(problems) - 3
    return "; ".join(parts) + (f"; and {more} more" if more > 0 else "")


def _fields_at(model: type[BaseModel], loc: tuple[int | str, ...]) -> list[str]:
    for step in loc:
        info = model.model_fields.get(str(step))
        if info is not None:  # else an index, or a key of a table
            inner = next(_models(info.annotation), None)
            if inner is None:
                return []
            model = inner
    return list(model.model_fields)


def _models(annotation: Any) -> Iterator[type[BaseModel]]:
    """The models that an annotation names, at any depth."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for argument in getattr(annotation, "__args__", ()):
        yield from _models(argument)


def from_schema(
    name: str, schema: Mapping[str, Any], order_by: str | None = None, version: int = 1, *, stored: bool = False
) -> EventType:
    """Make a platform's event type from the JSON Schema of its payload; ``stored``: it was registered before.

    Raises UsageError for a keyword that would not be checked, and for names that the daemon or nobody has.
    """
    shape = read(name, schema, stored=stored)
    return EventType(name, make(name, shape, Payload, stored=stored), order_by, version=version, shape=shape)
