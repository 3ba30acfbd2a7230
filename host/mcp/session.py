"""Session with one run of a server: its standard input and output, requests in flight, and all that a server may send.

Two sockets lead to the sidecar, one for each direction, so that neither end's flags reach the other. The supervisor
keeps both as well: a host that ends takes no server along. Ids of requests cannot be guessed, so an answer is to a
request of this host's or a *stray*: like lines that are no message, strays are dropped, and a server that sends
``STRAYS`` of them, or one line that is too long, is cut off. Requests of a server's own are refused one by one, and it
is not read while it does not read the refusals.
"""

from __future__ import annotations

import asyncio
import os
import socket
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from host.channel.reply import LostError, NotSentError
from host.fence.fences import NO_LEASE
from host.mcp.tools import MAX_TOOLS, Item, offered
from host.wire import mcp as protocol
from host.wire.lines import CPU_A_SECOND, CPU_AT_ONCE, LineProtocol, LineState
from host.wire.mcp import Answer, Era, Greeting
from host.wire.strict_json import WireError
from isolator.base.pacing import TokenBucket
from isolator.ipc.body import Body, omitted
from isolator.ipc.fence import Fence
from isolator.ipc.succession import Departure, Descriptors

STRAYS = 1000
BYTES_A_SECOND, BYTES_AT_ONCE = 4 << 20, 16 << 20
PROGRESS_A_SECOND, PROGRESS_AT_ONCE = 10.0, 20.0
"""Reports of progress of one request that are passed on; others are dropped."""
LATE = 256
PAGES = 64
"""Pages of one list of tools."""
MAX_LISTED = 1 << 20
"""Bytes of all pages together: they are kept, and hashed in one go."""

_LATE = "no answer in time"
Reply = asyncio.Future[tuple[Answer, bytes]]
Progress = Callable[[Mapping[str, Any]], object]


class SessionState(Body):
    """A session on its way to another host."""

    run: str
    input: LineState
    output: LineState
    version: str
    name: str
    instructions: str
    tools: bool
    deadlines: dict[str, float]
    """by id of each request without an answer, the loop time by which it is awaited"""
    hello: str = omitted(default="")
    """the id of the first request, which is not answered: there is no greeting yet"""


@dataclass(eq=False)
class _Pending:
    """A request that is not answered."""

    reply: Reply
    deadline: float
    timer: asyncio.TimerHandle
    progress: Progress | None
    pace: TokenBucket


class _Input(LineProtocol):
    """The way to the server; whatever comes back on it is nobody's."""

    write_high = protocol.MAX_LINE

    def __init__(self, session: Session) -> None:
        super().__init__()
        self._session = session
        self.hold("one way")

    def pause_writing(self) -> None:
        self._session.hold("it does not read")

    def resume_writing(self) -> None:
        self._session.unhold("it does not read")


class Session(LineProtocol):
    """Session with one run. ``ended`` is called once when it is over, with the server's breach or an empty text."""

    limit = protocol.MAX_LINE
    write_high = protocol.MAX_LINE

    def __init__(self, run: str, era: Era, ended: Callable[[Session, str], object], fence: Fence | None = None) -> None:
        super().__init__()
        self.run, self.era, self._fence = run, era, fence or Fence()
        self.greeting: Greeting | None = None
        self.hello = ""
        """The id of the first request, once it is sent."""
        self.opening: Reply = self._loop.create_future()
        """The answer to that."""
        self.why = ""
        """Why it is over."""
        self._tools: Mapping[str, Item] | None = None
        """The listed tools, by name; None: nobody has asked for them, or does at the moment."""
        self._tools_changed = False
        """The server has said that its tools are others now."""
        self.budget, self.cpu = TokenBucket(BYTES_A_SECOND, BYTES_AT_ONCE), TokenBucket(CPU_A_SECOND, CPU_AT_ONCE)
        self.draining = False
        """The run is to stop: nothing new is sent."""
        self._leaving = False
        self._ended = ended
        self._input = _Input(self)
        self._pending: dict[str, _Pending] = {}
        self._free = asyncio.Event()
        self._free.set()
        self._late: deque[str] = deque(maxlen=LATE)
        """Requests that nobody awaits any more, whose answers are no strays."""
        self._strays = 0
        self._over = False

    @property
    def open(self) -> bool:
        """Whether requests can be sent, the first one excepted."""
        return self.lasts and self.greeting is not None

    @property
    def lasts(self) -> bool:
        """Whether it is neither over nor about to be."""
        return not self._over and not self.draining

    @property
    def in_flight(self) -> int:
        """Number of requests whose answers are awaited."""
        return len(self._pending)

    async def connect(self, input_: socket.socket, output: socket.socket) -> None:
        """Take over both sockets."""
        loop = asyncio.get_running_loop()
        for sock, factory in ((input_, lambda: self._input), (output, lambda: self)):
            sock.setblocking(False)
            await loop.create_unix_connection(factory, sock=sock)

    async def greet(self, timeout: float) -> Greeting:
        """Open the session, unless another host has begun to; raises NotSentError with the reason when it fails."""
        if not self.hello:
            self.hello = self.new_id()
            self.write(self.hello, protocol.opening(self.era, self.hello), timeout, self.opening)
        try:
            self.greeting = protocol.greeting(self.era, (await self.opening)[0])
        except (LostError, ValueError) as error:
            first = "server/discover" if self.era == protocol.STATELESS else "initialize"
            late = f"no answer in {timeout:g} s; raise start_timeout in [restart] of its policy if it needs longer"
            self.breach(f"{first}: {late if str(error) == _LATE else error}")
            raise NotSentError(self.why) from None
        if self.era == protocol.SESSION:
            self._input.send(protocol.notification("notifications/initialized"))
        return self.greeting

    @staticmethod
    def new_id() -> str:
        """An id that nobody can guess."""
        return os.urandom(8).hex()

    @property
    def has_slot(self) -> bool:
        """Whether one more request may be in flight, or none ever again."""
        return self._over or len(self._pending) < protocol.IN_FLIGHT

    async def slot(self, timeout: float) -> None:
        """Wait until one more request may be in flight; raises NotSentError when none is free in time."""
        try:
            async with asyncio.timeout(timeout):
                while not self.has_slot:
                    self._free.clear()
                    await self._free.wait()
        except TimeoutError:
            raise NotSentError(f"{protocol.IN_FLIGHT} requests are unanswered") from None

    async def settled(self) -> None:
        """Return once nothing is unanswered."""
        while self._pending:
            self._free.clear()
            await self._free.wait()

    def write(self, number: str, data: bytes, timeout: float, reply: Reply, progress: Progress | None = None) -> None:
        """Send the line of a request at once; ``reply`` gets the answer, LostError, or NotSentError."""
        if reply.done():
            return
        if self._over or self.draining or not self._input.is_open:
            reply.set_exception(NotSentError(self.why or "the server is being stopped"))
            return
        if self._fence.closed:
            reply.set_exception(NotSentError(NO_LEASE))
            return
        self._input.send(data)
        self._await(number, self._loop.time() + timeout, reply, progress)

    async def ask(
        self, method: str, params: Mapping[str, Any], timeout: float, progress: Progress | None = None
    ) -> tuple[Answer, bytes]:
        """Send a request and await its answer and the line that it came in; a cancelled caller cancels it.

        Raises NotSentError, LostError.
        """
        await self.slot(timeout)
        number, reply = self.new_id(), self._loop.create_future()
        data = protocol.request(self.era, number, method, params, progress=progress is not None)
        self.write(number, data, timeout, reply, progress)
        answer: tuple[Answer, bytes] = await reply
        return answer

    async def tools(self, *, again: bool = False) -> Mapping[str, Item]:
        """The tools by name, asked for once, ``again``, and when the server says that they have changed.

        Raises NotSentError, LostError, ValueError.
        """
        if (known := self._tools) is not None and not again and not self._tools_changed:
            return known
        self._tools = None  # nobody goes by it while the answer is awaited
        found = self._tools = {item.name: item for item in await self.list_tools()}
        return found

    async def list_tools(self) -> tuple[Item, ...]:
        """Every tool, of all pages, and the instructions; raises NotSentError, LostError, ValueError."""
        assert self.greeting is not None
        self._tools_changed = False
        found: list[Any] = []
        cursor: str | None = None
        size = len(self.greeting.instructions)
        for _ in range(PAGES if self.greeting.tools else 0):
            asked = {"cursor": cursor} if cursor is not None else {}
            answer, data = await self.ask("tools/list", asked, protocol.PATIENCE)
            if answer.result is None:
                raise ValueError(f"tools/list: {protocol.describe_error(answer.error)}")
            page, cursor = answer.result.get("tools"), answer.result.get("nextCursor")
            if not isinstance(page, list) or not isinstance(cursor, str | None):
                raise ValueError("tools/list: no list of tools")
            found += page
            size += len(data)
            if size > MAX_LISTED:
                raise ValueError(f"tools/list: more than {MAX_LISTED} bytes of tools")
            if cursor is None:
                break
            if len(found) > MAX_TOOLS:
                raise ValueError(f"tools/list: more than {MAX_TOOLS} tools")
        else:
            if self.greeting.tools:
                raise ValueError(f"tools/list: more than {PAGES} pages")
        return offered(self.greeting.instructions, found)

    def breach(self, why: str) -> None:
        """End the session for a fault of the server's."""
        if not self._over:
            self._end(why, breach=True)

    def close(self) -> None:
        """End the session; the supervisor ends the server."""
        self._end("the session was closed")

    # Receiving

    def line_received(self, data: bytes) -> None:
        try:
            message = protocol.read(data)
        except WireError as error:
            self._stray(f"a line that is no message ({error})")
            return
        if isinstance(message, Answer):
            self._answered(message, data)
        elif message.id is not None:
            self._input.send(protocol.refuse(message) or b"")
        elif message.method == "notifications/tools/list_changed":
            self._tools_changed = True
        elif (found := protocol.progress_of(message)) is not None:
            one = self._pending.get(str(found[0].value)) if found[0].text else None
            if one is not None and one.progress is not None and not one.reply.done() and one.pace.try_take():
                one.progress(found[1])

    def too_long(self) -> None:
        self.breach(f"a line is longer than {self.limit} bytes")

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        self._end("the server has closed its output")

    def _answered(self, answer: Answer, data: bytes) -> None:
        number = str(answer.id.value) if answer.id is not None and answer.id.text else ""
        one = self._pending.pop(number, None)
        if one is not None:
            one.timer.cancel()
            if not one.reply.done():
                one.reply.set_result((answer, data))
        elif number in self._late:
            self._late.remove(number)
        else:
            self._stray("an answer to no request")

    def _stray(self, what: str) -> None:
        self._strays += 1
        if self._strays >= STRAYS:
            self.breach(f"{STRAYS} lines are nothing that was asked for, the last one {what}")

    def _await(self, number: str, deadline: float, reply: Reply, progress: Progress | None) -> None:
        timer = self._loop.call_at(deadline, _expire, reply)
        pace = TokenBucket(PROGRESS_A_SECOND, PROGRESS_AT_ONCE)
        self._pending[number] = _Pending(reply, deadline, timer, progress, pace)
        reply.add_done_callback(lambda _: self._reply_done(number))

    def _reply_done(self, number: str) -> None:
        if self._leaving and number in self._pending and self._pending[number].reply.cancelled():
            return  # the next host awaits it
        one = self._pending.pop(number, None)
        self._free.set()
        if one is None:  # answered, or all is over
            return
        one.timer.cancel()
        self._late.append(number)
        reason = "no longer awaited" if one.reply.cancelled() else "not answered in time"
        self._input.send(protocol.notification("notifications/cancelled", {"requestId": number, "reason": reason}))

    def _end(self, why: str, *, breach: bool = False) -> None:
        if self._over:
            return
        self._over, self.why = True, why
        self._free.set()
        pending, self._pending = self._pending, {}
        for one in pending.values():
            one.timer.cancel()
            if not one.reply.done():
                one.reply.set_exception(LostError(why, crash=True))
        self._input.close()
        super().close()
        self._ended(self, why if breach else "")

    # One host in the place of another

    def begin_to_leave(self) -> None:
        """Read nothing from now on; what is in flight stays so, whoever gives it up here."""
        self._leaving = True
        self.hold("leaving")

    def leave(self, departure: Departure) -> SessionState:
        """Hand on a session that is open or being opened, with what is in flight."""
        pending, self._pending, self._over = self._pending, {}, True
        for one in pending.values():
            one.timer.cancel()
        greeting = self.greeting or Greeting("", "", "", tools=False)
        return SessionState(
            run=self.run,
            input=self._input.pass_on(departure),
            output=self.pass_on(departure),
            version=greeting.version,
            name=greeting.name,
            instructions=greeting.instructions,
            tools=greeting.tools,
            deadlines={number: one.deadline for number, one in pending.items()},
            hello=self.hello if self.greeting is None else "",
        )

    async def go_on(self, state: SessionState, awaited: Mapping[str, Reply], descriptors: Descriptors) -> None:
        """Go on with the session of another host; ``awaited``: the answers that somebody waits for, by id."""
        self.hello = state.hello
        if not state.hello:
            self.greeting = Greeting(state.version, state.name, state.instructions, state.tools)
        for number, deadline in state.deadlines.items():
            reply = self.opening if number == state.hello else awaited.get(number)
            if reply is not None:
                self._await(number, deadline, reply, None)
            else:
                self._late.append(number)
        await self._input.take_over(state.input, descriptors)
        await self.take_over(state.output, descriptors)
        self.begin()


def _expire(reply: Reply) -> None:
    if not reply.done():
        reply.set_exception(LostError(_LATE))
