"""One connection through the broker, in either direction, and what the trail says about it.

All records of a connection carry the same ``flow``, so that its end belongs to the event that its beginning belonged
to; and they tell when it *began* (``happened_ns``), because a record is written only once the other side has answered.
"""

from __future__ import annotations

import asyncio
import errno
import itertools
import secrets
import socket
import time
from dataclasses import dataclass, field
from typing import Any, Literal, NotRequired, TypedDict

from isolator.audit.schema import NetClosed, NetConnect, NetDenied
from isolator.broker.relay import Pipe, Scratch
from isolator.broker.virtual import Entry
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


@dataclass
class Flow:
    """One connection, from accept to the last record: ``client`` connected, ``server`` is what we dialled for it."""

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
    inward: int | None = None
    """The cage's own port, for a connection that comes in from outside."""
    pipes: list[Pipe] = field(default_factory=list)
    recorded: bool = False
    reason: str = "closed"
    began: int = field(default_factory=time.monotonic_ns)
    id: str = field(default_factory=lambda: f"{_session}.{next(_numbers)}")

    def describe(self) -> Endpoint:
        """The fields that every record about this connection has; the address is the far end's."""
        data: Endpoint = {"name": self.name, "address": str(self.dialled or self.address), "port": self.port}
        return data if self.inward is None else {**data, "direction": "in", "cage_port": self.inward}

    def opened(self) -> NetConnect:
        """The record of a connection that is carried from now on."""
        return NetConnect(**self.describe(), verdict="allowed", rule=self.rule, flow=self.id)

    def unreachable(self) -> NetConnect:
        """The record of a connection whose other side could not be reached."""
        return NetConnect(**self.describe(), verdict="failed", rule=self.rule, error=self.reason)

    def closed(self, now: float) -> NetClosed:
        """The record of the end; bytes count as the plugin sees them."""
        forth, back = (pipe.total for pipe in self.pipes) if self.pipes else (0, 0)
        sent, received = (forth, back) if self.inward is None else (back, forth)
        duration = round((now - self.started) * 1000, 3)
        return NetClosed(
            **self.describe(), sent=sent, received=received, duration_ms=duration, reason=self.reason, flow=self.id
        )

    def denied(self, rule: str, **found: Any) -> NetDenied:
        """The record of a refusal; ``found``: further fields."""
        return NetDenied(**self.describe(), protocol="tcp", verdict="denied", rule=rule, **found)

    def join(self, scratch: Scratch) -> tuple[Pipe, Pipe]:
        """Make the two pipes, client to server first; neither is started."""
        assert self.server is not None
        self.pipes = [Pipe(self.client, self.server, scratch), Pipe(self.server, self.client, scratch)]
        return self.pipes[0], self.pipes[1]

    async def relay(self) -> bool:
        """Wait for both directions; True for an orderly end. A broken direction ends the other at once."""
        up, down = self.pipes
        await asyncio.wait([up.ended, down.ended], return_when=asyncio.FIRST_COMPLETED)
        if not up.error and not down.error:
            await asyncio.wait([up.ended, down.ended])
        error = up.error or down.error
        if error is not None:
            self.failed(error)
        return error is None

    def failed(self, error: OSError) -> None:
        """Note what broke it off."""
        self.reason = errno.errorcode.get(error.errno or 0, "failed").lower()

    @property
    def touched(self) -> float:
        """When something last moved."""
        return max([self.started, *(pipe.touched for pipe in self.pipes)])
