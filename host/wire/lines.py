"""Newline-framed messages on a stream, read so that no peer can make the others wait.

A peer that sends no newline costs at most ``limit`` bytes and one read. A peer that floods gets so many lines a turn of
the event loop (``per_turn``), so many bytes a second (``budget``) and so much time of the processor (``cpu``); the rest
stays in the kernel, where it is the sender that waits. Blank lines are skipped in one step. A peer that does not read
its answers is not read either. A peer that breaks a rule gets one error and is cut off.
"""

from __future__ import annotations

import asyncio
import re
import socket
import time
from collections import deque
from collections.abc import Callable, Iterable

from isolator.base.pacing import TokenBucket
from isolator.ipc.accept_loop import AcceptLoop
from isolator.ipc.body import Body
from isolator.ipc.succession import Departure, Descriptors, to_bytes, to_text

LINGER = 2.0
"""Seconds that a peer has to read the rest before a closed connection is cut."""


LONG_LINE = 4096
"""Bytes from which on the time that a line takes is counted: of shorter ones the budget of bytes is enough."""
MOMENT = 0.001
"""Seconds of the processor that a long line may take without being counted: nobody notices so short a wait."""
CPU_A_SECOND, CPU_AT_ONCE = 0.01, 0.2
"""Seconds of the processor for one plugin's lines that take longer. A line is read in one go, for which all
others wait: of a hundred calls of theirs one may meet such a line, not more."""
_BLANK = re.compile(rb"\n+")


class LineState(Body):
    """A connection on its way to another process."""

    socket: int
    unread: str
    """bytes that were received and not handled"""
    unsent: str


class LineProtocol(asyncio.Protocol):
    """Reads lines; subclasses implement ``line_received``."""

    limit = 1 << 20
    """Longest line in bytes."""
    write_high = 1 << 20
    """Unsent answers beyond this pause reading."""
    per_turn = 16
    budget: TokenBucket | None = None
    """Bytes that may be received; several connections may share one."""
    cpu: TokenBucket | None = None
    """Seconds of the processor for lines that take more than a ``MOMENT``; several connections may share one."""

    def __init__(self) -> None:
        self.transport: asyncio.Transport | None = None
        self._loop = asyncio.get_running_loop()
        self._buffer = bytearray()
        self._searched = 0
        """Offset in the buffer before which there is no newline."""
        self._held: set[str] = set()
        self._scheduled = False
        self._unsent = b""
        """Bytes to write first: those of the process whose connection this was."""
        self._gathered: list[bytes] = []
        """Messages of this turn, to be written together."""

    def line_received(self, data: bytes) -> None:
        """Handle a complete line, without its newline."""
        raise NotImplementedError

    def too_long(self) -> None:
        """Handle a line that exceeds ``limit``; the connection is closed afterwards."""

    @property
    def unread(self) -> bool:
        """Whether complete lines wait for their turn."""
        return self._buffer.find(b"\n", self._searched) >= 0

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self.transport = transport
        transport.set_write_buffer_limits(high=self.write_high)
        if self._unsent:
            transport.write(self._unsent)
            self._unsent = b""
        if self._held:
            transport.pause_reading()
        elif self._buffer:
            self._schedule()

    def eof_received(self) -> bool:
        """Have nothing be lost that was said in this turn: the connection is closed, unless this returns True."""
        self.flush()
        return False

    @property
    def is_open(self) -> bool:
        """Whether the connection may be read and written."""
        return self.transport is not None and not self.transport.is_closing()

    def pass_on(self, departure: Departure, *, again: Iterable[bytes] = ()) -> LineState:
        """Hand an open connection to the successor of this process, and let go of it; ``again``: lines to read again.

        Nothing is read or written here any more, and ``connection_lost`` is not called.
        """
        transport = self.transport
        assert transport is not None
        self.flush()
        unread = b"".join(line + b"\n" for line in again) + self._buffer
        number = departure.copy(transport.get_extra_info("socket").fileno())
        state = LineState(socket=number, unread=to_text(unread), unsent=to_text(_unsent(transport)))
        self.transport = None
        self._buffer.clear()
        # Off the loop for good, though the connection stays open by its copy: only this process's descriptor is closed.
        transport.set_protocol(asyncio.Protocol())
        transport.abort()
        return state

    async def take_over(self, state: LineState, descriptors: Descriptors) -> None:
        """Go on with the connection of another process; raises UsageError, OSError.

        Nothing is read before ``begin``.
        """
        self.hold("taken over")
        sock = socket.socket(fileno=descriptors.take(state.socket))
        try:
            self._buffer += to_bytes(state.unread)
            self._unsent = to_bytes(state.unsent)
            sock.setblocking(False)
            await self._loop.connect_accepted_socket(lambda: self, sock)
        except BaseException:
            sock.close()
            raise

    def begin(self) -> None:
        """Read the connection that was taken over."""
        self.unhold("taken over")

    def connection_lost(self, exc: Exception | None) -> None:
        self.transport = None
        self._buffer.clear()
        self._searched = 0

    def data_received(self, data: bytes) -> None:
        if self.budget is not None and (wait := self.budget.take(len(data))):
            self.hold("budget")
            self._loop.call_later(wait, self.unhold, "budget")
        if not self._buffer and not self._held and data.find(b"\n") == len(data) - 1 <= self.limit:
            if len(data) > LONG_LINE:
                self._receive_long(data[:-1])
            elif len(data) > 1:  # as nearly every message is: one complete line
                self.line_received(data[:-1])
            return
        self._buffer += data
        self._read_lines()

    def pause_writing(self) -> None:
        self.hold("unread answers")

    def resume_writing(self) -> None:
        self.unhold("unread answers")

    def hold(self, why: str) -> None:
        """Read no further line while a reason stands; ``unhold`` ends one."""
        self._held.add(why)
        if self.transport is not None:
            self.transport.pause_reading()

    def unhold(self, why: str) -> None:
        """Drop a reason; reading goes on when it was the last."""
        if why in self._held:
            self._held.discard(why)
            if not self._held:
                self._schedule()

    def send(self, data: bytes) -> None:
        """Write bytes if the connection is open."""
        if self._gathered:
            self.flush()
        if self.transport is not None and not self.transport.is_closing():
            self.transport.write(data)

    def send_soon(self, data: bytes) -> None:
        """As ``send``, in the loop's next turn and together with all else that comes in this one.

        Of many short messages the kernel and the peer have one then: each costs more to hand over than to make.
        """
        if not self._gathered:
            self._loop.call_soon(self.flush)
        self._gathered.append(data)

    def flush(self) -> None:
        """Write what was gathered."""
        if not self._gathered:
            return
        gathered, self._gathered = self._gathered, []
        if self.transport is not None and not self.transport.is_closing():
            self.transport.write(gathered[0] if len(gathered) == 1 else b"".join(gathered))

    def close(self) -> None:
        """Close once all that was written has been sent, or after ``LINGER`` seconds."""
        self.flush()
        if self.transport is not None:
            if self.transport.get_write_buffer_size():
                self._loop.call_later(LINGER, self.cut)
            self.transport.close()

    def cut(self) -> None:
        """Close at once, if it is not closed by now; what was not sent is dropped."""
        if self.transport is not None:
            self.transport.abort()

    def _read_lines(self) -> None:
        start = 0
        for _ in range(self.per_turn):
            if self._held or self.transport is None or self.transport.is_closing():
                break
            end = self._buffer.find(b"\n", self._searched)
            if end < 0:
                self._searched = len(self._buffer)
                if len(self._buffer) - start > self.limit:
                    return self._overflow()
                self.transport.resume_reading()
                break
            if end - start > self.limit:
                return self._overflow()
            if end == start and (blank := _BLANK.match(self._buffer, start)):
                start = self._searched = blank.end()
                continue
            data = bytes(self._buffer[start:end])
            start = self._searched = end + 1
            if len(data) < LONG_LINE:
                self.line_received(data)
            else:
                self._receive_long(data)
        else:
            if self.transport is not None:
                self.transport.pause_reading()
                self._schedule()
        if start and self._buffer:
            del self._buffer[:start]
            self._searched -= start
        return None

    def _receive_long(self, data: bytes) -> None:
        if self.cpu is None:
            self.line_received(data)
            return
        began = time.thread_time()
        self.line_received(data)
        spent = time.thread_time() - began
        if spent > MOMENT and (wait := self.cpu.take(spent)):
            self.hold("cpu")
            self._loop.call_later(wait, self.unhold, "cpu")

    def _schedule(self) -> None:
        if not self._scheduled:
            self._scheduled = True
            self._loop.call_soon(self._next_turn)

    def _next_turn(self) -> None:
        self._scheduled = False
        self._read_lines()

    def _overflow(self) -> None:
        self._buffer.clear()
        self._searched = 0
        self.too_long()
        self.close()


def _unsent(transport: asyncio.Transport) -> bytes:
    """Bytes that a transport has not sent yet, for which asyncio has no interface."""
    buffer: bytearray | deque[bytes] = transport._buffer  # type: ignore[attr-defined]
    unsent = bytes(buffer) if isinstance(buffer, bytearray) else b"".join(buffer)
    assert len(unsent) == transport.get_write_buffer_size()
    return unsent


class Acceptor(AcceptLoop):
    """Accepts connections, each with a protocol of its own, within ``budget`` a second; ``refuse`` as in AcceptLoop.

    One that ``admit`` does not admit is closed at once.
    """

    def __init__(
        self,
        listener: socket.socket,
        made: Callable[[], LineProtocol],
        budget: TokenBucket | None = None,
        refuse: Callable[[socket.socket], object] | None = None,
        admit: Callable[[socket.socket], bool] = lambda _: True,
    ) -> None:
        self._made, self._admit = made, admit
        self._tasks: set[asyncio.Task[object]] = set()
        super().__init__(listener, self._connect, budget=budget, refuse=refuse)

    def _connect(self, connection: socket.socket, _: object) -> None:
        if not self._admit(connection):
            connection.close()
            return
        task = self._loop.create_task(self._loop.connect_accepted_socket(self._made, connection))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def accepted_all(self) -> None:
        """Return once each connection that was accepted has its protocol."""
        await asyncio.gather(*self._tasks, return_exceptions=True)
