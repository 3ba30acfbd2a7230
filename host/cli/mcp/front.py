"""A server of the Model Context Protocol at standard input and output, whose tools are those of a plugin.

It speaks both eras to its client and the control socket to the daemon, which alone decides who may call which tool.
What the server itself speaks does not matter; all but tools is answered here.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import sys
from collections.abc import Callable, Mapping
from typing import Any

from host.cli.mcp.source import Source
from host.client.terms import our_errors
from host.wire import mcp as protocol
from host.wire.mcp import Call, Id
from host.wire.strict_json import WireError
from isolator import __version__
from isolator.errors import IsolatorError, UnavailableError, translated
from isolator.ipc.tasks import cancel_all
from isolator_client.link import Link, connect
from isolator_client.protocol import Notification

_VERSIONS = (protocol.STATELESS, *protocol.SESSION_VERSIONS)
_AT_ONCE = 64
"""Requests of the client that are handled at a time; more wait in its pipe."""
_META = "io.modelcontextprotocol/"


class Front:
    """A server of the protocol at standard input and output, whose tools are those of the plugin ``name``."""

    def __init__(self, path: str, name: str, write: Callable[[bytes], object] | None = None) -> None:
        self._path, self._name = path, name
        self._write = write or _write
        self._link: Link | None = None
        self._reader: asyncio.Task[None] | None = None
        self._session = False
        """The client has opened a session of the older era."""
        self._calls: dict[Id, tuple[str, asyncio.Task[None]]] = {}
        """By the client's id: the key of a call, and its task."""
        self._progress: dict[str, Any] = {}
        """By key, the client's token."""
        self._numbers = 0

    async def serve(self) -> None:
        """Serve the client until it closes standard input."""
        tasks: set[asyncio.Task[None]] = set()
        source = Source(sys.stdin.fileno())

        def done(task: asyncio.Task[None]) -> None:
            tasks.discard(task)
            free.set()

        free = asyncio.Event()
        while data := await source.line():
            task = asyncio.create_task(self.received(data))
            tasks.add(task)
            task.add_done_callback(done)
            while len(tasks) >= _AT_ONCE:
                free.clear()
                await free.wait()
        await cancel_all(tasks)
        await self.close()

    async def close(self) -> None:
        """Close the connection to the daemon."""
        if self._reader is not None:
            self._reader.cancel()
        if self._link is not None:
            await self._link.close()

    async def received(self, data: bytes) -> None:
        """Handle one line of the client's."""
        try:
            message = protocol.read(data)
        except WireError as error:
            self._write(protocol.error_line(None, error.code, str(error)))
            return
        if not isinstance(message, Call):
            return  # nothing was asked of the client
        if message.id is None:
            if message.method == "notifications/cancelled":
                await self._cancel(message)
            return
        try:
            self._write(protocol.result_line(message.id, await self._answer(message)))
        except _RefusedError as error:
            self._write(protocol.error_line(message.id, error.code, str(error), error.data))
        except IsolatorError as error:
            wrong = error.code in ("denied", "usage", "not_found")
            code = protocol.INVALID_PARAMS if wrong else protocol.INTERNAL_ERROR
            self._write(protocol.error_line(message.id, code, str(error)))

    async def _answer(self, call: Call) -> dict[str, Any]:
        if call.method == "initialize":
            return await self._initialize(call)
        stateless = self._check_era(call)
        if call.method == "server/discover" and stateless:
            shown = await self._ask("mcp.open", {"name": self._name})
            return self._result(
                {"supportedVersions": list(_VERSIONS), "capabilities": {"tools": {}}, **_instructions(shown)},
                stateless, cached=True,
            )  # fmt: skip
        if call.method == "ping" and not stateless:
            return {}
        if call.method == "tools/list":
            if call.params.get("cursor") is not None:
                raise _RefusedError(protocol.INVALID_PARAMS, "there is no such page: all tools are on the first")
            shown = await self._ask("mcp.open", {"name": self._name})
            return self._result({"tools": shown["tools"]}, stateless, cached=True)
        if call.method == "tools/call":
            return self._result(await self._call(call), stateless)
        raise _RefusedError(protocol.METHOD_NOT_FOUND, f"{call.method[:80]}: this server has tools and nothing else")

    async def _initialize(self, call: Call) -> dict[str, Any]:
        asked = call.params.get("protocolVersion")
        version = asked if asked in protocol.SESSION_VERSIONS else protocol.SESSION
        shown = await self._ask("mcp.open", {"name": self._name})
        self._session = True
        return {
            "protocolVersion": version, "capabilities": {"tools": {}}, "serverInfo": self._info, **_instructions(shown),
        }  # fmt: skip

    def _check_era(self, call: Call) -> bool:
        """Whether a request is of the stateless era; raises _RefusedError for one that is of neither."""
        meta = call.params.get("_meta")
        version = meta.get(_META + "protocolVersion") if isinstance(meta, dict) else None
        if version is None:
            if self._session:
                return False
            why = "send initialize first, or the version and the client's capabilities in _meta of each request"
            raise _RefusedError(protocol.INVALID_PARAMS, why)
        if version != protocol.STATELESS:
            data = {"supported": list(_VERSIONS), "requested": str(version)[:40]}
            raise _RefusedError(protocol.UNSUPPORTED_VERSION, "Unsupported protocol version", data)
        if not isinstance(meta, dict) or not isinstance(meta.get(_META + "clientCapabilities"), dict):
            raise _RefusedError(protocol.INVALID_PARAMS, "_meta has no client capabilities")
        return True

    async def _call(self, call: Call) -> dict[str, Any]:
        tool, arguments = call.params.get("name"), call.params.get("arguments") or {}
        if not isinstance(tool, str) or not tool or not isinstance(arguments, dict):
            raise _RefusedError(protocol.INVALID_PARAMS, "name has to be text, and arguments an object")
        meta, task = call.params.get("_meta"), asyncio.current_task()
        token = meta.get("progressToken") if isinstance(meta, dict) else None
        assert call.id is not None and task is not None
        if call.id in self._calls:
            raise _RefusedError(protocol.INVALID_REQUEST, "another request with this id is under way")
        self._numbers += 1
        key = f"{os.getpid()}.{os.urandom(8).hex()}.{self._numbers}"
        self._calls[call.id] = key, task
        if token is not None:
            self._progress[key] = token
        try:
            answer = await self._ask(
                "mcp.call",
                {"name": self._name, "tool": tool, "arguments": arguments, "call": key, "progress": token is not None},
            )
        finally:
            del self._calls[call.id]
            self._progress.pop(key, None)
        error = answer.get("error")
        if isinstance(error, dict):
            code = error.get("code")
            known = code if isinstance(code, int) and not isinstance(code, bool) else protocol.INTERNAL_ERROR
            raise _RefusedError(known, str(error.get("message")), error.get("data"))
        result = answer.get("result")
        return dict(result) if isinstance(result, dict) else {}

    async def _cancel(self, call: Call) -> None:
        number = call.params.get("requestId")
        if isinstance(number, bool) or not isinstance(number, (str, int)):
            return
        found = self._calls.get(Id(isinstance(number, str), number))
        if found is not None:
            key, task = found
            task.cancel()  # nothing is sent for it any more
            with contextlib.suppress(IsolatorError):
                await self._ask("mcp.cancel", {"call": key})

    @property
    def _info(self) -> dict[str, str]:
        return {"name": f"isolator/{self._name}", "version": __version__}

    def _result(self, body: Mapping[str, Any], stateless: bool, *, cached: bool = False) -> dict[str, Any]:
        result = {key: value for key, value in body.items() if key not in ("_meta", "resultType")}
        if not stateless:
            return result
        fresh = {"ttlMs": 0, "cacheScope": "private"} if cached else {}
        return {**result, "resultType": "complete", "_meta": {_META + "serverInfo": self._info}, **fresh}

    # The daemon

    async def _ask(self, method: str, params: Mapping[str, Any]) -> dict[str, Any]:
        with our_errors():
            if self._link is None or self._link.over:
                with translated(OSError, UnavailableError, "the daemon", "", "try again"):
                    self._link = await connect(self._path)
                self._reader = asyncio.get_running_loop().create_task(self._attend(self._link))
            return await self._link.ask(method, params)

    async def _attend(self, link: Link) -> None:
        async with contextlib.aclosing(link.notifications()) as arriving:
            async for one in arriving:
                self._notified(one)

    def _notified(self, one: Notification) -> None:
        if one.method != "mcp.progress":
            return
        params = dict(one.params)
        token = self._progress.get(str(params.pop("call", "")))
        if token is not None:
            self._write(protocol.notification("notifications/progress", {"progressToken": token, **params}))


class _RefusedError(Exception):
    """A request of the client's that is answered with an error of JSON-RPC."""

    def __init__(self, code: int, message: str, data: Any = None) -> None:
        super().__init__(message)
        self.code, self.data = code, data


def _instructions(shown: Mapping[str, Any]) -> dict[str, str]:
    return {"instructions": shown["instructions"]} if shown.get("instructions") else {}


def _write(line: bytes) -> None:
    sys.stdout.buffer.write(line)
    sys.stdout.buffer.flush()
