"""The daemon as a Python library for the platform that embeds it.

    async with PluginHost.connect() as host:
        await host.register_event("backup.failed", BackupFailed, order_by="volume")
        await host.serve("projects.get", "read:projects", get_project)
        event = await host.emit("deploy.completed", {...})
        async for recorded in host.audit():
            print(recorded.record.type, recorded.line)

One connection to the control socket, everything concurrent on it. When the daemon goes away it is connected to again,
with growing pauses, and everything that was registered is registered anew. A call that was open at that moment fails
with ``UnavailableError``, because nobody knows whether it was heard: give ``emit`` a ``dedupe_key`` and repeat it.
The trail comes over a connection of its own, so that who reads it slowly holds up nothing else.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import socket
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel

from host.client.client import reachable
from isolator.audit.reader import Continuity
from isolator.audit.record import Record, parse
from isolator.errors import DeniedError, IsolatorError, UnavailableError
from isolator.paths import Paths

LINE_LIMIT = 16 << 20
TRAIL_LIMIT = 4 << 20
RECONNECT_FIRST, RECONNECT_LONGEST = 0.05, 5.0
CONNECT_PATIENCE = 30.0
"""Seconds to wait for a daemon that has more callers than it has accepted."""

ApiHandler = Callable[[str, dict[str, Any]], Awaitable[Any]]
"""Answers a plugin's call: (plugin name, params) → JSON value. Raises IsolatorError to refuse."""


@dataclass(frozen=True)
class Emitted:
    """An event that is safe: its id and the plugins that will get it."""

    id: str
    plugins: tuple[str, ...]
    overflowed: tuple[str, ...] = ()
    duplicate: bool = False


@dataclass(frozen=True)
class Delivered:
    """How one delivery stands."""

    plugin: str
    state: str
    attempts: int
    status: str | None
    detail: str | None
    reply: str | None
    latency_us: int | None


@dataclass(frozen=True)
class Recorded:
    """One record of the trail: its line, byte for byte as it stands there, and what it says."""

    line: str
    record: Record


class PluginHost:
    """A connection to the daemon; make one with ``connect``."""

    def __init__(self, path: os.PathLike[str] | str) -> None:
        self._path = os.fspath(path)
        self._writer: asyncio.StreamWriter | None = None
        self._pending: dict[int, asyncio.Future[dict[str, Any]]] = {}
        self._handlers: dict[str, tuple[str, ApiHandler]] = {}
        self._events: dict[str, dict[str, Any]] = {}
        self._numbers = 0
        self._tasks: set[asyncio.Task[None]] = set()
        self._reader_task: asyncio.Task[None] | None = None
        self._closing = False

    @classmethod
    @contextlib.asynccontextmanager
    async def connect(cls, root: str | os.PathLike[str] | None = None) -> AsyncIterator[PluginHost]:
        """Connect to the daemon of ``root`` (default: ``$ISOLATOR_ROOT``, else ``/``).

        Raises UnavailableError when none runs there, DeniedError when this user cannot reach its socket.
        """
        host = cls(Paths.of(root).control_socket)
        reader = await host._open()
        host._reader_task = asyncio.get_running_loop().create_task(host._keep(reader))
        try:
            yield host
        finally:
            await host._close()

    async def emit(
        self,
        name: str,
        payload: Mapping[str, Any],
        *,
        dedupe_key: str | None = None,
        ttl: float | None = None,
        traceparent: str | None = None,
    ) -> Emitted:
        """Emit an event; it is safe on disk when this returns. Raises UsageError for a payload that does not fit."""
        params: dict[str, Any] = {"name": name, "payload": dict(payload)}
        params |= {"dedupe_key": dedupe_key} if dedupe_key is not None else {}
        params |= {"ttl": ttl} if ttl is not None else {}
        params |= {"trace": traceparent} if traceparent is not None else {}
        answer = await self.call("event.emit", **params)
        return Emitted(answer["id"], tuple(answer["plugins"]), tuple(answer["overflowed"]), bool(answer["duplicate"]))

    async def wait(self, event_id: str, *, timeout: float = 30.0) -> list[Delivered]:
        """The deliveries of an event once all are final, or as they stand after ``timeout`` seconds."""
        row = await self.call("event.wait", id=event_id, timeout=timeout)
        names = Delivered.__dataclass_fields__
        return [Delivered(**{key: d[key] for key in names}) for d in row["deliveries"]]

    async def register_event(
        self, name: str, model: type[BaseModel], *, order_by: str | None = None, version: int = 1
    ) -> None:
        """Make an event of the platform's own known; its payloads are checked against ``model`` by the daemon."""
        params = {"name": name, "schema": model.model_json_schema(), "order_by": order_by, "version": version}
        await self.call("event.register", **params)
        self._events[name] = params

    async def serve(self, method: str, permission: str, handler: ApiHandler) -> None:
        """Answer a host-API method that plugins may call with ``permission``."""
        # Before it is registered: the first call may come in the same packet as the answer.
        before = self._handlers.get(method)
        self._handlers[method] = (permission, handler)
        try:
            await self.call("api.register", method=method, permission=permission)
        except BaseException:
            if before is not None:
                self._handlers[method] = before
            else:
                del self._handlers[method]
            raise

    async def audit(self, *, after: int | None = None, lines: int = 0) -> AsyncIterator[Recorded]:
        """The records of the trail as they are written: those after record ``after``, else from the last ``lines`` on.

        Goes on where it was when the daemon was away. Raises IsolatorError when a record does not continue the one
        before, and when the trail ends before ``after``: then it was changed.
        """
        chain, pause, begun = Continuity(after or 0), RECONNECT_FIRST, False
        while True:
            where = {"after": chain.seq} if chain.seq or after is not None else {"lines": lines}
            try:
                async with contextlib.aclosing(_follow(self._path, where)) as arriving:
                    async for data in arriving:
                        pause = RECONNECT_FIRST
                        wrong, record = chain.check(data), parse(data)
                        if wrong or record is None:
                            raise IsolatorError("audit trail", wrong or "sends no record", "isolator audit verify")
                        yield Recorded(data.decode("ascii"), record)
            except UnavailableError:
                if not begun:
                    raise
            begun = True
            await asyncio.sleep(pause)
            pause = min(pause * 2, RECONNECT_LONGEST)

    async def plugins(self) -> list[dict[str, Any]]:
        """Every plugin with its live figures."""
        return list((await self.call("plugin.list"))["plugins"])

    async def call(self, method: str, /, **params: Any) -> dict[str, Any]:
        """Any verb of the control socket; raises the error that the daemon raised."""
        if self._writer is None:
            raise UnavailableError("the daemon", "is not connected at the moment", "try again")
        self._numbers += 1
        number = self._numbers
        future: asyncio.Future[dict[str, Any]] = asyncio.get_running_loop().create_future()
        self._pending[number] = future
        request = {"jsonrpc": "2.0", "id": number, "method": method, "params": params}
        try:
            self._writer.write(json.dumps(request, separators=(",", ":")).encode() + b"\n")
            await self._writer.drain()
            return await future
        except ConnectionError:
            raise UnavailableError("the daemon", "went away in the middle of a call", "try again") from None
        finally:
            self._pending.pop(number, None)

    # The connection

    async def _open(self) -> asyncio.StreamReader:
        reader, self._writer = await _connect(self._path, LINE_LIMIT)
        return reader

    async def _keep(self, reader: asyncio.StreamReader) -> None:
        pause = RECONNECT_FIRST
        while True:
            await self._read(reader)
            self._lost()
            while not self._closing:
                await asyncio.sleep(pause)
                pause = min(pause * 2, RECONNECT_LONGEST)
                with contextlib.suppress(UnavailableError, DeniedError):
                    reader = await self._open()
                    pause = RECONNECT_FIRST
                    self._spawn(self._register_again())
                    break
            if self._closing:
                return

    async def _read(self, reader: asyncio.StreamReader) -> None:
        with contextlib.suppress(OSError, ValueError):
            async for data in reader:
                message = json.loads(data)
                if message.get("method") == "api.call":
                    self._spawn(self._answer(message["params"]))
                    continue
                future = self._pending.get(message.get("id"))
                if future is None or future.done():
                    continue
                if "error" in message:
                    future.set_exception(_error_of(message["error"]))
                else:
                    future.set_result(message.get("result") or {})

    def _lost(self) -> None:
        if self._writer is not None:
            self._writer.close()
            self._writer = None
        for future in self._pending.values():
            if not future.done():
                future.set_exception(UnavailableError("the daemon", "went away in the middle of a call", "try again"))

    async def _register_again(self) -> None:
        """Register everything on a new connection; what is refused for the moment is tried until it is not.

        A method is "registered already" while the daemon has not yet noticed that its former connection is gone, or
        while an earlier process of the platform still runs.
        """
        writer, pause = self._writer, RECONNECT_FIRST
        waiting: list[tuple[str, dict[str, Any]]] = [("event.register", params) for params in self._events.values()]
        waiting += [("api.register", {"method": m, "permission": p}) for m, (p, _) in self._handlers.items()]
        while waiting:
            refused = []
            for verb, params in waiting:
                if self._writer is not writer:
                    return  # gone again; the next connection registers everything anew
                try:
                    await self.call(verb, **params)
                except UnavailableError:
                    return
                except DeniedError as error:  # host.toml has changed: only a person can mend that
                    context = {"message": f"registering anew: {error}", "exception": error}
                    asyncio.get_running_loop().call_exception_handler(context)
                except IsolatorError:
                    refused.append((verb, params))
            waiting = refused
            if waiting:
                await asyncio.sleep(pause)
                pause = min(pause * 2, RECONNECT_LONGEST)

    async def _answer(self, call: Mapping[str, Any]) -> None:
        entry = self._handlers.get(call["method"])
        answer: dict[str, Any]
        try:
            if entry is None:
                raise IsolatorError(str(call["method"]), "is not served here")
            answer = {"result": await entry[1](call["plugin"], call["params"])}
            json.dumps(answer, allow_nan=False)  # a result that is no JSON is the handler's bug as well
        except IsolatorError as error:
            answer = {"error": {"code": -31001, "message": str(error)}}
        except Exception as error:  # a bug of the handler's must be an answer to the plugin, and seen here
            asyncio.get_running_loop().call_exception_handler({"message": "host API handler", "exception": error})
            answer = {"error": {"code": -32603, "message": "the platform failed"}}
        with contextlib.suppress(IsolatorError):
            await self.call("api.answer", call=call["call"], **answer)

    def _spawn(self, coroutine: Any) -> None:
        task = asyncio.get_running_loop().create_task(coroutine)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _close(self) -> None:
        self._closing = True
        for task in (self._reader_task, *self._tasks):
            if task is not None:
                task.cancel()
                with contextlib.suppress(asyncio.CancelledError):
                    await task
        self._lost()


async def _connect(path: str, limit: int) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    # A raw socket: asyncio takes a full backlog (EAGAIN) for a connection.
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        sock.setblocking(False)
        await _connect_in_turn(sock, path)
    except BaseException:
        sock.close()
        raise
    return await asyncio.open_unix_connection(sock=sock, limit=limit)


async def _connect_in_turn(sock: socket.socket, path: str) -> None:
    """Connect as soon as the backlog has room; no event tells when that is."""
    end, pause = asyncio.get_running_loop().time() + CONNECT_PATIENCE, 0.001
    while True:
        try:
            with reachable(path) as name:
                sock.connect(name)
            return
        except BlockingIOError:
            if asyncio.get_running_loop().time() > end:
                raise UnavailableError("the daemon", "too many callers are waiting", "try again") from None
        except PermissionError:
            raise DeniedError(path, "this user may not connect to the daemon", "let it reach that folder") from None
        except OSError:
            why = f"no {path}"
            raise UnavailableError("the daemon is not running", why, "start it with 'isolator serve'") from None
        await asyncio.sleep(pause)
        pause = min(pause * 2, 0.05)


async def _follow(path: str, where: Mapping[str, int]) -> AsyncGenerator[bytes, None]:
    """The lines of the trail over one connection, until it ends."""
    reader, writer = await _connect(path, TRAIL_LIMIT)
    try:
        request = {"jsonrpc": "2.0", "id": 1, "method": "audit.follow", "params": where}
        writer.write(json.dumps(request).encode() + b"\n")
        with contextlib.suppress(OSError):
            async for data in reader:
                message = json.loads(data)
                if "error" in message:
                    raise _error_of(message["error"])
                for line in message.get("params", {}).get("lines", ()):
                    yield line.encode("ascii", "backslashreplace")
    finally:
        writer.close()


def _error_of(error: Mapping[str, Any]) -> IsolatorError:
    data = error.get("data")
    return IsolatorError.from_json(data) if data else IsolatorError(str(error.get("message")))
