"""The control socket: newline JSON-RPC for the platform and the command line.

The caller is who the kernel says it is: its uid gives it a role, ``host.toml`` says which. ``viewer`` reads,
``emitter`` also emits and follows events, ``operator`` does everything; a role includes those before it. A caller
without a role gets one line that says so.

Requests of one connection run concurrently and may be answered in any order; at most ``IN_FLIGHT`` of them, then the
connection is not read until one is answered. What operators do is in the trail, and so is every refusal; emitting is
recorded by the event itself.
"""

from __future__ import annotations

import asyncio
import socket
import sys
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

from host.wire.lines import LineProtocol
from host.wire.strict import WireError, line, parse_object, peer_of
from isolator.audit.schema import ControlCalled
from isolator.errors import DeniedError, IsolatorError, UnavailableError, UsageError

N = TypeVar("N", int, float)
ROLES = ("viewer", "emitter", "operator")
IN_FLIGHT = 256
CONNECTIONS = 512
BACKLOG = 1024
"""Callers that may wait to be accepted (listen(2): at most net.core.somaxconn); the next one that does not block gets
EAGAIN, and most runtimes do not block."""


@dataclass(eq=False)
class Caller:
    """Who is asking; ``notify`` sends a notification on the same connection.

    Who sends much of it calls ``narrow`` once and then waits for ``drained`` each time: so no more than that many
    bytes, and the last notification, ever wait in this process for a caller that does not read.
    """

    uid: int
    pid: int
    role: str | None
    notify: Callable[[str, Mapping[str, Any]], None]
    narrow: Callable[[int], None]
    cut: Callable[[], None]
    """Ends the connection at once; what waits for the caller to read it is dropped."""
    drained: asyncio.Event = field(default_factory=asyncio.Event)
    on_close: list[Callable[[], None]] = field(default_factory=list)

    @property
    def by(self) -> str:
        """How the trail names the caller."""
        return f"uid:{self.uid}"


Reply = Callable[[Any, Exception | None], None]


@dataclass(frozen=True)
class Method:
    """One verb; ``recorded`` verbs appear in the trail each time they are called.

    ``quick`` is for the one verb that is called thousands of times a second: it is called without a task and answers
    through its third argument; while ``full()`` it waits for ``room()`` first.
    """

    role: str
    handler: Callable[[Mapping[str, Any], Caller], Awaitable[Any]] | None = None
    recorded: bool = False
    quick: Callable[[Mapping[str, Any], Caller, Reply], None] | None = None
    full: Callable[[], bool] | None = None
    room: Callable[[], Awaitable[None]] | None = None


class ControlServer:
    """Serves the listener that the supervisor made."""

    def __init__(
        self,
        methods: Mapping[str, Method],
        role_of: Callable[[int], str | None],
        record: Callable[..., None],
    ) -> None:
        self.methods = methods
        self.role_of = role_of
        self.record = record
        self._server: asyncio.Server | None = None
        self._connections: set[_Connection] = set()

    async def start(self, listener: socket.socket) -> None:
        """Accept on ``listener`` from now on."""
        loop = asyncio.get_running_loop()
        listener.setblocking(False)
        # From 3.13 asyncio unlinks a listener's path when the server closes; this path is the supervisor's.
        options: dict[str, Any] = {"cleanup_socket": False} if sys.version_info >= (3, 13) else {}
        self._server = await loop.create_unix_server(
            lambda: _Connection(self), sock=listener, backlog=BACKLOG, **options
        )

    def opened(self, connection: _Connection) -> bool:
        """Count a connection; False when there are too many."""
        if len(self._connections) >= CONNECTIONS:
            return False
        self._connections.add(connection)
        return True

    def closed(self, connection: _Connection) -> None:
        """The connection is gone."""
        self._connections.discard(connection)

    async def close(self) -> None:
        """Stop accepting and close every connection."""
        if self._server is not None:
            self._server.close()
        for connection in list(self._connections):
            connection.close()


class _Connection(LineProtocol):
    per_turn = 256
    """What comes in one turn is written in one transaction."""

    def __init__(self, server: ControlServer) -> None:
        super().__init__()
        self._server = server
        self._caller: Caller | None = None
        self._tasks: set[asyncio.Task[None]] = set()
        self._open = 0
        self._no_more = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(transport)
        pid, uid, _ = peer_of(transport.get_extra_info("socket"))
        self._caller = Caller(uid, pid, self._server.role_of(uid), self._notify, self._narrow, self._cut)
        self._caller.drained.set()
        if not self._server.opened(self):
            why = f"{CONNECTIONS} connections are open, more are not served"
            self._answer(None, error=UnavailableError("control socket", why, "try again, or close some"))
            self.close()

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        self._server.closed(self)
        for task in self._tasks:
            task.cancel()
        if self._caller is not None:
            for callback in list(self._caller.on_close):
                callback()

    def pause_writing(self) -> None:
        super().pause_writing()
        if self._caller is not None:
            self._caller.drained.clear()

    def resume_writing(self) -> None:
        super().resume_writing()
        if self._caller is not None:
            self._caller.drained.set()

    def line_received(self, data: bytes) -> None:
        try:
            message = parse_object(data)
        except WireError as error:
            self.send(line({"jsonrpc": "2.0", "id": None, "error": {"code": error.code, "message": str(error)}}))
            return
        self._open += 1
        if self._open >= IN_FLIGHT:
            self.hold("in flight")
        if self._try_quick(message):
            return
        task = asyncio.get_running_loop().create_task(self._serve(message))
        self._tasks.add(task)
        task.add_done_callback(self._finished)

    def too_long(self) -> None:
        self._answer(None, error=UsageError("request", f"is longer than {self.limit} bytes"))

    def eof_received(self) -> bool:
        # Half-closed (``printf … | nc -N``): what was asked is still answered.
        self._no_more = True
        return self._open > 0 or self.unread

    def _finished(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        self._closed_one()

    def _closed_one(self) -> None:
        self._open -= 1
        if self._no_more and not self._open and not self.unread:
            self.close()
        if self._open < IN_FLIGHT:
            self.unhold("in flight")

    def _try_quick(self, message: dict[str, Any]) -> bool:
        """Serve a quick verb at once; False when it has to go the long way (waiting, refusing)."""
        caller, name, params = self._caller, message.get("method"), message.get("params", {})
        method = self._server.methods.get(name) if isinstance(name, str) else None
        if method is None or method.quick is None or caller is None or not isinstance(params, dict):
            return False
        if not _may(caller, method) or (method.full is not None and method.full()):
            return False
        try:
            method.quick(params, caller, lambda result, error: self._quick_answer(message.get("id"), result, error))
        except IsolatorError as error:
            self._quick_answer(message.get("id"), None, error)
        return True

    def _quick_answer(self, number: Any, result: Any, error: Exception | None) -> None:
        if error is not None and not isinstance(error, IsolatorError):
            error = IsolatorError("event", f"{type(error).__name__}: {error}", "please report it")
        self._answer(number, result=result, error=error)
        self._closed_one()

    def _cut(self) -> None:
        if self.transport is not None:
            self.transport.abort()

    def _narrow(self, size: int) -> None:
        if self.transport is not None:
            self.transport.set_write_buffer_limits(high=size)

    def _notify(self, method: str, params: Mapping[str, Any]) -> None:
        self.send(line({"jsonrpc": "2.0", "method": method, "params": dict(params)}))

    def _answer(self, number: Any, *, result: Any = None, error: IsolatorError | None = None) -> None:
        if error is not None:
            body = {"code": -32000, "message": str(error), "data": error.to_json()}
            self.send(line({"jsonrpc": "2.0", "id": number, "error": body}))
        else:
            self.send(line({"jsonrpc": "2.0", "id": number, "result": result}))

    async def _call(self, method: Method, params: Mapping[str, Any], caller: Caller) -> Any:
        if method.handler is not None:
            return await method.handler(params, caller)
        assert method.quick is not None
        while method.full is not None and method.room is not None and method.full():
            await method.room()
        future: asyncio.Future[Any] = asyncio.get_running_loop().create_future()

        def reply(result: Any, error: Exception | None) -> None:
            if future.done():
                return
            if error is not None:
                future.set_exception(error)
            else:
                future.set_result(result)

        method.quick(params, caller, reply)
        return await future

    async def _serve(self, message: dict[str, Any]) -> None:
        caller, number, name = self._caller, message.get("id"), message.get("method")
        assert caller is not None
        verdict = "ok"
        method = self._server.methods.get(name) if isinstance(name, str) else None
        try:
            params = message.get("params", {})
            if method is None:
                raise UsageError(
                    f"method {str(name)[:80]}", "does not exist", "is the command line of another version?"
                )
            if not isinstance(params, dict):
                raise UsageError(f"method {name}", "params must be an object")
            if not _may(caller, method):
                raise DeniedError(
                    f"method {name}",
                    f"uid {caller.uid} has the role {caller.role or 'none'}, it needs {method.role}",
                    f"add it to [roles] {method.role} in host.toml, or use sudo",
                )
            self._answer(number, result=await self._call(method, params, caller))
        except IsolatorError as error:
            verdict = error.code
            self._answer(number, error=error)
        except Exception as error:  # the caller must get an answer whatever happened; the loop logs the rest
            verdict = "failed"
            context = {"message": f"control: {name} failed", "exception": error}
            asyncio.get_running_loop().call_exception_handler(context)
            self._answer(number, error=IsolatorError(str(name), f"{type(error).__name__}: {error}", "please report it"))
        if verdict == "denied" or (method is not None and method.recorded):
            given = message.get("params")
            target = (given.get("name") or given.get("update")) if isinstance(given, dict) else None
            self._server.record(
                ControlCalled(verb=str(name)[:80], uid=caller.uid, pid=caller.pid, role=caller.role, verdict=verdict),
                plugin=target if isinstance(target, str) else None,
            )


def _may(caller: Caller, method: Method) -> bool:
    return caller.role is not None and ROLES.index(caller.role) >= ROLES.index(method.role)


def text(params: Mapping[str, Any], key: str) -> str:
    """A text parameter; raises UsageError."""
    value = params.get(key)
    if not isinstance(value, str) or not value or len(value) > 4096:
        raise UsageError(key, "is missing or not text")
    return value


def number(params: Mapping[str, Any], key: str, default: N, most: N) -> N:
    """A number parameter from 0 to ``most``; raises UsageError."""
    value = params.get(key, default)
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value <= most:
        raise UsageError(key, f"must be a number from 0 to {most}")
    return type(default)(value)


def values(params: Mapping[str, Any]) -> dict[str, str]:
    """The config values among the parameters; raises UsageError."""
    given = params.get("config") or {}
    if not isinstance(given, dict) or not all(isinstance(v, str) for v in given.values()) or len(given) > 64:
        raise UsageError("config", "must be an object of texts, at most 64")
    return given
