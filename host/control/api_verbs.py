"""Handlers of the ``api`` verbs: the platform serves its own methods of the host API.

A platform process registers a method with ``api.register`` on its connection. A plugin's call then arrives there as the
notification ``api.call`` with a number, and is answered with ``api.answer``. When the connection closes, its methods
are gone and open calls fail: a plugin never waits for a platform that has died. A host that takes another's place goes
on with its open calls: the plugin's line is read again, and waits for the answer to what was sent before.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from host.channel.calls import patient
from host.channel.reply import RETRY_LATER
from host.control.endpoints import Belonging, Caller, Verbs, serves
from host.control.platform_types import ApiAnswer, ApiCall, ApiRegister, ApiUnregister, RegisteredMethod
from host.control.terms import Nothing
from host.host_api.api import PLATFORM_TIMEOUT, HostApi
from host.host_api.methods import ApiError, Context
from host.wire.strict_json import dumps
from isolator.errors import UsageError, translated
from isolator.ipc.body import Body, Json
from isolator.policy.names import parse_permission


class OpenState(Body):
    """A call that the platform has not answered, on its way to another host."""

    call: int
    made: Any
    """the method, the plugin, its run and the parameters"""
    deadline: float
    """loop time by which it has to be answered"""


@dataclass(eq=False)
class _Call:
    """A call that the platform has not answered; the fields of its state, and who answers."""

    caller: Caller
    made: list[Any]
    deadline: float
    answer: asyncio.Future[ApiAnswer]

    def lost(self) -> None:
        """The caller has gone."""
        if not self.answer.done():
            self.answer.set_exception(ApiError(RETRY_LATER, "the platform went away", retry_after_ms=1000))


class ApiVerbs(Verbs):
    """Methods of the host API that the platform serves."""

    def __init__(self, api: HostApi) -> None:
        self._api = api
        self._calls: dict[int, _Call] = {}
        self._taken: dict[int, _Call] = {}
        """Calls of another host for which their plugin has not asked here yet."""
        self._open: list[OpenState] = []
        """Calls that the successor of this process goes on with."""
        self._served: dict[str, tuple[Caller, Callable[[], None]]] = {}
        """Server of a method, and the call that ends its service."""
        self.numbers = 0
        """The number of the newest call."""

    @serves(ApiRegister)
    async def register(self, request: ApiRegister, caller: Caller) -> RegisteredMethod:
        with translated(ValueError, UsageError, f"method {request.method}"):
            permission = parse_permission(request.permission)

        self._serve_by(caller, request.method, permission)
        return {"method": request.method, "permission": permission}

    def _serve_by(self, caller: Caller, method: str, permission: str) -> None:
        async def forward(context: Context, params: Mapping[str, Any]) -> Any:
            return await self._forward(caller, method, context, params)

        remove = self._api.register(method, permission, forward)

        def kept() -> Belonging:
            calls = [one.to_json() for one in self._open if one.made[0] == method]
            data = {"method": method, "permission": permission, **({"open": calls} if calls else {})}
            return Belonging(verb=ApiRegister.spec.verb, data=data)

        def end() -> None:
            remove()
            self._served.pop(method, None)
            over()

        over = caller.keep(end, kept)
        self._served[method] = caller, end

    @serves(ApiUnregister)
    async def unregister(self, request: ApiUnregister, caller: Caller) -> Nothing:
        server, end = self._served.get(request.method, (None, None))
        if server is not caller or end is None:
            why = "is not served by this connection"
            raise UsageError(f"method {request.method}", why, "only the connection that registered it may")
        end()
        return {}

    @serves(ApiAnswer)
    async def answer(self, request: ApiAnswer, caller: Caller) -> Nothing:
        call = self._calls.get(request.call)
        if call is None or call.caller is not caller:
            raise UsageError("api.answer", "no such call is open on this connection", "it may have timed out")
        if not call.answer.done():
            call.answer.set_result(request)
        return {}

    async def _forward(self, caller: Caller, method: str, context: Context, params: Mapping[str, Any]) -> Any:
        made = [method, context.plugin.name, context.run, dumps(params)]
        number = self._sent_before(caller, made)
        if number is None:
            number = self.numbers = self.numbers + 1
            self._await(number, caller, made, asyncio.get_running_loop().time() + PLATFORM_TIMEOUT)
            sent: ApiCall = {"call": number, "method": method, "plugin": context.plugin.name, "params": dict(params)}
            caller.notify("api.call", sent)
        call = self._calls[number]
        try:
            with patient():
                async with asyncio.timeout_at(call.deadline):
                    answer = await call.answer
        except TimeoutError:
            raise ApiError(RETRY_LATER, "the platform does not answer", retry_after_ms=1000) from None
        finally:
            self._drop(number)
        error = answer.error
        if isinstance(error, dict):
            code = error.get("code")
            raise ApiError(code if isinstance(code, int) else -32603, str(error.get("message", "failed"))[:400])
        return answer.result

    def _await(self, number: int, caller: Caller, made: list[Any], deadline: float) -> None:
        answer: asyncio.Future[ApiAnswer] = asyncio.get_running_loop().create_future()
        call = self._calls[number] = _Call(caller, made, deadline, answer)
        answer.add_done_callback(lambda answer: answer.cancelled() or answer.exception())  # its plugin may have gone
        caller.on_close.append(call.lost)

    def _drop(self, number: int) -> None:
        call = self._calls.pop(number, None)
        if call is not None:
            call.caller.on_close.remove(call.lost)

    # One host in the place of another

    def hold(self) -> None:
        """Hand on the calls that are open now: nothing is read of callers and plugins any more."""
        self._open = [
            OpenState(call=number, made=call.made, deadline=call.deadline) for number, call in self._calls.items()
        ]

    def _sent_before(self, caller: Caller, made: list[Any]) -> int | None:
        """The number of this very call if another host has sent it, and the plugin's line was read again here."""
        found = (number for number, call in self._taken.items() if call.made == made and call.caller is caller)
        number = next(found, None)
        if number is not None:
            del self._taken[number]
        return number

    def restore(self, caller: Caller, data: Json) -> None:
        """Take over a method that a caller serves from the host whose place this one takes, with the open calls."""
        self._serve_by(caller, str(data["method"]), str(data["permission"]))
        for one in data.get("open", ()):
            state = OpenState.from_json(one, "open call")
            self._await(state.call, caller, state.made, state.deadline)
            self._taken[state.call] = self._calls[state.call]
            asyncio.get_running_loop().call_at(state.deadline, self._expire, state.call)

    def _expire(self, number: int) -> None:
        if self._taken.pop(number, None) is not None:  # nobody has asked for it again
            self._drop(number)
