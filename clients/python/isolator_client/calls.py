# SPDX-FileCopyrightText: Isolator contributors
# SPDX-License-Identifier: Apache-2.0
"""The verbs that the clients offer as methods: how each is asked, and how its answer is read.

Both clients take them from here, so that they cannot differ in more than how they wait.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

T = TypeVar("T")

FINAL = frozenset({"ok", "skipped", "dead", "expired", "quarantined", "cancelled", "moved"})
"""States in which a delivery stays, unless an operator replays it."""

SUCCEEDED = frozenset({"ok", "skipped"})
"""Final states in which the plugin has done its part."""


@dataclass(frozen=True)
class Emitted:
    """An accepted event, which is on disk.

    ``plugins`` will get it; ``overflowed`` will not, because their queues are full. ``duplicate`` means that the
    dedupe key was used before: ``id`` is then that of the first event, and nothing new was queued.
    """

    id: str
    plugins: tuple[str, ...]
    overflowed: tuple[str, ...] = ()
    duplicate: bool = False


@dataclass(frozen=True)
class Delivered:
    """The state of one delivery: an event on its way to a plugin.

    ``status`` and ``detail`` come from the last attempt, ``reply`` is the plugin's answer as it was sent (redacted),
    ``latency_us`` the microseconds from the request to it.
    """

    plugin: str
    state: str
    attempts: int
    status: str | None
    detail: str | None
    reply: str | None
    latency_us: int | None

    @property
    def final(self) -> bool:
        """Whether no further attempt will be made."""
        return self.state in FINAL

    @property
    def succeeded(self) -> bool:
        """Whether the plugin has done its part, or had none to do."""
        return self.state in SUCCEEDED


@dataclass(frozen=True)
class Health:
    """How one plugin is doing; ``why``, of one that is not ``healthy``, is the reason in one line.

    ``last`` is the newest attempt that has ended (``event_id``, ``outcome``, ``status``, ``detail``, ``at``), ``ping``
    the last ping (``at``, ``ok``, ``latency_us``, ``misses``, ``detail``), ``paused`` an operator's pause (``since``,
    ``by``); each may be None. Times are Unix seconds, but for ``started_at``.
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
    paused: dict[str, Any] | None
    last: dict[str, Any] | None
    failing_since: float | None
    next_attempt: float | None
    ping: dict[str, Any] | None


@dataclass(frozen=True)
class Staged:
    """A plugin that was handed over and is not registered yet; it is forgotten when the connection closes.

    ``proposal`` is what it asks for and would be granted, line by line; ``differences`` and ``unchanged`` compare it
    with the version that is ``registered``. ``missing`` are config values that it needs.
    """

    token: str
    name: str
    version: str
    digest: str
    registered: bool
    unchanged: bool
    proposal: dict[str, Any]
    differences: tuple[str, ...]
    warnings: tuple[str, ...]
    missing: tuple[str, ...]


@dataclass(frozen=True)
class Call(Generic[T]):
    """One verb with its parameters, and how to read the answer."""

    method: str
    params: dict[str, Any]
    read: Callable[[dict[str, Any]], T]


def emit(
    name: str,
    payload: Mapping[str, Any],
    dedupe_key: str | None,
    ttl: float | None,
    traceparent: str | None,
    on_behalf_of: str | None = None,
) -> Call[Emitted]:
    """Emit an event."""
    options = {"dedupe_key": dedupe_key, "ttl": ttl, "trace": traceparent, "on_behalf_of": on_behalf_of}
    given = {key: value for key, value in options.items() if value is not None}
    return Call("event.emit", {"name": name, "payload": dict(payload), **given}, _emitted)


def wait(event_id: str, timeout: float) -> Call[list[Delivered]]:
    """Wait for the deliveries of an event."""
    return Call("event.wait", {"id": event_id, "timeout": timeout}, _deliveries)


def register_event(
    name: str, schema: Mapping[str, Any], order_by: str | None, version: int, breaking: bool = False
) -> Call[None]:
    """Register an event type."""
    params = {"name": name, "schema": dict(schema), "order_by": order_by, "version": version}
    return Call("event.register", {**params, **({"breaking": True} if breaking else {})}, _nothing)


def unregister_event(name: str) -> Call[None]:
    """Forget an event type."""
    return Call("event.unregister", {"name": name}, _nothing)


def unregister_method(method: str) -> Call[None]:
    """Serve a method of the host API no longer."""
    return Call("api.unregister", {"method": method}, _nothing)


def health(name: str | None) -> Call[list[Health]]:
    """Tell how the plugins, or one of them, are doing."""
    return Call("plugin.health", {} if name is None else {"name": name}, _health)


def stage(files: Mapping[str, str], **options: Any) -> Call[Staged]:
    """Show a plugin that was handed over; options that are None are left out."""
    given = {key: value for key, value in options.items() if value is not None}
    return Call("plugin.stage", {**files, **given}, _staged)


def commit(staged: Staged, config: Mapping[str, str] | None) -> Call[dict[str, Any]]:
    """Register what was staged."""
    return Call("plugin.commit", {"token": staged.token, "config": dict(config or {})}, _plugin)


def update(staged: Staged, config: Mapping[str, str] | None, approve: bool) -> Call[dict[str, Any]]:
    """Exchange the version in use for the staged one."""
    params = {"token": staged.token, "config": dict(config or {}), "approve": approve}
    return Call("plugin.update", params, _plugin)


def discard(staged: Staged) -> Call[None]:
    """Forget what was staged."""
    return Call("plugin.discard", {"token": staged.token}, _nothing)


def register_method(method: str, permission: str) -> Call[None]:
    """Register a method of the host API."""
    return Call("api.register", {"method": method, "permission": permission}, _nothing)


def plugins() -> Call[list[dict[str, Any]]]:
    """List the plugins."""
    return Call("plugin.list", {}, lambda answer: list(answer.get("plugins", ())))


def follow(params: Mapping[str, int]) -> Call[int | None]:
    """Follow the audit trail; the answer is the number of the record before the first that will come."""
    return Call("audit.follow", dict(params), lambda answer: answer.get("after"))


def _emitted(answer: Mapping[str, Any]) -> Emitted:
    overflowed, duplicate = tuple(answer.get("overflowed", ())), bool(answer.get("duplicate"))
    return Emitted(str(answer["id"]), tuple(answer["plugins"]), overflowed, duplicate)


def _deliveries(answer: Mapping[str, Any]) -> list[Delivered]:
    names = Delivered.__dataclass_fields__
    return [Delivered(**{name: row.get(name) for name in names}) for row in answer["deliveries"]]


def _health(answer: Mapping[str, Any]) -> list[Health]:
    return [Health(**{name: row.get(name) for name in Health.__dataclass_fields__}) for row in answer["plugins"]]


def _staged(answer: Mapping[str, Any]) -> Staged:
    values: dict[str, Any] = {name: answer[name] for name in Staged.__dataclass_fields__}
    values.update({name: tuple(value) for name, value in values.items() if isinstance(value, list)})
    return Staged(**values)


def _plugin(answer: Mapping[str, Any]) -> dict[str, Any]:
    return dict(answer["plugin"])


def _nothing(_: Mapping[str, Any]) -> None:
    return None
