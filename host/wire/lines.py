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
from collections.abc import Callable

from isolator.ipc.accept_loop import AcceptLoop
from isolator.pacing import TokenBucket

LINGER = 2.0
"""Seconds that a peer has to read the rest before a closed connection is cut."""


LONG_LINE = 4096
"""Bytes from which on the time that a line takes is counted: of shorter ones the budget of bytes is enough."""
_BLANK = re.compile(rb"\n+")


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
    """Seconds of the processor that long lines may take; several connections may share one."""

    def __init__(self) -> None:
        self.transport: asyncio.Transport | None = None
        self._loop = asyncio.get_running_loop()
        self._buffer = bytearray()
        self._searched = 0
        """Offset in the buffer before which there is no newline."""
        self._held: set[str] = set()
        self._scheduled = False

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

    def connection_lost(self, exc: Exception | None) -> None:
        self.transport = None
        self._buffer.clear()
        self._searched = 0

    def data_received(self, data: bytes) -> None:
        if self.budget is not None and (wait := self.budget.take(len(data))):
            self.hold("budget")
            self._loop.call_later(wait, self.unhold, "budget")
        if not self._buffer and not self._held and data.find(b"\n") == len(data) - 1 <= self.limit:
            if len(data) > 1:  # as nearly every message is: one complete line
                self._receive(data[:-1])
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
        if self.transport is not None and not self.transport.is_closing():
            self.transport.write(data)

    def close(self) -> None:
        """Close once all that was written has been sent, or after ``LINGER`` seconds."""
        if self.transport is not None:
            if self.transport.get_write_buffer_size():
                self._loop.call_later(LINGER, self.transport.abort)
            self.transport.close()

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
            self._receive(data)
        else:
            if self.transport is not None:
                self.transport.pause_reading()
                self._schedule()
        if start and self._buffer:
            del self._buffer[:start]
            self._searched -= start
        return None

    def _receive(self, data: bytes) -> None:
        if self.cpu is None or len(data) < LONG_LINE:
            self.line_received(data)
            return
        began = time.thread_time()
        self.line_received(data)
        if wait := self.cpu.take(time.thread_time() - began):
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
