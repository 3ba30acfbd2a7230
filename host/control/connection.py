"""A connection to the control socket: its requests, each of which takes a task or is quick."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

from host.control.endpoints import Belonging, Caller, QuickEndpoint, may
from host.queue.owed import UNKNOWN, Owed
from host.wire.lines import LineProtocol, LineState
from host.wire.strict_json import WireError, line, parse_object
from isolator.audit.schema import MAX_ID, ControlCalled
from isolator.errors import DeniedError, IsolatorError, UnavailableError, UsageError
from isolator.ipc.body import Body, Json
from isolator.ipc.succession import Departure
from isolator.linux.peer import peer_ids

if TYPE_CHECKING:
    from host.control.server import ControlServer

IN_FLIGHT = 256


class ConnectionState(Body):
    """A connection on its way to another host."""

    line: LineState
    belongings: tuple[Belonging, ...]


class _NoVerbError(UsageError):
    """There is no such verb."""


@dataclass(slots=True)
class _Open:
    """A request that takes a task."""

    number: Any
    line: bytes | None
    """Its line as long as it may be made again."""
    changes: bool
    """True if it goes on although its caller has gone: a change that ended in between would be on disk, and neither in
    this process nor on record."""
    begun: Owed | None = None
    """Its record, which is owed while it changes something."""


_NO_METHOD, _FAILED = -32601, -32000
"""Codes of JSON-RPC: of a verb that does not exist, and of every other error (``data`` tells them apart)."""


class Connection(LineProtocol):
    """Connection of one caller."""

    per_turn = 256
    """Messages in one turn, which one transaction writes."""

    def __init__(self, server: ControlServer) -> None:
        super().__init__()
        self._server = server
        self._caller: Caller | None = None
        self._tasks: dict[asyncio.Task[None], _Open] = {}
        self._open = 0
        self._no_more = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(transport)
        pid, uid, _ = peer_ids(transport.get_extra_info("socket"))
        self._caller = Caller(
            uid, pid, self._server.role_of(uid), self._server.may_call(uid), self._notify, self._narrow, self.cut
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
        for task, request in self._tasks.items():
            if not request.changes:
                task.cancel()
        if self._caller is not None:
            self._caller.leave()
        self._free_place()

    def end(self) -> None:
        """End every request, and close."""
        for task in self._tasks:
            task.cancel()
        self.close()

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
        spec = endpoint.request.spec if endpoint is not None else None
        again, changes = (data if spec.repeatable else None, spec.changes) if spec is not None else (None, False)
        self._tasks[task] = _Open(message.get("id"), again, changes)
        task.add_done_callback(self._finished)

    @property
    def changes(self) -> bool:
        """Whether a request is open that could not be made again."""
        return any(request.line is None for request in self._tasks.values())

    @property
    def begun_anew(self) -> list[Owed]:
        """The records owed of the requests that the successor of this process begins anew."""
        requests = self._tasks.values() if self._lasts else ()
        return [one.begun for one in requests if one.line is not None and one.begun is not None]

    @property
    def _lasts(self) -> bool:
        """True if it can be handed on."""
        return self.is_open and self._caller is not None and not self._caller.follows

    def pass_on_all(self, departure: Departure) -> ConnectionState | None:
        """Hand the connection on, with the requests that are not answered; None when it is closed instead."""
        caller = self._caller
        if caller is None or not self._lasts:
            self.end()
            return None
        again = []
        for task, request in self._tasks.items():
            if task.done():
                continue
            task.cancel()
            if request.line is None:
                self._answer(request.number, error=_BROKEN_OFF)
            else:
                again.append(request.line)
        belongings = tuple(belonging() for belonging in caller.belongings)
        line = self.pass_on(departure, again=again)
        return ConnectionState(line=line, belongings=belongings)

    def restore(self, belongings: Iterable[Belonging], by_verb: Mapping[str, Callable[[Caller, Json], None]]) -> None:
        """Take over what belongs to the connection, before its first request is read."""
        assert self._caller is not None
        for one in belongings:
            by_verb[one.verb](self._caller, one.data)

    def too_long(self) -> None:
        self._answer(None, error=UsageError("request", f"is longer than {self.limit} bytes"))

    def eof_received(self) -> bool:
        # Half-closed (``printf … | nc -N``): earlier requests are still answered.
        super().eof_received()
        self._no_more = True
        return self._open > 0 or self.unread

    def _finished(self, task: asyncio.Task[None]) -> None:
        del self._tasks[task]
        self._closed_one()
        self._free_place()

    def _free_place(self) -> None:
        """Count no longer as a connection, once it is closed and none of its requests goes on."""
        if self.transport is None and not self._tasks and self._caller is not None:
            self._server.closed(self, self._caller)

    def _closed_one(self) -> None:
        self._open -= 1
        if not self._open:
            self.flush()  # no other answer is awaited that could go with it
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
        if not may(caller, endpoint.request.spec) or endpoint.full():
            return False
        number = message.get("id")
        try:
            request = endpoint.request.parse(params)
            endpoint.start(request, caller, lambda result, error: self._quick_answer(number, result, error))
            if not self._buffer:
                endpoint.hurry()
        except IsolatorError as error:
            self._quick_answer(number, None, error)
        return True

    def _quick_answer(self, number: Any, result: Any, error: Exception | None) -> None:
        if error is not None and not isinstance(error, IsolatorError):
            error = IsolatorError("event", f"{type(error).__name__}: {error}", "please report it")
        self._answer(number, result=result, error=error)
        self._closed_one()

    def _narrow(self, size: int) -> None:
        if self.transport is not None:
            self.transport.set_write_buffer_limits(high=size)

    def _notify(self, method: str, params: Mapping[str, Any]) -> None:
        self.send(line({"jsonrpc": "2.0", "method": method, "params": dict(params)}))

    def _answer(self, number: Any, *, result: Any = None, error: IsolatorError | None = None) -> None:
        data = _answer_line(number, result=result, error=error)
        (self.send_soon if self._open > 1 else self.send)(data)  # with others that are awaited, or at once

    async def _serve(self, message: dict[str, Any]) -> None:
        caller, number, verb = self._caller, message.get("id"), message.get("method")
        assert caller is not None
        verdict, present = "ok", self._tasks[cast(asyncio.Task[None], asyncio.current_task())]
        endpoint = self._server.endpoint(verb)
        spec = endpoint.request.spec if endpoint is not None else None
        try:
            params = message.get("params", {})
            if endpoint is None or spec is None:
                why = "does not exist"
                raise _NoVerbError(f"method {str(verb)[:80]}", why, "the verb help lists those of this daemon")
            if not isinstance(params, dict):
                raise UsageError(f"method {verb}", "params must be an object")
            if not may(caller, spec):
                why = f"uid {caller.uid} has the role {caller.role or 'none'}, it needs {spec.role}"
                remedy = f"add it to [roles] {spec.role} in host.toml, then 'isolator reload'; or use sudo"
                raise DeniedError(f"method {verb}", why, remedy)
            request = endpoint.request.parse(params)
            if isinstance(endpoint, QuickEndpoint):
                await endpoint.there_is_room()
                if self._server.leaving:
                    await asyncio.Event().wait()  # pass_on_all ends it, and the successor begins it
                present.line = None
            if spec.changes and self._server.debts is not None:
                present.begun = self._server.debts.begin(*_called(caller, verb, params, UNKNOWN))
            answer = _answer_line(number, result=await endpoint.answer(request, caller))
        except IsolatorError as error:
            if self._server.leaving and present.line is not None and isinstance(error, UnavailableError):
                await asyncio.Event().wait()  # the supervisor has broken it off, and the successor begins it anew
            verdict = error.code
            answer = _answer_line(number, error=error)
        except Exception as error:  # the caller must get an answer whatever happened; the loop logs the rest
            verdict = "failed"
            context = {"message": f"control: {verb} failed", "exception": error}
            asyncio.get_running_loop().call_exception_handler(context)
            failed = IsolatorError(str(verb), f"{type(error).__name__}: {error}", "please report it")
            answer = _answer_line(number, error=failed)
        if verdict == "denied" or (spec is not None and spec.recorded):
            called, plugin = _called(caller, verb, message.get("params"), verdict)
            urgent = verdict == "ok"  # a change is with the kernel, on its way to the trail, before its answer
            if present.begun is not None and self._server.debts is not None:
                self._server.debts.end(present.begun, called, urgent=urgent)
            else:
                self._server.record(called, plugin=plugin, urgent=urgent)
        self.send_soon(answer)


def _called(caller: Caller, verb: Any, params: Any, verdict: str) -> tuple[ControlCalled, str | None]:
    """The record of a call, and the plugin that it names."""
    params = params if isinstance(params, dict) else {}
    target, person = params.get("name") or params.get("update"), params.get("on_behalf_of")
    more = {"on_behalf_of": person[:MAX_ID]} if isinstance(person, str) and person else {}
    called = ControlCalled(
        verb=str(verb)[:80], uid=caller.uid, pid=caller.pid, role=caller.role, verdict=verdict, **more
    )
    return called, target[:MAX_ID] if isinstance(target, str) else None


def _answer_line(number: Any, *, result: Any = None, error: IsolatorError | None = None) -> bytes:
    if error is None:
        return line({"jsonrpc": "2.0", "id": number, "result": result})
    code = _NO_METHOD if isinstance(error, _NoVerbError) else _FAILED
    return line(
        {"jsonrpc": "2.0", "id": number, "error": {"code": code, "message": str(error), "data": error.to_json()}}
    )


def refusal(why: str, remedy: str) -> bytes:
    """The line for a caller that is not served."""
    return _answer_line(None, error=UnavailableError("control socket", why, remedy))


_BROKEN_OFF = UnavailableError(
    "the daemon", "was renewed while this was under way", "see whether it was done, and try again if it was not"
)
