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
import json
import socket
import sqlite3
import time
from collections.abc import Awaitable, Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from host.channel.reply import PERMISSION_DENIED, QUOTA_EXCEEDED, RETRY_LATER, UNSUPPORTED_PROTOCOL, shown
from host.channel.stream import BROKEN_OFF, PROTOCOLS, cancel_calls
from host.database.store import Store
from host.fence.fences import Fences
from host.plugins.logs import Logs
from host.plugins.registry import Plugin, Registry
from host.plugins.secrets import Redactor
from host.wire.lines import CPU_A_SECOND, CPU_AT_ONCE, Acceptor, LineProtocol, LineState
from host.wire.strict_json import WireError, dumps, line, parse_object, peer_of
from isolator.audit.client import AuditClient
from isolator.audit.schema import ApiCalled, ApiVerdict, PluginHealth
from isolator.errors import IsolatorError
from isolator.ipc.body import Body
from isolator.ipc.succession import Departure, Descriptors
from isolator.base.pacing import TokenBucket
from isolator.policy.names import covers_permission

RATE, BURST = 200.0, 400.0
REFUSAL = 0.01
"""Seconds from one refusal (of a call beyond the rate, without permission, of no method) to the plugin's next: a flood
is answered evenly and slowly, however many calls it has in flight, and never in one go, for which others would wait."""
CONNECTIONS, IN_FLIGHT = 16, 16
CONNECTS_A_SECOND, CONNECTS_AT_ONCE = 50.0, 50.0
BYTES_A_SECOND, BYTES_AT_ONCE = 1 << 20, 4 << 20
"""Limits of a plugin on all its connections: parsing is not free."""
KV_KEYS, KV_KEY, KV_VALUE, KV_TOTAL = 1024, 256, 64 * 1024, 1 << 20
LEVELS = ("debug", "info", "warning", "error")
PLATFORM_TIMEOUT = 10.0


class ApiError(Exception):
    """Error answer: JSON-RPC code, text, data."""

    def __init__(self, code: int, message: str, **data: Any) -> None:
        super().__init__(message)
        self.code, self.data = code, data


@dataclass(frozen=True)
class Context:
    """Caller of a method."""

    plugin: Plugin
    run: str | None


Handler = Callable[[Context, Mapping[str, Any]], Awaitable[Any]]


@dataclass
class _Limits:
    """Rates of one plugin, on all its connections together."""

    calls: TokenBucket = field(default_factory=lambda: TokenBucket(RATE, BURST))
    connects: TokenBucket = field(default_factory=lambda: TokenBucket(CONNECTS_A_SECOND, CONNECTS_AT_ONCE))
    bytes: TokenBucket = field(default_factory=lambda: TokenBucket(BYTES_A_SECOND, BYTES_AT_ONCE))
    cpu: TokenBucket = field(default_factory=lambda: TokenBucket(CPU_A_SECOND, CPU_AT_ONCE))
    refusing: asyncio.Lock = field(default_factory=asyncio.Lock)
    refused: int = 0
    reported: float = 0.0


@dataclass(frozen=True)
class ApiMethod:
    """Method and the permission it needs; None needs none."""

    permission: str | None
    handler: Handler


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
        self._limits: dict[str, _Limits] = {}
        self._listeners: dict[str, Acceptor] = {}
        self._runs: dict[str, str] = {}
        """The run of each listener; listeners by plugin, those of invocations by ``PLUGIN.RUN``."""
        self._connections: dict[str, set[_Connection]] = {}
        self._methods = {
            "plugin.hello": ApiMethod(None, _hello),
            "whoami": ApiMethod(None, _whoami),
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
        limits = self.limits(name)
        self._runs[name] = run
        self._listeners[name] = Acceptor(listener, lambda: _Connection(self, name, run, limits), limits.connects)

    def serve_invocation(self, name: str, run: str, listener: socket.socket) -> None:
        """Accept the calls of one of a plugin's invocations, until ``end_invocation``."""
        limits, key = self.limits(name), f"{name}.{run}"
        self._runs[key] = run
        self._listeners[key] = Acceptor(listener, lambda: _Connection(self, name, run, limits), limits.connects)

    def end_invocation(self, name: str, run: str) -> None:
        """Close the listener and the connections of an invocation."""
        key = f"{name}.{run}"
        listener = self._listeners.pop(key, None)
        if listener is not None:
            listener.close()
            del self._runs[key]
        for connection in [one for one in self._connections.get(name, ()) if one.run == run]:
            connection.close()

    def limits(self, name: str) -> _Limits:
        """Return a plugin's limits, which a new run does not refill."""
        return self._limits.setdefault(name, _Limits())

    def forget(self, name: str) -> None:
        """Close a plugin's listener and connections."""
        listener = self._listeners.pop(name, None)
        if listener is not None:
            listener.close()
        for connection in list(self._connections.pop(name, ())):
            connection.close()

    def close(self) -> None:
        """Close every listener."""
        for name in list(self._listeners):
            self.forget(name)

    # --- one host in the place of another --------------------------------------------------------------------------

    async def hold(self) -> dict[str, socket.socket]:
        """Accept no connection and read no call from now on; returns the listeners by plugin."""
        released = {name: acceptor.release() for name, acceptor in self._listeners.items()}
        for acceptor in self._listeners.values():
            await acceptor.accepted_all()
        for connection in self._every_connection():
            connection.hold("leaving")
        return released

    @property
    def busy(self) -> bool:
        """Whether a call on one of the listeners is unanswered."""
        return any(connection.busy for connection in self._every_connection())

    def pass_on(self, listeners: Mapping[str, socket.socket], departure: Departure) -> tuple[ApiListenerState, ...]:
        """Hand the listeners and their connections to the successor of this process."""
        return tuple(
            ApiListenerState(
                plugin=key.partition(".")[0],
                run=self._runs[key],
                invocation="." in key,
                listener=departure.add(listener.detach()),
                connections=tuple(
                    connection.pass_on_idle(departure)
                    for connection in list(self._connections.get(key.partition(".")[0], ()))
                    if connection.is_open and connection.run == self._runs[key]
                ),
            )
            for key, listener in listeners.items()
        )

    async def take_over(self, states: Iterable[ApiListenerState], descriptors: Descriptors) -> None:
        """Go on with the listeners and connections of another host."""
        for state in states:
            name = state.plugin
            serve = self.serve_invocation if state.invocation else self.serve
            serve(name, state.run, socket.socket(fileno=descriptors.take(state.listener)))
            for one in state.connections:
                connection = _Connection(self, name, state.run, self.limits(name))
                with contextlib.suppress(OSError):
                    await connection.take_over(one, descriptors)
                    connection.begin()

    def _every_connection(self) -> list[_Connection]:
        return [connection for connections in self._connections.values() for connection in connections]

    def admit(self, connection: _Connection, uid: int) -> str | None:
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

    def dropped(self, connection: _Connection) -> None:
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
        await fence.opened()
        answer = await self._answer(name, run, method, params)
        await fence.opened()
        return answer

    async def _answer(self, name: str, run: str | None, method: str, params: Any) -> dict[str, Any]:
        began = time.perf_counter_ns()
        verdict: ApiVerdict = "granted"
        permission, found = None, None
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
        latency = (time.perf_counter_ns() - began) // 1000
        # A name that is no method's is the plugin's own text.
        called_name = method[:80] if found is not None else shown(method, self._redactor(name), 80)
        called = ApiCalled(method=called_name, permission=permission, verdict=verdict, latency_us=latency)
        self._audit.record(called, plugin=name, run=run)
        if verdict in ("denied", "unknown"):
            await self._pace(name)
        return answer

    async def _pace(self, name: str) -> None:
        async with self.limits(name).refusing:
            await asyncio.sleep(REFUSAL)

    def _charge(self, name: str, run: str | None) -> None:
        now, limits = time.monotonic(), self.limits(name)
        if limits.refused and now - limits.reported >= 1.0:
            refused, limits.refused, limits.reported = limits.refused, 0, now
            self._audit.record(ApiCalled(method="*", verdict="limited", count=refused), plugin=name, run=run)
        if not limits.calls.try_take():
            limits.refused += 1
            raise _Limited(f"more than {RATE:g} calls a second")

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


class KeyValue:
    """Small private store per plugin: 1024 keys, 64 KiB a value, 1 MiB in all; a value may expire."""

    def __init__(self, store: Store) -> None:
        self._store = store

    async def get(self, context: Context, params: Mapping[str, Any]) -> dict[str, Any]:
        """Serve ``{key}`` → ``{value, found}``; the value is null when there is none."""
        where = (context.plugin.name, key_of(params))
        row = self._store.read(
            lambda db: db.execute("SELECT value, expires FROM kv WHERE plugin=? AND key=?", where).fetchone()
        )
        found = row is not None and (not isinstance(row[1], int | float) or row[1] > time.time())
        try:
            return {"value": json.loads(row[0]) if found else None, "found": found}
        except (ValueError, TypeError, RecursionError):
            raise ApiError(-32603, "the stored value is damaged; set it again") from None

    async def set(self, context: Context, params: Mapping[str, Any]) -> dict[str, Any]:
        """Serve ``{key, value, ttl?}`` → ``{}``; ``ttl`` in seconds. The answer means that the value is on disk."""
        name, key = context.plugin.name, key_of(params)
        if "value" not in params:
            raise ApiError(-32602, "value is missing")
        text = dumps(params["value"])
        if len(text.encode()) > KV_VALUE:
            raise ApiError(QUOTA_EXCEEDED, f"a value may have {KV_VALUE} bytes")
        ttl, now = ttl_of(params), time.time()
        expires = now + ttl if ttl is not None else None

        def write(db: sqlite3.Connection) -> str | None:
            db.execute("DELETE FROM kv WHERE plugin=? AND expires <= ?", (name, now))
            count, size = db.execute(
                "SELECT count(*), coalesce(sum(length(CAST(value AS BLOB)) + length(CAST(key AS BLOB))), 0)"
                " FROM kv WHERE plugin=? AND key<>?",
                (name, key),
            ).fetchone()
            if count >= KV_KEYS:
                return f"at most {KV_KEYS} keys"
            if size + len(text.encode()) + len(key.encode()) > KV_TOTAL:
                return f"at most {KV_TOTAL} bytes in all"
            db.execute("INSERT OR REPLACE INTO kv VALUES (?,?,?,?)", (name, key, text, expires))
            return None

        refused = await self._store.run(write)
        if refused is not None:
            raise ApiError(QUOTA_EXCEEDED, refused)
        return {}

    async def delete(self, context: Context, params: Mapping[str, Any]) -> dict[str, Any]:
        """Serve ``{key}`` → ``{deleted}``."""
        where = (context.plugin.name, key_of(params))
        count = await self._store.run(lambda db: db.execute("DELETE FROM kv WHERE plugin=? AND key=?", where).rowcount)
        return {"deleted": bool(count)}

    async def list(self, context: Context, params: Mapping[str, Any]) -> dict[str, Any]:
        """Serve ``{prefix?}`` → ``{keys}``, in order."""
        prefix = params.get("prefix", "")
        if not isinstance(prefix, str):
            raise ApiError(-32602, "prefix must be text")
        rows = self._store.read(
            lambda db: db.execute(
                "SELECT key FROM kv WHERE plugin=? AND substr(key, 1, ?)=? AND (expires IS NULL OR expires>?)"
                " ORDER BY key",
                (context.plugin.name, len(prefix), prefix, time.time()),
            ).fetchall()
        )
        return {"keys": [key for (key,) in rows]}


class _Connection(LineProtocol):
    """Connection of a plugin to its host socket."""

    limit = 256 * 1024
    write_high = 256 * 1024

    def __init__(self, api: HostApi, name: str, run: str, limits: _Limits) -> None:
        super().__init__()
        self.name, self.run = name, run
        self.budget, self.cpu = limits.bytes, limits.cpu
        self._api = api
        self._tasks: dict[asyncio.Task[None], Any] = {}
        """Calls that are not answered, each with its id."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(transport)
        refused = self._api.admit(self, peer_of(transport.get_extra_info("socket"))[1])
        if refused is not None:
            self.send(line({"jsonrpc": "2.0", "id": None, "error": {"code": PERMISSION_DENIED, "message": refused}}))
            self.close()

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        self._api.dropped(self)
        for task in self._tasks:
            task.cancel()

    def line_received(self, data: bytes) -> None:
        try:
            message = parse_object(data)
            if not isinstance(message.get("method"), str):
                raise WireError("not a request", -32600)
        except WireError as error:
            self._break(str(error), error.code)
            return
        task = asyncio.get_running_loop().create_task(self._serve(message))
        self._tasks[task] = message.get("id")
        task.add_done_callback(self._served)
        if len(self._tasks) >= IN_FLIGHT:
            self.hold("in flight")

    @property
    def busy(self) -> bool:
        """Whether a call is unanswered."""
        return bool(self._tasks)

    def pass_on_idle(self, departure: Departure) -> LineState:
        """Hand the connection on; a call that is still unanswered is to be made again."""
        for number in cancel_calls(self._tasks):
            self.send(line({"jsonrpc": "2.0", "id": number, **BROKEN_OFF}))
        return self.pass_on(departure)

    def too_long(self) -> None:
        self._break(f"a message is longer than {self.limit} bytes", -31003)

    def _break(self, why: str, code: int) -> None:
        self.send(line({"jsonrpc": "2.0", "id": None, "error": {"code": code, "message": why}}))
        self._api.breach(self.name, self.run, why)
        self.close()

    def _served(self, task: asyncio.Task[None]) -> None:
        del self._tasks[task]
        if len(self._tasks) < IN_FLIGHT:
            self.unhold("in flight")

    async def _serve(self, message: dict[str, Any]) -> None:
        answer = await self._api.call(self.name, self.run, message["method"], message.get("params"))
        if message.get("id") is not None:
            self.send(line({"jsonrpc": "2.0", "id": message["id"], **answer}))


async def _hello(context: Context, params: Mapping[str, Any]) -> dict[str, Any]:
    wanted = str(params.get("api_version", "1"))
    if wanted.partition(".")[0] not in PROTOCOLS:
        raise ApiError(UNSUPPORTED_PROTOCOL, f"api_version {wanted[:20]} is not spoken", supported=list(PROTOCOLS))
    name = params.get("name")
    if name is not None and name != context.plugin.name:
        raise ApiError(-32602, f"this socket belongs to {context.plugin.name}")
    return {"protocol": PROTOCOLS[-1], **await _whoami(context, params)}


async def _whoami(context: Context, _: Mapping[str, Any]) -> dict[str, Any]:
    plugin = context.plugin
    return {
        "name": plugin.name,
        "version": plugin.version,
        "run": context.run,
        "hooks": sorted(plugin.hooks.values()),
        "permissions": list(plugin.effective.permissions) if plugin.effective is not None else [],
    }


def ttl_of(params: Mapping[str, Any]) -> float | None:
    """The ``ttl`` of a call, in seconds; raises ApiError."""
    ttl = params.get("ttl")
    if ttl is not None and (isinstance(ttl, bool) or not isinstance(ttl, (int, float)) or not 0 < ttl < 1e9):
        raise ApiError(-32602, "ttl must be seconds")
    return ttl


def key_of(params: Mapping[str, Any]) -> str:
    """The ``key`` of a call; raises ApiError."""
    key = params.get("key")
    if not isinstance(key, str) or not 0 < len(key.encode()) <= KV_KEY:
        raise ApiError(-32602, f"key must be text of 1 to {KV_KEY} bytes")
    return key
