"""Stream mode: one lasting connection, newline-delimited JSON-RPC 2.0 in both directions, many requests in flight.

The host speaks first: ``host.hello`` with the protocol majors it knows, the plugin, its granted hooks and the limits.
The plugin answers with the major it chose, the hooks it handles and its capabilities; a choice that was not offered
ends the connection with a reason. After that requests may be answered in any order. Their ids cannot be guessed, so
every reply is to a request of ours: an unknown or repeated id, like any other breach, gets one clear error, is
recorded, and ends the connection. Requests in flight then have an unknown outcome.
"""

from __future__ import annotations

import asyncio
import math
import socket
from collections.abc import Awaitable, Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from host.channel.calls import OpenCalls
from host.channel.reply import STREAM_MESSAGE, UNSUPPORTED_PROTOCOL, LostError, NotSentError, shown
from host.events import random_hex
from host.wire.lines import LineProtocol, LineState
from host.wire.strict_json import WireError, line, parse_object
from isolator import __version__
from isolator.base.pacing import TokenBucket
from isolator.ipc.body import Body
from isolator.ipc.succession import Departure, Descriptors

PROTOCOLS = ("1",)
HELLO_TIMEOUT = 5.0
BYTES_A_SECOND, BYTES_AT_ONCE = 4 << 20, 16 << 20
"""Limits of a plugin's sending."""
CALLS_IN_FLIGHT = 32
"""Calls of the plugin to the host API that may be unanswered on this connection."""

Call = Callable[[str, Any], Awaitable[dict[str, Any]]]
"""Answers a request of the plugin's: (method, params) → ``{"result": …}`` or ``{"error": …}``."""
Read = tuple[dict[str, Any], bytes]
"""A reply as it was read: the message and its bytes."""


class Reply(Protocol):
    """Whoever waits for a reply; a future is one."""

    def done(self) -> bool:
        """Whether nobody waits any more."""

    def set_result(self, result: Read, /) -> None:
        """Take the reply."""

    def set_exception(self, exception: LostError | NotSentError, /) -> None:
        """Take the reason why there will be none."""


@dataclass(frozen=True, slots=True)
class Greeting:
    """The plugin's answer to ``host.hello``."""

    protocol: str
    handles: frozenset[str]
    capabilities: frozenset[str]


class StreamState(Body):
    """A connection on its way to another host."""

    line: LineState
    deadlines: dict[str, float]
    """by number of each request without a reply, the loop time by which it is awaited; 0: it no longer is"""


class StreamConnection(LineProtocol):
    """Connection to one run of a plugin."""

    limit = STREAM_MESSAGE
    write_high = STREAM_MESSAGE

    def __init__(
        self, call: Call, breach: Callable[[str], None], cpu: TokenBucket, redact: Callable[[str], str]
    ) -> None:
        super().__init__()
        self.cpu, self._redact = cpu, redact
        self.budget = TokenBucket(BYTES_A_SECOND, BYTES_AT_ONCE)
        self.closed = False
        """The connection has ended."""
        self.why = ""
        """The reason for that."""
        self.agreed: Greeting | None = None
        """The plugin's greeting, once it is there."""
        self.is_writable = True
        """The plugin may be sent more: it has read enough, or is gone."""
        self._writable = asyncio.Event()
        """Set once it is again, for those who wait."""
        self._call = call
        self._breach = breach
        self._pending: dict[str, tuple[Reply, float] | None] = {}
        """Waiter of each request whose reply may still come, by number, and the loop time until which it waits; None:
        nobody does any more."""
        self._timer: asyncio.TimerHandle | None = None
        """Fires at the first deadline, or before it: one timer, for thousands of requests a second."""
        self._expires = math.inf
        """When it does."""
        self._calls = OpenCalls(self._answered)
        """Calls of the plugin that are not answered."""

    @property
    def in_flight(self) -> int:
        """Number of requests that are not answered yet."""
        return sum(1 for one in self._pending.values() if one is not None and not one[0].done())

    async def request(self, method: str, params: Mapping[str, Any], timeout: float) -> Read:
        """Send a request and wait at most ``timeout`` seconds for its reply: the message and its bytes.

        Raises NotSentError when the connection has ended before, LostError when it ends later.
        """
        number = random_hex()
        reply: asyncio.Future[Read] = self._loop.create_future()
        self.write(number, _request(method, params, number), timeout, reply)
        self.flush()
        try:
            return await reply
        except asyncio.CancelledError:
            self._give_up(number)
            raise

    def write(self, number: str, data: bytes, timeout: float, reply: Reply) -> None:
        """Gather the line of a request until ``flush``; ``reply`` gets what ``request`` returns or raises."""
        if self.closed or self.transport is None or self.transport.is_closing():
            reply.set_exception(NotSentError(self.why or "the connection is closed"))
            return
        self._gathered.append(data)
        self._await(number, self._loop.time() + timeout, reply)

    def _await(self, number: str, deadline: float, reply: Reply) -> None:
        self._pending[number] = (reply, deadline)
        if deadline < self._expires:
            self._set_timer(deadline)

    def _set_timer(self, when: float = math.inf) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._expires, self._timer = when, self._loop.call_at(when, self._expire) if when < math.inf else None

    def _expire(self) -> None:
        """Give up the requests whose time is over."""
        now = self._loop.time()
        for number, one in list(self._pending.items()):
            if one is None:
                continue
            reply, deadline = one
            if deadline <= now or reply.done():
                if not reply.done():
                    reply.set_exception(LostError("no reply in time"))
                self._give_up(number)
        self._set_timer(min((one[1] for one in self._pending.values() if one is not None), default=math.inf))

    def _give_up(self, number: str) -> None:
        """Await a reply no more. The request stays pending: its reply may still come, and is no breach then."""
        if self._pending.get(number) is not None:
            self._pending[number] = None
            self.notify("$/cancel", {"id": number})
            if len(self._pending) > 1000:
                self.abort("too many requests were never answered")

    async def writable(self, timeout: float) -> None:
        """Wait until the plugin has read enough to be sent more; cut it off if that takes ``timeout`` seconds."""
        if self.is_writable:
            return
        try:
            async with asyncio.timeout(timeout):
                await self._writable.wait()
        except TimeoutError:
            self.abort("it does not read what it is sent")

    def pause_writing(self) -> None:
        super().pause_writing()
        self.is_writable = False
        self._writable.clear()

    def resume_writing(self) -> None:
        super().resume_writing()
        self._set_writable()

    def _set_writable(self) -> None:
        self.is_writable = True
        self._writable.set()

    def notify(self, method: str, params: Mapping[str, Any]) -> None:
        """Send a notification, which is never answered."""
        self.send(line({"jsonrpc": "2.0", "method": method, "params": params}))

    def hello(
        self, *, plugin: Mapping[str, str], hooks: Iterable[str], limits: Mapping[str, Any]
    ) -> tuple[str, asyncio.Future[Read]]:  # fmt: skip
        """Offer the protocols; returns the number of the request, and its reply, for ``greeting``."""
        offer = {
            "protocol": list(PROTOCOLS),
            "host": {"name": "isolator", "version": __version__},
            "plugin": dict(plugin),
            "hooks": list(hooks),
            "limits": dict(limits),
        }
        number, reply = random_hex(), self._loop.create_future()
        self.write(number, _request("host.hello", offer, number), HELLO_TIMEOUT, reply)
        self.flush()
        return number, reply

    async def greeting(self, hooks: Iterable[str], reply: asyncio.Future[Read]) -> Greeting:
        """The plugin's answer to the offer of these hooks; raises NotSentError with the reason when it is none."""
        granted = list(hooks)
        try:
            message, _ = await reply
        except LostError as error:
            self.abort(f"no answer to host.hello: {error}")
            raise NotSentError(self.why) from None
        result = message.get("result")
        if not isinstance(result, dict):
            self.abort(f"the plugin refused host.hello: {self._error_text(message.get('error'))}")
            raise NotSentError(self.why)
        protocol = str(result.get("protocol", "")).partition(".")[0]
        if protocol not in PROTOCOLS:
            chosen = shown(str(result.get("protocol")), self._redact, 20)
            why = f"the plugin chose protocol {chosen!r}; offered: {', '.join(PROTOCOLS)}"
            data = {"supported": list(PROTOCOLS)}
            self.notify("host.refused", {"code": UNSUPPORTED_PROTOCOL, "message": why, "data": data})
            self.abort(why)
            raise NotSentError(why)
        handles = result.get("handles")
        capabilities = result.get("capabilities")
        named = {name for name, on in capabilities.items() if on} if isinstance(capabilities, dict) else capabilities
        self.agreed = Greeting(
            protocol,
            frozenset(granted if not isinstance(handles, list) else (h for h in granted if h in handles)),
            frozenset(str(c) for c in named) if isinstance(named, (list, set)) else frozenset(),
        )
        return self.agreed

    def _error_text(self, error: Any) -> str:
        if not isinstance(error, dict):
            return "no result"
        code, message = (shown(str(error.get(key)), self._redact, 200) for key in ("code", "message"))
        return f"{code}: {message}"

    def abort(self, why: str, code: int = -32600) -> None:
        """Send an error with the reason, record the breach, close."""
        if self.closed:
            return
        self.why = why
        self.send(line({"jsonrpc": "2.0", "id": None, "error": {"code": code, "message": why}}))
        self._breach(why)
        self._end()
        self.close()

    # Receiving

    def line_received(self, data: bytes) -> None:
        try:
            message = parse_object(data)
        except WireError as error:
            self.abort(str(error), error.code)
            return
        if "method" in message:
            self._request_received(message, data)
        elif "result" in message or "error" in message:
            self._reply_received(message, data)
        else:
            self.abort("a message is neither request nor reply")

    def too_long(self) -> None:
        self.abort(f"a message is longer than {self.limit} bytes", -31003)

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        self.why = self.why or "the plugin closed the connection"
        self._end()

    def _reply_received(self, message: dict[str, Any], data: bytes) -> None:
        number = message.get("id")
        if not isinstance(number, str) or number not in self._pending:
            self.abort("a reply has an id that no open request has")
            return
        one = self._pending.pop(number)
        if one is not None and not one[0].done():
            one[0].set_result((message, data))

    def _request_received(self, message: dict[str, Any], data: bytes) -> None:
        if len(self._calls) >= CALLS_IN_FLIGHT:
            self.hold("calls in flight")
        self._calls.begin(data, self._serve(message))

    def _answered(self) -> None:
        if len(self._calls) < CALLS_IN_FLIGHT:
            self.unhold("calls in flight")

    async def _serve(self, message: dict[str, Any]) -> None:
        answer = await self._call(str(message["method"]), message.get("params"))
        if message.get("id") is not None:
            self.send(line({"jsonrpc": "2.0", "id": message["id"], **answer}))

    # One host in the place of another

    @property
    def busy(self) -> bool:
        """Whether a call of the plugin's is unanswered that does not wait for others."""
        return self._calls.busy

    def pass_on_all(self, departure: Departure) -> StreamState:
        """Hand the connection on; a call of the plugin's that is still unanswered is read again."""
        deadlines = {number: one[1] if one is not None else 0.0 for number, one in self._pending.items()}
        self._set_timer()
        return StreamState(line=self.pass_on(departure, again=self._calls.break_off()), deadlines=deadlines)

    async def take_over_all(
        self, state: StreamState, awaited: Mapping[str, Reply], descriptors: Descriptors
    ) -> None:  # fmt: skip
        """Go on with the connection of another host; ``awaited``: the replies that somebody waits for, by number."""
        for number, deadline in state.deadlines.items():
            reply = awaited.get(number)
            if reply is not None:
                self._await(number, deadline, reply)
            else:  # its reply may still come, and is no breach then
                self._pending[number] = None
        await self.take_over(state.line, descriptors)
        self.begin()

    def _end(self) -> None:
        self.closed = True
        self._set_writable()
        pending, self._pending = self._pending, {}
        self._set_timer()
        for one in pending.values():
            if one is not None and not one[0].done():
                one[0].set_exception(LostError(self.why or "connection lost", crash=True))
        self._calls.cancel()


def _request(method: str, params: Mapping[str, Any], number: str) -> bytes:
    return line({"jsonrpc": "2.0", "method": method, "params": params, "id": number})


def event_request(hook: str, params: str, number: str) -> bytes:
    """The line of an event; ``params`` is JSON, as ``event_params`` builds it."""
    return f'{{"jsonrpc":"2.0","method":"{hook}","params":{params},"id":"{number}"}}\n'.encode()


async def open_stream(sock: socket.socket, made: Callable[[], StreamConnection]) -> StreamConnection:
    """Open a stream on a connected socket, which the connection then owns."""
    _, connection = await asyncio.get_running_loop().create_unix_connection(made, sock=sock)
    return connection
