# SPDX-FileCopyrightText: Isolator contributors
# SPDX-License-Identifier: 0BSD
"""Methods of the platform, served in the place of a real one to the plugin under test."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from isolator_client.aio import AsyncClient

_SECONDS = 30.0


@dataclass(frozen=True)
class _Method:
    name: str
    permission: str
    answer: Any


class HostApi:
    """See the module. ``calls`` has those that were made: method and parameters."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, dict[str, Any]]] = []
        self._methods: list[_Method] = []
        self._loop: asyncio.AbstractEventLoop | None = None
        self._clients: list[AsyncClient] = []

    def serve(self, method: str, permission: str, answer: Any | Callable[[dict[str, Any]], Any]) -> None:
        """Answer a method, which a plugin with ``permission`` may call, by a value or by a function of its parameters.

        An ``isolator_client.errors.IsolatorError`` that the function raises is a refusal to the plugin. Raises
        RuntimeError once a sidecar has started.
        """
        if self._clients:
            raise RuntimeError("host_api.serve() comes before the sidecar starts")
        self._methods.append(_Method(method, permission, answer))

    def connect(self, root: str) -> None:
        """Serve the methods to a daemon; raises the client's errors."""
        if not self._methods:
            return
        if self._loop is None:
            self._loop = asyncio.new_event_loop()
            threading.Thread(target=self._loop.run_forever, name="host_api", daemon=True).start()
        asyncio.run_coroutine_threadsafe(self._open(root), self._loop).result(_SECONDS)

    def close(self) -> None:
        """Serve nothing any more."""
        if self._loop is not None:
            asyncio.run_coroutine_threadsafe(self._close(), self._loop).result(_SECONDS)
            self._loop.call_soon_threadsafe(self._loop.stop)

    async def _open(self, root: str) -> None:
        client = AsyncClient(root=root)
        await client.open()
        self._clients.append(client)
        for method in self._methods:
            await client.serve(method.name, method.permission, self._handler(method))

    def _handler(self, method: _Method) -> Callable[[str, dict[str, Any]], Any]:
        async def handle(plugin: str, params: dict[str, Any]) -> Any:
            self.calls.append((method.name, params))
            return method.answer(params) if callable(method.answer) else method.answer

        return handle

    async def _close(self) -> None:
        for client in self._clients:
            await client.close()
