"""A plugin's connection to its host socket, and the rates of one plugin on all of them."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from host.channel.calls import OpenCalls
from host.channel.reply import PERMISSION_DENIED
from host.wire.lines import CPU_A_SECOND, CPU_AT_ONCE, LineProtocol, LineState
from host.wire.strict_json import WireError, line, parse_object
from isolator.base.pacing import TokenBucket
from isolator.ipc.succession import Departure
from isolator.linux.peer import peer_ids

RATE, BURST = 200.0, 400.0
CONNECTIONS, IN_FLIGHT = 16, 16
CONNECTS_A_SECOND, CONNECTS_AT_ONCE = 50.0, 50.0
BYTES_A_SECOND, BYTES_AT_ONCE = 1 << 20, 4 << 20
"""Limits of a plugin on all its connections: parsing is not free."""


if TYPE_CHECKING:
    from host.host_api.api import HostApi


@dataclass
class Limits:
    """Rates of one plugin, on all its connections together."""

    calls: TokenBucket = field(default_factory=lambda: TokenBucket(RATE, BURST))
    connects: TokenBucket = field(default_factory=lambda: TokenBucket(CONNECTS_A_SECOND, CONNECTS_AT_ONCE))
    bytes: TokenBucket = field(default_factory=lambda: TokenBucket(BYTES_A_SECOND, BYTES_AT_ONCE))
    cpu: TokenBucket = field(default_factory=lambda: TokenBucket(CPU_A_SECOND, CPU_AT_ONCE))
    refusing: asyncio.Lock = field(default_factory=asyncio.Lock)
    refused: int = 0
    reported: float = 0.0


class Connection(LineProtocol):
    """Connection of a plugin to its host socket."""

    limit = 256 * 1024
    write_high = 256 * 1024

    def __init__(self, api: HostApi, name: str, run: str, limits: Limits) -> None:
        super().__init__()
        self.name, self.run = name, run
        self.budget, self.cpu = limits.bytes, limits.cpu
        self._api = api
        self._calls = OpenCalls(self._answered)

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(transport)
        refused = self._api.admit(self, peer_ids(transport.get_extra_info("socket"))[1])
        if refused is not None:
            self.send(line({"jsonrpc": "2.0", "id": None, "error": {"code": PERMISSION_DENIED, "message": refused}}))
            self.close()

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        self._api.dropped(self)
        self._calls.cancel()

    def line_received(self, data: bytes) -> None:
        try:
            message = parse_object(data)
            if not isinstance(message.get("method"), str):
                raise WireError("not a request", -32600)
        except WireError as error:
            self._break(str(error), error.code)
            return
        self._calls.begin(data, self._serve(message))
        if len(self._calls) >= IN_FLIGHT:
            self.hold("in flight")

    @property
    def busy(self) -> bool:
        """Whether a call is unanswered that does not wait for others."""
        return self._calls.busy

    def pass_on_all(self, departure: Departure) -> LineState:
        """Hand the connection on; a call that is still unanswered is read again."""
        return self.pass_on(departure, again=self._calls.break_off())

    def too_long(self) -> None:
        self._break(f"a message is longer than {self.limit} bytes", -31003)

    def _break(self, why: str, code: int) -> None:
        self.send(line({"jsonrpc": "2.0", "id": None, "error": {"code": code, "message": why}}))
        self._api.breach(self.name, self.run, why)
        self.close()

    def _answered(self) -> None:
        if len(self._calls) < IN_FLIGHT:
            self.unhold("in flight")

    async def _serve(self, message: dict[str, Any]) -> None:
        answer = await self._api.call(self.name, self.run, message["method"], message.get("params"))
        if message.get("id") is not None:
            self.send(line({"jsonrpc": "2.0", "id": message["id"], **answer}))
