"""Flows: connections through the broker, in either direction, with their records.

All records of a connection carry the same ``flow``, so that its end belongs to the same event as its beginning. They
carry the time at which it *began* (``happened_ns``), because a record is written only once the other side has answered.
"""

from __future__ import annotations

import asyncio
import errno
import itertools
import secrets
import socket
import time
from collections.abc import Coroutine
from dataclasses import dataclass, field
from typing import Any, Literal, NotRequired, TypedDict

from isolator.audit.schema import NetClosed, NetConnect, NetDenied
from isolator.broker.relay import Pipe, Scratch, reset
from isolator.broker.virtual import Entry
from isolator.ipc.tasks import report
from isolator.policy.addresses import Address

_session = secrets.token_hex(3)
_numbers = itertools.count(1)


class Endpoint(TypedDict):
    """Fields of a record about one connection."""

    name: str | None
    address: str
    port: int
    direction: NotRequired[Literal["in"]]
    cage_port: NotRequired[int]


class _Way(TypedDict):
    via: NotRequired[str]


class DescribedError(OSError):
    """An OSError whose text says in the trail why the other side could not be reached."""


@dataclass
class Flow:
    """One connection, from accept to the last record: ``client`` connected, ``server`` was dialled for it."""

    client: socket.socket
    address: Address
    port: int
    started: float
    """On the event loop's clock, in seconds."""
    name: str | None = None
    rule: str = ""
    entry: Entry | None = None
    dialled: Address | None = None
    server: socket.socket | None = None
    cage_port: int | None = None
    """The cage's own port, for a connection that comes in from outside."""
    pipes: list[Pipe] = field(default_factory=list)
    roomy: bool = False
    """Whether its outer buffers may grow (``buffers``)."""
    via: str = ""
    """The proxy that it goes through."""
    recorded: bool = False
    reason: str = "closed"
    began: int = field(default_factory=time.monotonic_ns)
    id: str = field(default_factory=lambda: f"{_session}.{next(_numbers)}")

    def endpoint(self) -> Endpoint:
        """The fields that every record about this connection has; the address is the far end's."""
        data: Endpoint = {"name": self.name, "address": str(self.dialled or self.address), "port": self.port}
        return data if self.cage_port is None else {**data, "direction": "in", "cage_port": self.cage_port}

    def opened(self) -> NetConnect:
        """The record of a connection that is carried from now on."""
        return NetConnect(**self.endpoint(), **self._way(), verdict="allowed", rule=self.rule, flow=self.id)

    def unreachable(self) -> NetConnect:
        """The record of a connection whose other side could not be reached."""
        return NetConnect(**self.endpoint(), **self._way(), verdict="failed", rule=self.rule, error=self.reason)

    def _way(self) -> _Way:
        return {"via": self.via} if self.via else {}

    def closed(self, now: float) -> NetClosed:
        """The record of the end; bytes count as the plugin sees them."""
        forth, back = (pipe.total for pipe in self.pipes) if self.pipes else (0, 0)
        sent, received = (forth, back) if self.cage_port is None else (back, forth)
        duration = round((now - self.started) * 1000, 3)
        return NetClosed(
            **self.endpoint(), sent=sent, received=received, duration_ms=duration, reason=self.reason, flow=self.id
        )

    def denied(self, rule: str, **found: Any) -> NetDenied:
        """The record of a refusal; ``found``: further fields."""
        return NetDenied(**self.endpoint(), protocol="tcp", verdict="denied", rule=rule, **found)

    def join(self, scratch: Scratch) -> tuple[Pipe, Pipe]:
        """Make the two pipes, client to server first; neither is started."""
        assert self.server is not None
        self.pipes = [Pipe(self.client, self.server, scratch), Pipe(self.server, self.client, scratch)]
        return self.pipes[0], self.pipes[1]

    async def relay(self) -> bool:
        """Wait for both directions; True for an orderly end. A broken direction ends the other at once.

        Raises Denied for what a gate refused.
        """
        up, down = self.pipes
        await asyncio.wait([up.ended, down.ended], return_when=asyncio.FIRST_COMPLETED)
        if not (up.error or down.error or up.denied or down.denied):
            await asyncio.wait([up.ended, down.ended])
        denied = up.denied or down.denied
        if denied is not None:
            raise denied
        error = up.error or down.error
        if error is not None:
            self.failed(error)
        return error is None

    def failed(self, error: OSError) -> None:
        """Note the error that broke the connection off."""
        if isinstance(error, DescribedError):
            self.reason = str(error)
            return
        self.reason = errno.errorcode.get(error.errno or 0, "failed").lower()

    @property
    def touched(self) -> float:
        """Time of the last byte in either direction, on the event loop's clock."""
        return max([self.started, *(pipe.touched for pipe in self.pipes)])

    def release(self, *, orderly: bool) -> None:
        """Stop the pipes and close both sockets, by a reset unless both ends were ``orderly``."""
        for pipe in self.pipes:
            pipe.stop()
        for sock in (self.client, self.server):
            if sock is not None:
                sock.close() if orderly else reset(sock)
        if self.entry is not None:
            self.entry.flows -= 1


class FlowTable:
    """The flows of one run in one direction, of which ``limit`` may be open at once."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._flows: dict[asyncio.Task[None], Flow] = {}

    @property
    def full(self) -> bool:
        """Whether no further flow may be opened."""
        return len(self._flows) >= self._limit

    def start(self, flow: Flow, work: Coroutine[Any, Any, None]) -> None:
        """Run ``work``, which carries ``flow`` from beginning to end."""
        task = asyncio.get_running_loop().create_task(work)
        self._flows[task] = flow
        task.add_done_callback(self._ended)

    def end_idle(self, before: float) -> None:
        """End every flow in which nothing has moved since ``before``, on the event loop's clock."""
        for task, flow in self._flows.items():
            if flow.touched < before:
                flow.reason = "idle"
                task.cancel()

    def end_incomplete(self, before: float) -> None:
        """End every flow whose client has left half a greeting or request unfinished since ``before``."""
        for flow in self._flows.values():
            for pipe in flow.pipes:
                pipe.end_incomplete(before)

    async def close(self) -> None:
        """End every flow, because its cage ended; all their records are written when it returns."""
        for task, flow in self._flows.items():
            flow.reason = "cage ended"
            task.cancel()
        await asyncio.gather(*self._flows, return_exceptions=True)

    def _ended(self, task: asyncio.Task[None]) -> None:
        self._flows.pop(task, None)
        if not task.cancelled() and (error := task.exception()) is not None:
            report(task.get_loop(), "a flow", error)
