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
from typing import TYPE_CHECKING, Any, Self, TypeVar

from host.client.terms import our_errors, published_error
from isolator.audit.record import Record, parse
from isolator.errors import IsolatorError
from isolator.paths import Paths
from isolator_client.address import StrPath
from isolator_client.aio import AsyncClient
from isolator_client.calls import Call, Delivered, Emitted, Staged

if TYPE_CHECKING:
    from pydantic import BaseModel

__all__ = ["ApiHandler", "Delivered", "Emitted", "PluginHost", "Recorded"]

T = TypeVar("T")

ApiHandler = Callable[[str, dict[str, Any]], Awaitable[Any]]
"""Answers a plugin's call: (plugin name, params) → JSON value. Raises IsolatorError to refuse."""


@dataclass(frozen=True)
class Recorded:
    """One record of the trail: its line, byte for byte as it stands there, and what it says."""

    line: str
    record: Record


class PluginHost(AsyncClient):
    """A connection to the daemon; make one with ``connect``. What it raises are errors of ``isolator.errors``."""

    @classmethod
    @contextlib.asynccontextmanager
    async def connect(cls, root: os.PathLike[str] | str | None = None) -> AsyncIterator[PluginHost]:
        """Connect to the daemon of ``root`` (default: ``$ISOLATOR_ROOT``, else ``/``).

        Raises UnavailableError when none runs there, DeniedError when this user cannot reach its socket.
        """
        async with cls(Paths.of(root).control_socket) as host:
            yield host

    async def __aenter__(self) -> Self:
        await self.open()
        return self

    async def open(self) -> None:
        """As ``AsyncClient.open``."""
        with our_errors():
            await super().open()

    async def register_event(
        self,
        name: str,
        schema: Mapping[str, Any] | type[BaseModel],
        *,
        order_by: str | None = None,
        version: int = 1,
        breaking: bool = False,
    ) -> None:
        """Register an event of the platform's own; the daemon checks its payloads against ``schema``, or a model's."""
        found = schema if isinstance(schema, Mapping) else schema.model_json_schema()
        await super().register_event(name, found, order_by=order_by, version=version, breaking=breaking)

    async def serve(self, method: str, permission: str, handler: ApiHandler) -> None:
        """Answer a host-API method that plugins may call with ``permission``."""

        async def answer(plugin: str, params: dict[str, Any]) -> Any:
            try:
                return await handler(plugin, params)
            except IsolatorError as error:
                raise published_error(error) from error

        await super().serve(method, permission, answer)

    async def audit(  # type: ignore[override]  # its records are of this project's type
        self, *, after: int | None = None, lines: int = 0
    ) -> AsyncIterator[Recorded]:
        """The records of the trail as they are written: those after record ``after``, else from the last ``lines`` on.

        Goes on where it was when the daemon was away. Raises IsolatorError when a record does not continue the one
        before, and when the trail ends before ``after``: then it was changed.
        """
        with our_errors():
            async with contextlib.aclosing(super().audit(after=after, lines=lines)) as arriving:
                async for recorded in arriving:
                    record = parse(recorded.line.encode("ascii"))
                    if record is None:
                        raise IsolatorError("audit trail", "sends no record", "isolator audit verify")
                    yield Recorded(recorded.line, record)

    async def call(self, method: str, /, **params: Any) -> dict[str, Any]:
        """Any verb of the control socket; raises the error that the daemon raised."""
        with our_errors():
            return await super().call(method, **params)

    async def stage(self, source: StrPath | int, **more: Any) -> Staged:
        """As ``AsyncClient.stage``."""
        with our_errors():
            return await super().stage(source, **more)

    async def _do(self, call: Call[T]) -> T:
        with our_errors():
            return await super()._do(call)
