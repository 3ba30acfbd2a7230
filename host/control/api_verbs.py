"""Handlers of the ``api`` verbs: the platform serves its own methods of the host API.

A platform process registers a method with ``api.register`` on its connection. A plugin's call then arrives there as the
notification ``api.call`` with a number, and is answered with ``api.answer``. When the connection closes, its methods
are gone and open calls fail: a plugin never waits for a platform that has died.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from typing import Any

from host.channel.reply import RETRY_LATER
from host.control.endpoints import AnyEndpoint, Belonging, Caller, Endpoint
from host.control.platform_types import ApiAnswer, ApiCall, ApiRegister, ApiUnregister, RegisteredMethod
from host.control.terms import Nothing
from host.host_api.api import PLATFORM_TIMEOUT, HostApi
from host.host_api.methods import ApiError, Context
from isolator.errors import UsageError
from isolator.ipc.body import Json
from isolator.policy.names import parse_permission


class ApiVerbs:
    """Methods of the host API that the platform serves."""

    def __init__(self, api: HostApi) -> None:
        self._api = api
        self._calls: dict[int, tuple[Caller, asyncio.Future[ApiAnswer]]] = {}
        self._served: dict[str, tuple[Caller, Callable[[], None]]] = {}
        """Server of a method, and the call that ends its service."""
        self.numbers = 0
        """The number of the newest call."""

    def endpoints(self) -> list[AnyEndpoint]:
        """The verbs with their handlers."""
        return [
            Endpoint(ApiRegister, self.register),
            Endpoint(ApiUnregister, self.unregister),
            Endpoint(ApiAnswer, self.answer),
        ]

    async def register(self, request: ApiRegister, caller: Caller) -> RegisteredMethod:
        try:
            permission = parse_permission(request.permission)
        except ValueError as error:
            raise UsageError(f"method {request.method}", str(error)) from None

        self._serve_by(caller, request.method, permission)
        return {"method": request.method, "permission": permission}

    def restore(self, caller: Caller, data: Json) -> None:
        """Take over a method that a caller serves from the host whose place this one takes."""
        self._serve_by(caller, str(data["method"]), str(data["permission"]))

    def _serve_by(self, caller: Caller, method: str, permission: str) -> None:
        async def forward(context: Context, params: Mapping[str, Any]) -> Any:
            return await self._forward(caller, method, context, params)

        remove = self._api.register(method, permission, forward)
        belonging = Belonging(verb=ApiRegister.spec.verb, data={"method": method, "permission": permission})

        def end() -> None:
            remove()
            self._served.pop(method, None)
            over()

        over = caller.keep(end, lambda: belonging)
        self._served[method] = caller, end

    async def unregister(self, request: ApiUnregister, caller: Caller) -> Nothing:
        server, end = self._served.get(request.method, (None, None))
        if server is not caller or end is None:
            why = "is not served by this connection"
            raise UsageError(f"method {request.method}", why, "only the connection that registered it may")
        end()
        return {}

    async def answer(self, request: ApiAnswer, caller: Caller) -> Nothing:
        entry = self._calls.get(request.call)
        if entry is None or entry[0] is not caller:
            raise UsageError("api.answer", "no such call is open on this connection", "it may have timed out")
        if not entry[1].done():
            entry[1].set_result(request)
        return {}

    async def _forward(self, caller: Caller, method: str, context: Context, params: Mapping[str, Any]) -> Any:
        self.numbers += 1
        number = self.numbers
        future: asyncio.Future[ApiAnswer] = asyncio.get_running_loop().create_future()
        self._calls[number] = (caller, future)

        def lost() -> None:
            if not future.done():
                future.set_exception(ApiError(RETRY_LATER, "the platform went away", retry_after_ms=1000))

        over = caller.keep(lost)
        call: ApiCall = {"call": number, "method": method, "plugin": context.plugin.name, "params": dict(params)}
        try:
            caller.notify("api.call", call)
            async with asyncio.timeout(PLATFORM_TIMEOUT):
                answer = await future
        except TimeoutError:
            raise ApiError(RETRY_LATER, "the platform does not answer", retry_after_ms=1000) from None
        finally:
            del self._calls[number]
            over()
        error = answer.error
        if isinstance(error, dict):
            code = error.get("code")
            raise ApiError(code if isinstance(code, int) else -32603, str(error.get("message", "failed"))[:400])
        return answer.result
