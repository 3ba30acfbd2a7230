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

FINAL = frozenset({"ok", "skipped", "dead", "expired", "quarantined", "cancelled"})
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
class Call(Generic[T]):
    """One verb with its parameters, and how to read the answer."""

    method: str
    params: dict[str, Any]
    read: Callable[[dict[str, Any]], T]


def emit(
    name: str, payload: Mapping[str, Any], dedupe_key: str | None, ttl: float | None, traceparent: str | None
) -> Call[Emitted]:
    """Emit an event."""
    options = {"dedupe_key": dedupe_key, "ttl": ttl, "trace": traceparent}
    given = {key: value for key, value in options.items() if value is not None}
    return Call("event.emit", {"name": name, "payload": dict(payload), **given}, _emitted)


def wait(event_id: str, timeout: float) -> Call[list[Delivered]]:
    """Wait for the deliveries of an event."""
    return Call("event.wait", {"id": event_id, "timeout": timeout}, _deliveries)


def register_event(name: str, schema: Mapping[str, Any], order_by: str | None, version: int) -> Call[None]:
    """Register an event type."""
    params = {"name": name, "schema": dict(schema), "order_by": order_by, "version": version}
    return Call("event.register", params, _nothing)


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


def _nothing(_: Mapping[str, Any]) -> None:
    return None
