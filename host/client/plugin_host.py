"""The daemon as a library for a platform in the same tree: ``isolator_client`` with this project's own types.

    async with PluginHost.connect() as host:
        await host.register_event("backup.failed", BackupFailed, order_by="volume")
        await host.serve("projects.get", "read:projects", get_project)
        event = await host.emit("deploy.completed", {...})
        async for recorded in host.audit():
            print(recorded.record.type, recorded.line)

Everything that happens on the connection happens in ``isolator_client.aio``. This adds event types by pydantic model,
records of the trail as ``isolator.audit.record.Record``, and the errors of ``isolator.errors``.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from host.client.terms import our_errors, published_error
from isolator.audit.record import Record, parse
from isolator.errors import IsolatorError
from isolator.paths import Paths
from isolator_client.aio import AsyncClient
from isolator_client.calls import Delivered, Emitted, Health

if TYPE_CHECKING:
    from pydantic import BaseModel

__all__ = ["ApiHandler", "Delivered", "Emitted", "PluginHost", "Recorded"]

ApiHandler = Callable[[str, dict[str, Any]], Awaitable[Any]]
"""Answers a plugin's call: (plugin name, params) → JSON value. Raises IsolatorError to refuse."""


@dataclass(frozen=True)
class Recorded:
    """One record of the trail: its line, byte for byte as it stands there, and what it says."""

    line: str
    record: Record


class PluginHost:
    """A connection to the daemon; make one with ``connect``."""

    def __init__(self, path: os.PathLike[str] | str) -> None:
        self._client = AsyncClient(path)

    @classmethod
    @contextlib.asynccontextmanager
    async def connect(cls, root: str | os.PathLike[str] | None = None) -> AsyncIterator[PluginHost]:
        """Connect to the daemon of ``root`` (default: ``$ISOLATOR_ROOT``, else ``/``).

        Raises UnavailableError when none runs there, DeniedError when this user cannot reach its socket.
        """
        host = cls(Paths.of(root).control_socket)
        with our_errors():
            await host._client.open()
        try:
            yield host
        finally:
            await host._client.close()

    async def emit(
        self,
        name: str,
        payload: Mapping[str, Any],
        *,
        dedupe_key: str | None = None,
        ttl: float | None = None,
        traceparent: str | None = None,
        on_behalf_of: str | None = None,
    ) -> Emitted:
        """Emit an event; it is safe on disk when this returns. Raises UsageError for a payload that does not fit."""
        more = {"dedupe_key": dedupe_key, "traceparent": traceparent, "on_behalf_of": on_behalf_of}
        with our_errors():
            return await self._client.emit(name, payload, ttl=ttl, **more)

    async def wait(self, event_id: str, *, timeout: float = 30.0) -> list[Delivered]:
        """The deliveries of an event once all are final, or as they stand after ``timeout`` seconds."""
        with our_errors():
            return await self._client.wait(event_id, timeout=timeout)

    async def register_event(
        self,
        name: str,
        model: type[BaseModel],
        *,
        order_by: str | None = None,
        version: int = 1,
        breaking: bool = False,
    ) -> None:
        """Make an event of the platform's own known; its payloads are checked against ``model`` by the daemon."""
        schema = model.model_json_schema()
        with our_errors():
            await self._client.register_event(name, schema, order_by=order_by, version=version, breaking=breaking)

    async def unregister_event(self, name: str) -> None:
        """Have the daemon forget an event type; refused while plugins subscribe to it or its events wait."""
        with our_errors():
            await self._client.unregister_event(name)

    async def health(self, name: str | None = None) -> list[Health]:
        """How every plugin, or the one of this name, is doing."""
        with our_errors():
            return await self._client.health(name)

    async def serve(self, method: str, permission: str, handler: ApiHandler) -> None:
        """Answer a host-API method that plugins may call with ``permission``."""

        async def answer(plugin: str, params: dict[str, Any]) -> Any:
            try:
                return await handler(plugin, params)
            except IsolatorError as error:
                raise published_error(error) from error

        with our_errors():
            await self._client.serve(method, permission, answer)

    async def audit(self, *, after: int | None = None, lines: int = 0) -> AsyncIterator[Recorded]:
        """The records of the trail as they are written: those after record ``after``, else from the last ``lines`` on.

        Goes on where it was when the daemon was away. Raises IsolatorError when a record does not continue the one
        before, and when the trail ends before ``after``: then it was changed.
        """
        with our_errors():
            async with contextlib.aclosing(self._client.audit(after=after, lines=lines)) as arriving:
                async for recorded in arriving:
                    record = parse(recorded.line.encode("ascii"))
                    if record is None:
                        raise IsolatorError("audit trail", "sends no record", "isolator audit verify")
                    yield Recorded(recorded.line, record)

    async def plugins(self) -> list[dict[str, Any]]:
        """Every plugin with its live figures."""
        with our_errors():
            return await self._client.plugins()

    async def call(self, method: str, /, **params: Any) -> dict[str, Any]:
        """Any verb of the control socket; raises the error that the daemon raised."""
        with our_errors():
            return await self._client.call(method, **params)
