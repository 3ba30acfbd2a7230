"""Types of the verbs that platforms need: their event types, their methods of the host API, the health of plugins."""

from __future__ import annotations

from typing import Annotated, Any, TypedDict

from host.control.parameters import Flag, Json, Object, Request, Whole
from host.control.terms import LARGEST, Attempted, Name, Nothing, OptionalText, Pause

# Event types


class EventTypeEntry(TypedDict):
    """One event type of the catalogue, with the JSON Schema of its payload."""

    name: str
    version: int
    order_by: str | None
    filled: str | None
    schema: dict[str, Any]


class EventTypeList(TypedDict):
    types: list[EventTypeEntry]


class RegisteredEvent(TypedDict):
    name: str
    version: int


class EventTypes(Request, verb="event.types", role="viewer", result=EventTypeList):
    """List the event types with the JSON Schema of every payload."""


class EventRegister(Request, verb="event.register", role="operator", recorded=True, result=RegisteredEvent):
    """Register an event type of the platform's, or replace it by one that surprises no plugin.

    Refused is what a plugin that subscribes would not expect, or one that knows the new type would not expect of events
    that wait; ``breaking`` does it all the same.
    """

    name: Name
    schema: Annotated[dict[str, Any], Object("event", "schema must be a JSON Schema object")]
    order_by: OptionalText = None
    version: Annotated[int, Whole(10_000)] = 1
    breaking: Annotated[bool, Flag()] = False


class EventUnregister(Request, verb="event.unregister", role="operator", recorded=True, result=Nothing):
    """Forget an event type of the platform's; refused while plugins subscribe to it or its events wait."""

    name: Name


# The platform's part of the host API


class RegisteredMethod(TypedDict):
    method: str
    permission: str


class ApiRegister(Request, verb="api.register", role="emitter", recorded=True, result=RegisteredMethod):
    """Serve a method of the host API on this connection until it closes; calls come as ``api.call`` notifications."""

    method: Name
    permission: Name


class ApiAnswer(Request, verb="api.answer", role="emitter", repeatable=False, result=Nothing):
    """Answer an ``api.call`` with ``result``, or with ``error``: ``{code, message}``."""

    call: Annotated[int, Whole(LARGEST)]
    result: Annotated[Any, Json()] = None
    error: Annotated[Any, Json()] = None


class ApiUnregister(Request, verb="api.unregister", role="emitter", recorded=True, result=Nothing):
    """Serve a method no longer, which this connection has registered; calls that are open may still be answered."""

    method: Name


# Notifications to the caller


class ApiCall(TypedDict):
    """A plugin's call of a method that this connection serves; answered with ``api.answer``."""

    call: int
    method: str
    plugin: str
    params: dict[str, Any]


# Health


class HealthAnswer(TypedDict):
    """The last ping of a plugin: when (Unix time), whether it was answered, and how many in a row were not."""

    at: float
    ok: bool
    latency_us: int
    misses: int
    detail: str | None


class PluginHealthEntry(TypedDict):
    """One plugin as a platform shows it; ``why``, of one that is not ``healthy``: the reason, in one line.

    ``ping`` is null until this host process has pinged the plugin, ``last`` until it has concluded an attempt.
    """

    name: str
    version: str
    state: str
    healthy: bool
    why: str | None
    error: str | None
    run: str | None
    started_at: str | None
    restarts: int
    queue: int
    holding: str | None
    held_by: str | None
    paused: Pause | None
    last: Attempted | None
    failing_since: float | None
    next_attempt: float | None
    ping: HealthAnswer | None


class PluginsHealth(TypedDict):
    plugins: list[PluginHealthEntry]


class PluginHealth(Request, verb="plugin.health", role="viewer", result=PluginsHealth):
    """Tell how every plugin, or one, is doing: state, queue, last outcome, failing since when, last ping."""

    name: OptionalText = None
