"""The control socket: newline JSON-RPC for the platform and the command line.

The kernel names the caller's uid, and ``host.toml`` gives a uid its role. ``viewer`` reads,
``emitter`` also emits and follows events, ``operator`` does everything; a role includes those before it. ``caller`` is
apart from them: it uses tools of MCP servers, and nothing else. A caller without a role gets one line that says so.

Requests of one connection run concurrently and may be answered in any order; at most ``IN_FLIGHT`` of them, then the
connection is not read until one is answered. Verbs that change something are in the trail, and so is every refusal;
emitting is recorded by the event itself.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections import Counter
from collections.abc import Awaitable, Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar, cast

from host.control.parameters import Request, Spec
from host.wire.lines import Acceptor, LineProtocol, LineState
from host.wire.strict_json import WireError, line, parse_object, peer_of
from isolator.audit.schema import MAX_ID, ControlCalled
from isolator.errors import DeniedError, IsolatorError, UnavailableError, UsageError
from isolator.ipc.body import Body, Json
from isolator.ipc.succession import Departure, Descriptors
from isolator.base.pacing import TokenBucket

R = TypeVar("R", bound=Request)
ROLES = ("caller", "viewer", "emitter", "operator")
IN_FLIGHT = 256
CONNECTIONS = 512
"""Connections of root and of uids with a role."""
KEPT_FOR_ROOT, SHARE = 32, 384
"""Places that only root can take, and the most that one uid can take beside root."""
BACKLOG = 1024
"""Callers that may wait to be accepted (listen(2): at most net.core.somaxconn); the next one that does not block gets
EAGAIN, and most runtimes do not block."""
STRANGERS, STRANGER_SHARE = 64, 8
"""Connections of uids without a role, beside those: of all and of one."""
STRANGER_CONNECTS, STRANGER_BYTES = 20.0, 4096.0
"""Connections and bytes that all uids without a role have in a second: they get nothing but refusals. At once they have
as many connections as may be open, and four seconds' bytes."""


class Belonging(Body):
    """Something that a verb keeps for a connection as long as it is open."""

    verb: str
    data: Json


class ConnectionState(Body):
    """A connection on its way to another host."""

    line: LineState
    belongings: tuple[Belonging, ...]


class ControlState(Body):
    """The control socket on its way to another host."""

    listener: int
    connections: tuple[ConnectionState, ...]


@dataclass(eq=False)
class Caller:
    """The process at the other end of a connection; ``notify`` sends it a notification.

    A handler that sends much of it calls ``narrow`` once and then waits for ``drained`` each time: so no more than that
    many bytes, and the last notification, ever wait in this process for a caller that does not read.
    """

    uid: int
    pid: int
    role: str | None
    may_call: bool
    """The role ``caller``, which one may have besides the one that it has here."""
    notify: Callable[[str, Mapping[str, Any]], None]
    narrow: Callable[[int], None]
    cut: Callable[[], None]
    """Ends the connection at once; messages that wait for the caller to read them are dropped."""
    drained: asyncio.Event = field(default_factory=asyncio.Event)
    on_close: list[Callable[[], None]] = field(default_factory=list)
    belongings: list[Callable[[], Belonging | None]] = field(default_factory=list)
    """What verbs keep for this connection, for a host that takes the place of this one; None: no longer."""
    follows: bool = False
    """Whether it is sent what happens. Such a connection is not handed on: its caller connects again."""

    is_console: bool = False
    """Of its word for whom it asks the trail makes a name."""

    @property
    def by(self) -> str:
        """The caller's name in the trail."""
        return f"uid:{self.uid}"


Result = Mapping[str, Any]
Reply = Callable[[Result | None, Exception | None], None]


@dataclass(frozen=True)
class Endpoint(Generic[R]):
    """A verb and its handler."""

    request: type[R]
    answer: Callable[[R, Caller], Awaitable[Result]]


@dataclass(frozen=True)
class QuickEndpoint(Generic[R]):
    """A verb that is called thousands of times a second: without a task, ``start`` answers through its third argument.

    While ``full()`` a request takes a task and waits for ``room()`` first.
    """

    request: type[R]
    start: Callable[[R, Caller, Reply], None]
    full: Callable[[], bool]
    room: Callable[[], Awaitable[None]]

    async def there_is_room(self) -> None:
        """Wait until ``start`` may be called."""
        while self.full():
            await self.room()

    async def answer(self, request: R, caller: Caller) -> Result:
        """Start the request, and wait for the answer."""
        future: asyncio.Future[Result] = asyncio.get_running_loop().create_future()

        def reply(result: Result | None, error: Exception | None) -> None:
            if future.done():
                return
            if error is not None:
                future.set_exception(error)
            else:
                future.set_result(result or {})

        self.start(request, caller, reply)
        return await future


AnyEndpoint = Endpoint[Any] | QuickEndpoint[Any]


class ControlServer:
    """Server of the control socket.

    ``role_of``: uid → role, or None for a stranger. ``record`` takes ``ControlCalled`` records. ``restore``: by verb,
    what takes over a belonging of a caller from the host whose place this one takes. ``console``: uid of the
    console. ``may_call``: whether a uid has the role ``caller``, which one may have besides
    another.
    """

    def __init__(
        self,
        endpoints: Iterable[AnyEndpoint],
        role_of: Callable[[int], str | None],
        record: Callable[..., None],
        restore: Mapping[str, Callable[[Caller, Json], None]] | None = None,
        console: int | None = None,
        may_call: Callable[[int], bool] = lambda _: False,
    ) -> None:
        self._restore = restore or {}
        self._taken_over: list[_Connection] = []
        self._listener: socket.socket | None = None
        """The listener that was taken over, until ``begin``."""
        self.console = console
        self.leaving = False
        """No request is begun any more: another process takes this one's place."""
        self._endpoints = {endpoint.request.spec.verb: endpoint for endpoint in endpoints}
        self.role_of, self.may_call = role_of, may_call
        self.record = record
        self._acceptor: Acceptor | None = None
        self._connections: set[_Connection] = set()
        self._of_uid: Counter[int] = Counter()
        """Connections by uid."""
        self._strangers = 0
        self._stranger_connects = TokenBucket(STRANGER_CONNECTS, STRANGERS)
        self.stranger_bytes = TokenBucket(STRANGER_BYTES, 4 * STRANGER_BYTES)

    async def start(self, listener: socket.socket) -> None:
        """Accept on ``listener``, a listening Unix socket that the supervisor made, from now on."""
        listener.listen(BACKLOG)
        self._acceptor = Acceptor(listener, lambda: _Connection(self), refuse=_refuse, admit=self._admits)

    def _admits(self, connection: socket.socket) -> bool:
        """Whether to serve a connection; strangers who come too fast get one line, without what serving costs."""
        if self.role_of(peer_of(connection)[1]) is not None or self._stranger_connects.try_take():
            return True
        with contextlib.suppress(OSError):
            connection.send(_TOO_FAST)
        return False

    def endpoint(self, verb: Any) -> AnyEndpoint | None:
        """The endpoint of a verb, or None when there is no such verb."""
        return self._endpoints.get(verb) if isinstance(verb, str) else None

    def opened(self, connection: _Connection, caller: Caller) -> str | None:
        """Count a connection; returns why it is one too many, or None."""
        why = self._too_many(caller)
        if why is None:
            self._connections.add(connection)
            self._of_uid[caller.uid] += 1
            self._strangers += caller.role is None
        return why

    def _too_many(self, caller: Caller) -> str | None:
        known = len(self._connections) - self._strangers
        mine = self._of_uid[caller.uid]
        share = STRANGER_SHARE if caller.role is None else SHARE if caller.uid != 0 else CONNECTIONS
        if mine >= share:
            return f"{mine} connections of uid {caller.uid} are open, more are not served"
        if caller.role is None:
            return f"{STRANGERS} connections without a role are open" if self._strangers >= STRANGERS else None
        most = CONNECTIONS if caller.uid == 0 else CONNECTIONS - KEPT_FOR_ROOT
        return f"{known} connections are open, more are not served" if known >= most else None

    def closed(self, connection: _Connection, caller: Caller) -> None:
        """Stop counting a closed connection."""
        if connection in self._connections:
            self._connections.discard(connection)
            self._of_uid[caller.uid] -= 1
            if not self._of_uid[caller.uid]:
                del self._of_uid[caller.uid]
            self._strangers -= caller.role is None

    # --- one host in the place of another ------------------------------------------------------------------------

    @property
    def changes(self) -> bool:
        """Whether a request is open that could not be made again."""
        return any(connection.changes for connection in self._connections)

    async def hold(self) -> socket.socket | None:
        """Accept no connection and read no request from now on; returns the listener, in whose backlog callers wait."""
        listener, self.leaving = None, True
        if self._acceptor is not None:
            listener = self._acceptor.release()
            await self._acceptor.accepted_all()
        for connection in self._connections:
            connection.hold("leaving")
        return listener

    def pass_on(self, listener: socket.socket, departure: Departure) -> ControlState:
        """Hand the listener and every connection to the successor of this process; the answers are written before."""
        connections = [connection.pass_on_all(departure) for connection in list(self._connections)]
        return ControlState(
            listener=departure.add(listener.detach()), connections=tuple(c for c in connections if c is not None)
        )

    async def take_over(self, state: ControlState, descriptors: Descriptors) -> None:
        """Take the connections of another host; nothing is read or accepted before ``begin``."""
        for one in state.connections:
            connection = _Connection(self)
            with contextlib.suppress(OSError):
                await connection.take_over(one.line, descriptors)
                connection.restore(one.belongings, self._restore)
                self._taken_over.append(connection)
        self._listener = socket.socket(fileno=descriptors.take(state.listener))

    async def begin(self) -> None:
        """Go on with the connections that were taken over, then accept."""
        taken_over, self._taken_over = self._taken_over, []
        for connection in taken_over:
            connection.begin()
        if self._listener is not None:
            listener, self._listener = self._listener, None
            await self.start(listener)

    async def close(self) -> None:
        """Stop accepting and close every connection."""
        if self._acceptor is not None:
            self._acceptor.close()
        for connection in list(self._connections):
            connection.close()


class _NoVerbError(UsageError):
    """There is no such verb."""


_NO_METHOD, _FAILED = -32601, -32000
"""Codes of JSON-RPC: of a verb that does not exist, and of every other error (``data`` tells them apart)."""


class _Connection(LineProtocol):
    per_turn = 256
    """Messages in one turn, which one transaction writes."""

    def __init__(self, server: ControlServer) -> None:
        super().__init__()
        self._server = server
        self._caller: Caller | None = None
        self._tasks: dict[asyncio.Task[None], bytes | None] = {}
        """Requests that take a task; each with its line as long as it may be made again."""
        self._numbers: dict[asyncio.Task[None], Any] = {}
        self._open = 0
        self._no_more = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(transport)
        pid, uid, _ = peer_of(transport.get_extra_info("socket"))
        self._caller = Caller(
            uid, pid, self._server.role_of(uid), self._server.may_call(uid), self._notify, self._narrow, self._cut
        )
        self._caller.drained.set()
        self._caller.is_console = uid == self._server.console
        if self._caller.role is None:
            self.per_turn, self.budget = 1, self._server.stranger_bytes
        why = self._server.opened(self, self._caller)
        if why is not None:
            self._answer(None, error=UnavailableError("control socket", why, "try again, or close some"))
            self.close()

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        if self._caller is not None:
            self._server.closed(self, self._caller)
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
        endpoint = self._server.endpoint(message.get("method"))
        self._numbers[task] = message.get("id")
        self._tasks[task] = data if endpoint is not None and endpoint.request.spec.repeatable else None
        task.add_done_callback(self._finished)

    @property
    def changes(self) -> bool:
        """Whether a request is open that could not be made again."""
        return any(data is None for data in self._tasks.values())

    def pass_on_all(self, departure: Departure) -> ConnectionState | None:
        """Hand the connection on, with the requests that are not answered; None when it is closed instead."""
        caller = self._caller
        if not self.is_open or caller is None:
            return None
        if caller.follows:
            self.close()
            return None
        again = []
        for task, data in self._tasks.items():
            if task.done():
                continue
            task.cancel()
            if data is None:
                self._answer(self._numbers[task], error=_BROKEN_OFF)
            else:
                again.append(data)
        belongings = [belonging() for belonging in caller.belongings]
        line = self.pass_on(departure, again=again)
        return ConnectionState(line=line, belongings=tuple(one for one in belongings if one is not None))

    def restore(self, belongings: Iterable[Belonging], by_verb: Mapping[str, Callable[[Caller, Json], None]]) -> None:
        """Take over what belongs to the connection, before its first request is read."""
        assert self._caller is not None
        for one in belongings:
            by_verb[one.verb](self._caller, one.data)

    def too_long(self) -> None:
        self._answer(None, error=UsageError("request", f"is longer than {self.limit} bytes"))

    def eof_received(self) -> bool:
        # Half-closed (``printf … | nc -N``): earlier requests are still answered.
        self._no_more = True
        return self._open > 0 or self.unread

    def _finished(self, task: asyncio.Task[None]) -> None:
        del self._tasks[task], self._numbers[task]
        self._closed_one()

    def _closed_one(self) -> None:
        self._open -= 1
        if self._no_more and not self._open and not self.unread:
            self.close()
        if self._open < IN_FLIGHT:
            self.unhold("in flight")

    def _try_quick(self, message: dict[str, Any]) -> bool:
        """Serve a quick verb at once; False when it has to go the long way (waiting, refusing)."""
        caller, params = self._caller, message.get("params", {})
        endpoint = self._server.endpoint(message.get("method"))
        if not isinstance(endpoint, QuickEndpoint) or caller is None or not isinstance(params, dict):
            return False
        if not _may(caller, endpoint.request.spec) or endpoint.full():
            return False
        number = message.get("id")
        try:
            request = endpoint.request.parse(params)
            endpoint.start(request, caller, lambda result, error: self._quick_answer(number, result, error))
        except IsolatorError as error:
            self._quick_answer(number, None, error)
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
            code = _NO_METHOD if isinstance(error, _NoVerbError) else _FAILED
            body = {"code": code, "message": str(error), "data": error.to_json()}
            self.send(line({"jsonrpc": "2.0", "id": number, "error": body}))
        else:
            self.send(line({"jsonrpc": "2.0", "id": number, "result": result}))

    async def _serve(self, message: dict[str, Any]) -> None:
        caller, number, verb = self._caller, message.get("id"), message.get("method")
        assert caller is not None
        verdict = "ok"
        endpoint = self._server.endpoint(verb)
        spec = endpoint.request.spec if endpoint is not None else None
        try:
            params = message.get("params", {})
            if endpoint is None or spec is None:
                raise _NoVerbError(
                    f"method {str(verb)[:80]}", "does not exist", "the verb help lists those of this daemon"
                )
            if not isinstance(params, dict):
                raise UsageError(f"method {verb}", "params must be an object")
            if not _may(caller, spec):
                raise DeniedError(
                    f"method {verb}",
                    f"uid {caller.uid} has the role {caller.role or 'none'}, it needs {spec.role}",
                    f"add it to [roles] {spec.role} in host.toml, or use sudo",
                )
            request = endpoint.request.parse(params)
            if isinstance(endpoint, QuickEndpoint):
                await endpoint.there_is_room()
                if self._server.leaving:
                    await asyncio.Event().wait()  # pass_on_all ends it, and the successor begins it
                self._tasks[cast(asyncio.Task[None], asyncio.current_task())] = None
            self._answer(number, result=await endpoint.answer(request, caller))
        except IsolatorError as error:
            verdict = error.code
            self._answer(number, error=error)
        except Exception as error:  # the caller must get an answer whatever happened; the loop logs the rest
            verdict = "failed"
            context = {"message": f"control: {verb} failed", "exception": error}
            asyncio.get_running_loop().call_exception_handler(context)
            self._answer(number, error=IsolatorError(str(verb), f"{type(error).__name__}: {error}", "please report it"))
        if verdict == "denied" or (spec is not None and spec.recorded):
            self._record(caller, str(verb), message.get("params"), verdict)

    def _record(self, caller: Caller, verb: str, params: Any, verdict: str) -> None:
        params = params if isinstance(params, dict) else {}
        target, person = params.get("name") or params.get("update"), params.get("on_behalf_of")
        more = {"on_behalf_of": person[:MAX_ID]} if isinstance(person, str) and person else {}
        self._server.record(
            ControlCalled(verb=verb[:80], uid=caller.uid, pid=caller.pid, role=caller.role, verdict=verdict, **more),
            plugin=target[:MAX_ID] if isinstance(target, str) else None,
        )


def _refusal(why: str, remedy: str) -> bytes:
    error = UnavailableError("control socket", why, remedy)
    return line(
        {"jsonrpc": "2.0", "id": None, "error": {"code": -32000, "message": str(error), "data": error.to_json()}}
    )


_BROKEN_OFF = UnavailableError(
    "the daemon", "was renewed while this was under way", "see whether it was done, and try again if it was not"
)
_TOO_FAST = _refusal("connections without a role are open, and come, in great number", "try again")


def _refuse(connection: socket.socket) -> None:
    """Tell a caller for whom there is no descriptor."""
    with contextlib.suppress(OSError):
        connection.send(_refusal("the daemon has no descriptor left", "try again; raise LimitNOFILE"))


def _may(caller: Caller, spec: Spec) -> bool:
    if spec.role == "caller":
        return caller.may_call
    return caller.role is not None and ROLES.index(caller.role) >= ROLES.index(spec.role)
