"""Host API: methods that a plugin may call, over ``PLUGIN_HOST_SOCKET`` or the stream connection.

The caller is known by its socket and by the uid that the kernel reports, never by its own claim. Every method needs one
permission, which the effective policy grants or not. Isolator brings ``whoami``, ``log.write`` and the
private key-value store; the platform registers the rest (``projects.get`` …) over the control socket and answers
them itself. Calls are limited to 200 a second per plugin, and every one is in the trail with its verdict; refusals
because of the rate are counted and recorded once a second, or a flood would only move into the trail.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from host.channel.calls import patient
from host.channel.reply import PERMISSION_DENIED, QUOTA_EXCEEDED, RETRY_LATER, shown
from host.fence.fences import Fences
from host.host_api.connection import CONNECTIONS, RATE, Connection, Limits
from host.host_api.methods import ApiError, ApiMethod, Context, Handler, KeyValue, hello, whoami
from host.plugins.logs import Logs
from host.plugins.registry import Plugin, Registry
from host.plugins.secrets import Redactor
from host.wire.lines import Acceptor, LineState
from isolator.audit.client import AuditClient
from isolator.audit.schema import ApiCalled, ApiVerdict, PluginHealth
from isolator.errors import IsolatorError
from isolator.ipc.body import Body
from isolator.ipc.succession import Departure, Descriptors
from isolator.policy.names import covers_permission

REFUSAL = 0.01
"""Seconds from one refusal (of a call beyond the rate, without permission, of no method) to the plugin's next: a flood
is answered evenly and slowly, however many calls it has in flight, and never in one go, for which others would wait."""
LEVELS = ("debug", "info", "warning", "error")
PLATFORM_TIMEOUT = 10.0


class ApiListenerState(Body):
    """A run's way to call, on its way to another host."""

    plugin: str
    run: str
    invocation: bool
    listener: int
    connections: tuple[LineState, ...]


class HostApi:
    """Methods that plugins may call, and the listeners that they call on."""

    def __init__(
        self, registry: Registry, audit: AuditClient, kv: KeyValue, logs: Logs, redactor: Callable[[str], Redactor],
        fences: Fences,
    ) -> None:  # fmt: skip
        self._registry, self._audit, self._logs, self._redactor = registry, audit, logs, redactor
        self._fences = fences
        self._limits: defaultdict[str, Limits] = defaultdict(Limits)
        self._listeners: dict[str, Acceptor] = {}
        self._runs: dict[str, str] = {}
        """The run of each listener; listeners by plugin, those of invocations by ``PLUGIN.RUN``."""
        self._released: dict[str, socket.socket] | None = None
        """The listeners while another process takes this one's place, likewise: nobody accepts on them."""
        self._connections: dict[str, set[Connection]] = {}
        self._methods = {
            "plugin.hello": ApiMethod(None, hello),
            "whoami": ApiMethod(None, whoami),
            "log.write": ApiMethod("log", self._log_write),
            "kv.get": ApiMethod("kv", kv.get),
            "kv.set": ApiMethod("kv", kv.set),
            "kv.delete": ApiMethod("kv", kv.delete),
            "kv.list": ApiMethod("kv", kv.list),
        }

    def register(self, name: str, permission: str, handler: Handler) -> Callable[[], None]:
        """Add a method of the platform's until the returned function is called; raises IsolatorError if it exists."""
        if name in self._methods:
            raise IsolatorError(f"method {name}", "is registered already", "one platform process serves each method")
        method = self._methods[name] = ApiMethod(permission, handler)

        def remove() -> None:
            if self._methods.get(name) is method:
                del self._methods[name]

        return remove

    def serve(self, name: str, run: str, listener: socket.socket) -> None:
        """Accept the calls of a plugin's run; closes an earlier listener of the same plugin."""
        self.forget(name)
        self._accept(name, name, run, listener)

    def serve_invocation(self, name: str, run: str, listener: socket.socket) -> None:
        """Accept the calls of one of a plugin's invocations, until ``end_invocation``."""
        self._accept(f"{name}.{run}", name, run, listener)

    def end_invocation(self, name: str, run: str) -> None:
        """Close the listener and the connections of an invocation."""
        self._end(f"{name}.{run}")
        for connection in [one for one in self._connections.get(name, ()) if one.run == run]:
            connection.close()

    def limits(self, name: str) -> Limits:
        """Return a plugin's limits, which a new run does not refill."""
        return self._limits[name]

    def forget(self, name: str) -> None:
        """Close a plugin's listener and connections."""
        self._end(name)
        for connection in list(self._connections.pop(name, ())):
            connection.close()

    def close(self) -> None:
        """Close every listener, and the connections."""
        for name in list(self._limits):
            self._report_refused(name, self._runs.get(name))
        for key in [*self._listeners, *(self._released or ())]:
            self._end(key)
        for connection in self._every_connection():
            connection.close()

    def _accept(self, key: str, name: str, run: str, listener: socket.socket) -> None:
        limits = self.limits(name)
        self._runs[key] = run
        if self._released is not None:
            self._released[key] = listener
        else:
            self._listeners[key] = Acceptor(listener, lambda: Connection(self, name, run, limits), limits.connects)

    def _end(self, key: str) -> None:
        listener = self._listeners.pop(key, None) or (self._released or {}).pop(key, None)
        if listener is not None:
            listener.close()
            del self._runs[key]

    # --- one host in the place of another --------------------------------------------------------------------------

    async def hold(self) -> None:
        """Accept no connection and read no call from now on; of runs that begin and end meanwhile neither."""
        acceptors, self._listeners = self._listeners, {}
        self._released = {key: acceptor.release() for key, acceptor in acceptors.items()}
        for acceptor in acceptors.values():
            await acceptor.accepted_all()
        for connection in self._every_connection():
            connection.hold("leaving")

    @property
    def busy(self) -> bool:
        """Whether a call on one of the listeners is unanswered that does not wait for others."""
        return any(connection.busy for connection in self._every_connection())

    def pass_on(self, departure: Departure) -> tuple[ApiListenerState, ...]:
        """Hand the listeners that were released, and their connections, on; what was counted is on record."""
        assert self._released is not None
        for name in list(self._limits):
            self._report_refused(name, self._runs.get(name))
        return tuple(
            ApiListenerState(
                plugin=key.partition(".")[0],
                run=self._runs[key],
                invocation="." in key,
                listener=departure.add(listener.detach()),
                connections=tuple(
                    connection.pass_on_all(departure)
                    for connection in list(self._connections.get(key.partition(".")[0], ()))
                    if connection.is_open and connection.run == self._runs[key]
                ),
            )
            for key, listener in self._released.items()
        )

    async def take_over(self, states: Iterable[ApiListenerState], descriptors: Descriptors) -> None:
        """Go on with the listeners and connections of another host."""
        for state in states:
            name = state.plugin
            serve = self.serve_invocation if state.invocation else self.serve
            serve(name, state.run, socket.socket(fileno=descriptors.take(state.listener)))
            for one in state.connections:
                connection = Connection(self, name, state.run, self.limits(name))
                with contextlib.suppress(OSError):
                    await connection.take_over(one, descriptors)
                    connection.begin()

    def _every_connection(self) -> list[Connection]:
        return [connection for connections in self._connections.values() for connection in connections]

    def admit(self, connection: Connection, uid: int) -> str | None:
        """Count a new connection; returns why it is refused, or None."""
        plugin = self._registry.get(connection.name)
        if plugin is None or plugin.uid != uid:
            refused = ApiCalled(method="connect", verdict="denied", uid=uid)
            self._audit.record(refused, plugin=connection.name, run=connection.run)
            return f"this socket belongs to {connection.name}; uid {uid} is not its user"
        open_now = self._connections.setdefault(connection.name, set())
        if len(open_now) >= CONNECTIONS:
            return f"more than {CONNECTIONS} connections"
        open_now.add(connection)
        return None

    def dropped(self, connection: Connection) -> None:
        """Uncount a closed connection."""
        self._connections.get(connection.name, set()).discard(connection)

    def breach(self, name: str, run: str | None, why: str) -> None:
        """Record that a plugin broke the protocol on one of its connections."""
        self._audit.record(PluginHealth(ok=False, detail=f"protocol: {why}"), plugin=name, run=run)

    async def call(self, name: str, run: str | None, method: str, params: Any) -> dict[str, Any]:
        """Answer a request: ``{"result": …}`` or ``{"error": {code, message, data}}``.

        Past the plugin's deadline nothing is done for it, and nothing answered, before that is moved on.
        """
        fence = self._fences.of(name)
        with patient():
            await fence.opened()
        answer = await self._answer(name, run, method, params)
        await fence.opened()
        return answer

    async def _answer(self, name: str, run: str | None, method: str, params: Any) -> dict[str, Any]:
        began = time.perf_counter_ns()
        verdict: ApiVerdict = "granted"
        permission, found = None, None

        def record() -> None:
            latency = (time.perf_counter_ns() - began) // 1000
            # A name that is no method's is the plugin's own text.
            called_name = method[:80] if found is not None else shown(method, self._redactor(name), 80)
            called = ApiCalled(method=called_name, permission=permission, verdict=verdict, latency_us=latency)
            # What the plugin has done is with the kernel, on its way to the trail, before it has its answer.
            self._audit.record(called, plugin=name, run=run, urgent=verdict == "granted")

        try:
            plugin = self._registry.get(name)
            if plugin is None:
                raise ApiError(-32600, "the plugin is not registered")
            self._charge(name, run)
            found = self._methods.get(method)
            if found is None:
                verdict = "unknown"
                raise ApiError(-32601, f"no method {method[:80]}", known=sorted(self._methods))
            permission = found.permission
            granted = plugin.effective.permissions if plugin.effective is not None else ()
            if permission is not None and not any(covers_permission(g, permission) for g in granted):
                verdict = "denied"
                raise _not_permitted(plugin, method, permission)
            if params is None:
                params = {}
            if not isinstance(params, dict):
                raise ApiError(-32602, "params must be an object")
            answer: dict[str, Any] = {"result": await found.handler(Context(plugin, run), params)}
        except _Limited as limited:
            await self._pace(name)
            return {"error": {"code": RETRY_LATER, "message": str(limited), "data": {"retry_after_ms": 100}}}
        except ApiError as error:
            verdict = "failed" if verdict == "granted" else verdict
            answer = {"error": {"code": error.code, "message": str(error), "data": error.data}}
        except IsolatorError as error:
            verdict = "failed"
            answer = {"error": {"code": RETRY_LATER, "message": str(error), "data": {"retry_after_ms": 1000}}}
        except asyncio.CancelledError:  # its connection has closed: what it asked for may be done all the same
            if self._released is None:  # else another host reads the call again
                record()
            raise
        record()
        if verdict in ("denied", "unknown"):
            await self._pace(name)
        return answer

    async def _pace(self, name: str) -> None:
        async with self.limits(name).refusing:
            await asyncio.sleep(REFUSAL)

    def _charge(self, name: str, run: str | None) -> None:
        now, limits = time.monotonic(), self.limits(name)
        if limits.refused and now - limits.reported >= 1.0:
            limits.reported = now
            self._report_refused(name, run)
        if not limits.calls.try_take():
            limits.refused += 1
            raise _Limited(f"more than {RATE:g} calls a second")

    def _report_refused(self, name: str, run: str | None) -> None:
        limits = self.limits(name)
        if limits.refused:
            refused, limits.refused = limits.refused, 0
            self._audit.record(ApiCalled(method="*", verdict="limited", count=refused), plugin=name, run=run)

    async def _log_write(self, context: Context, params: Mapping[str, Any]) -> dict[str, Any]:
        level, message = params.get("level", "info"), params.get("message")
        if level not in LEVELS or not isinstance(message, str):
            raise ApiError(-32602, f"log.write needs message (text) and level ({', '.join(LEVELS)})")
        log = self._logs.of(context.plugin.name)
        data = log.pieces(message.encode("utf-8", "replace"), ended=True)[0][0]
        if log.budget() < len(data):
            log.drop(len(data))
            raise ApiError(QUOTA_EXCEEDED, "more log than 1 MiB a second")
        log.keep(context.run, level, data)
        return {}


def _not_permitted(plugin: Plugin, method: str, permission: str) -> ApiError:
    """Refuse, with every line that is missing: a grant alone does nothing if the manifest does not ask for it."""
    requested = plugin.manifest.core.permissions if plugin.manifest is not None else ()
    requests_it = any(covers_permission(r, permission) for r in requested)
    return ApiError(
        PERMISSION_DENIED,
        f"{method} needs the permission {permission}"
        + ("" if requests_it else ", which the manifest does not ask for"),
        permission=permission,
        grant=f'permissions = ["{permission}"]',
        policy=f"policies/{plugin.name}.toml [grant]",
        **({} if requests_it else {"manifest": f'"permissions": ["{permission}"]'}),
    )


class _Limited(Exception):
    """Call beyond the rate."""
