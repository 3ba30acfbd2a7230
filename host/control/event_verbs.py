"""What the control socket can do with events, and how the platform serves its own host-API methods.

A platform process registers a method with ``api.register`` on its connection. A plugin's call then arrives there as the
notification ``api.call`` with a number, and is answered with ``api.answer``. When the connection closes, its methods
are gone and open calls fail: a plugin never waits for a platform that has died.
"""

from __future__ import annotations

import asyncio
import dataclasses
import json
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from host.channel.reply import RETRY_LATER
from host.control.server import Caller, Method, Reply, number, text
from host.events import from_schema
from host.host_api import PLATFORM_TIMEOUT, ApiError, Context
from host.queue.interface import FINAL, Accepted, DeliveryRow, EventRow
from isolator.audit.schema import EventReplayed
from isolator.errors import UsageError
from isolator.policy.names import parse_permission

if TYPE_CHECKING:
    from host.host import Host

MAX_WAIT = 3600.0


class EventMethods:
    """The verbs of one host."""

    def __init__(self, host: Host) -> None:
        self._host = host
        self._calls: dict[int, tuple[Caller, asyncio.Future[dict[str, Any]]]] = {}
        self._numbers = 0

    def table(self) -> dict[str, Method]:
        """Every verb with the role it needs."""
        operator = {"event.replay": self.event_replay, "event.register": self.event_register}
        emitter = {"event.wait": self.event_wait, "api.answer": self.api_answer}
        viewer = {
            "event.list": self.event_list,
            "event.show": self.event_show,
            "event.dead": self.event_dead,
            "event.types": self.event_types,
        }
        return {
            **{name: Method("operator", handler, recorded=True) for name, handler in operator.items()},
            **{name: Method("emitter", handler) for name, handler in emitter.items()},
            **{name: Method("viewer", handler) for name, handler in viewer.items()},
            "api.register": Method("emitter", self.api_register, recorded=True),
            "event.emit": Method(
                "emitter", quick=self.event_emit, full=self._host.trail_is_far_behind, room=self._host.room_in_the_trail
            ),
        }

    def event_emit(self, params: Mapping[str, Any], caller: Caller, reply: Reply) -> None:
        """Accept one event."""
        payload = params.get("payload", {})
        if not isinstance(payload, dict):
            raise UsageError("event", "the payload must be an object")
        dedupe_key, trace, ttl = params.get("dedupe_key"), params.get("trace"), params.get("ttl")
        if dedupe_key is not None and not (isinstance(dedupe_key, str) and 0 < len(dedupe_key) <= 256):
            raise UsageError("event", "dedupe_key must be text of at most 256 characters")
        if trace is not None and not (isinstance(trace, str) and len(trace) <= 128):
            raise UsageError("event", "trace must be text of at most 128 characters")
        if ttl is not None:
            ttl = number(params, "ttl", 0.0, 31 * 86400.0)

        def done(accepted: Accepted | None, error: Exception | None) -> None:
            if accepted is None:
                reply(None, error)
                return
            answer = {
                "id": accepted.event.id,
                "plugins": list(accepted.plugins),
                "overflowed": list(accepted.overflowed),
                "duplicate": accepted.duplicate,
            }
            reply(answer, None)

        name = text(params, "name")
        self._host.emit(name, payload, done, by=caller.by, dedupe_key=dedupe_key, ttl=ttl, trace=trace)

    async def event_wait(self, params: Mapping[str, Any], _: Caller) -> dict[str, Any]:
        """Wait until every delivery of an event is final, at most ``timeout`` seconds."""
        timeout = number(params, "timeout", 30.0, MAX_WAIT)
        return self._with_reasons(await self._host.queue.wait(text(params, "id"), timeout=timeout))

    async def event_list(self, params: Mapping[str, Any], _: Caller) -> dict[str, Any]:
        """The newest events."""
        rows = await self._host.queue.list_events(limit=number(params, "limit", 50, 10_000), name=params.get("event"))
        return {"events": [{**_fields(row), "deliveries": [_fields(d) for d in row.deliveries]} for row in rows]}

    async def event_show(self, params: Mapping[str, Any], _: Caller) -> dict[str, Any]:
        """One event with its deliveries."""
        return self._with_reasons(self._host.queue.show(text(params, "id")))

    def _with_reasons(self, row: EventRow) -> dict[str, Any]:
        """The event as it is shown; a delivery that waits says what for."""
        deliveries = [_fields(delivery) for delivery in row.deliveries]
        for delivery in deliveries:
            if delivery["state"] not in FINAL:
                delivery["holding"] = self._host.dispatcher.status(delivery["plugin"])["holding"]
        return {**_fields(row), "deliveries": deliveries}

    async def event_dead(self, params: Mapping[str, Any], _: Caller) -> dict[str, Any]:
        """Deliveries that were given up."""
        rows = await self._host.queue.list_dead(
            plugin=params.get("plugin"), limit=number(params, "limit", 1000, 100_000)
        )
        return {"deliveries": [_fields(row) for row in rows]}

    async def event_replay(self, params: Mapping[str, Any], caller: Caller) -> dict[str, Any]:
        """Queue what was given up again; with ``plugin`` also what succeeded there."""
        event_id, plugin = text(params, "id"), params.get("plugin")
        if plugin is not None:
            self._host.registry.need(str(plugin))
        attempts = {row.plugin: row.attempts for row in self._host.queue.show(event_id).deliveries}
        plugins = await self._host.queue.replay(event_id, plugin)
        if not plugins:
            raise UsageError(f"event {event_id}", "no delivery of it was given up", "name a --plugin to repeat one")
        for name in plugins:
            self._host.audit.record(
                EventReplayed(reason="operator", attempts=attempts.get(name, 0), by=caller.by),
                plugin=name,
                event_id=event_id,
                delivery_id=f"{event_id}.{name}",
            )
        return {"id": event_id, "plugins": plugins}

    async def event_types(self, _: Mapping[str, Any], __: Caller) -> dict[str, Any]:
        """The catalogue with the JSON Schema of every payload."""
        types = [
            {"name": t.name, "version": t.version, "order_by": t.order_by, "filled": t.filled, "schema": t.schema()}
            for t in self._host.catalogue
        ]
        return {"types": types}

    async def event_register(self, params: Mapping[str, Any], caller: Caller) -> dict[str, Any]:
        """Register or replace an event of the platform's own."""
        name, schema, order_by = text(params, "name"), params.get("schema"), params.get("order_by")
        version = number(params, "version", 1, 10_000)
        if not isinstance(schema, dict):
            raise UsageError(f"event {name}", "schema must be a JSON Schema object")
        self._host.catalogue.register(from_schema(name, schema, order_by, version))
        row = (name, json.dumps(schema), order_by, version, caller.by)
        await self._host.store.run(lambda db: db.execute("INSERT OR REPLACE INTO event_types VALUES (?,?,?,?,?)", row))
        return {"name": name, "version": version}

    # The platform's part of the host API

    async def api_register(self, params: Mapping[str, Any], caller: Caller) -> dict[str, Any]:
        """Serve a host-API method on this connection until it closes."""
        method = text(params, "method")
        try:
            permission = parse_permission(text(params, "permission"))
        except ValueError as error:
            raise UsageError(f"method {method}", str(error)) from None

        async def forward(context: Context, given: Mapping[str, Any]) -> Any:
            return await self._forward(caller, method, context, given)

        caller.on_close.append(self._host.api.register(method, permission, forward))
        return {"method": method, "permission": permission}

    async def api_answer(self, params: Mapping[str, Any], caller: Caller) -> dict[str, Any]:
        """Answer an ``api.call``: ``{call, result}`` or ``{call, error: {code, message}}``."""
        entry = self._calls.get(number(params, "call", -1, 1 << 53))
        if entry is None or entry[0] is not caller:
            raise UsageError("api.answer", "no such call is open on this connection", "it may have timed out")
        if not entry[1].done():
            entry[1].set_result(dict(params))
        return {}

    async def _forward(self, caller: Caller, method: str, context: Context, given: Mapping[str, Any]) -> Any:
        self._numbers += 1
        call = self._numbers
        future: asyncio.Future[dict[str, Any]] = asyncio.get_running_loop().create_future()
        self._calls[call] = (caller, future)

        def gone() -> None:
            if not future.done():
                future.set_exception(ApiError(RETRY_LATER, "the platform went away", retry_after_ms=1000))

        caller.on_close.append(gone)
        try:
            caller.notify("api.call", {"call": call, "method": method, "plugin": context.plugin.name, "params": given})
            async with asyncio.timeout(PLATFORM_TIMEOUT):
                answer = await future
        except TimeoutError:
            raise ApiError(RETRY_LATER, "the platform does not answer", retry_after_ms=1000) from None
        finally:
            del self._calls[call]
            caller.on_close.remove(gone)
        error = answer.get("error")
        if isinstance(error, dict):
            code = error.get("code")
            raise ApiError(code if isinstance(code, int) else -32603, str(error.get("message", "failed"))[:400])
        return answer.get("result")


def _fields(row: EventRow | DeliveryRow) -> dict[str, Any]:
    """The fields by name; ``dataclasses.asdict`` copies deeply, which takes a millisecond for fifty deliveries."""
    return {field.name: getattr(row, field.name) for field in dataclasses.fields(row)}
