"""Newline-framed messages on a stream, read so that no peer can make the others wait.

A peer that sends no newline costs at most ``limit`` bytes and what one read brings. A peer that floods gets so many
lines a turn of the event loop (``per_turn``) and so many bytes a second (``budget``); what is beyond stays in the
kernel, where it is the sender that waits. A peer that does not read its answers is not read either. A peer that breaks
a rule is told once and cut off.
"""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable

from isolator.ipc.accept_loop import AcceptLoop
from isolator.pacing import TokenBucket

LINGER = 2.0


Budget = TokenBucket


class LineProtocol(asyncio.Protocol):
    """Subclasses implement ``line_received``."""

    limit = 1 << 20
    """Longest line in bytes."""
    write_high = 1 << 20
    """Unsent answers beyond this pause reading."""
    per_turn = 16
    budget: Budget | None = None
    """Of bytes; may be shared by several connections."""

    def __init__(self) -> None:
        self.transport: asyncio.Transport | None = None
        self._loop = asyncio.get_running_loop()
        self._buffer = bytearray()
        self._looked = 0
        """There is no newline before this place of the buffer."""
        self._held: set[str] = set()
        self._scheduled = False

    def line_received(self, data: bytes) -> None:
        """One complete line without its newline."""
        raise NotImplementedError

    def too_long(self) -> None:
        """A line exceeded ``limit``; the connection is closed after this returns."""

    @property
    def unread(self) -> bool:
        """Whether whole lines have come whose turn is not yet."""
        return self._buffer.find(b"\n", self._looked) >= 0

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self.transport = transport
        transport.set_write_buffer_limits(high=self.write_high)

    def connection_lost(self, exc: Exception | None) -> None:
        self.transport = None
        self._buffer.clear()
        self._looked = 0

    def data_received(self, data: bytes) -> None:
        if self.budget is not None and (wait := self.budget.take(len(data))):
            self.hold("budget")
            self._loop.call_later(wait, self.unhold, "budget")
        if not self._buffer and not self._held and data.find(b"\n") == len(data) - 1 <= self.limit:
            if len(data) > 1:  # what nearly every message is: one line, whole
                self.line_received(data[:-1])
            return
        self._buffer += data
        self._go_on()

    def pause_writing(self) -> None:
        self.hold("unread answers")

    def resume_writing(self) -> None:
        self.unhold("unread answers")

    def hold(self, why: str) -> None:
        """Take nothing more until every reason is gone."""
        self._held.add(why)
        if self.transport is not None:
            self.transport.pause_reading()

    def unhold(self, why: str) -> None:
        """One reason is gone."""
        if why in self._held:
            self._held.discard(why)
            if not self._held:
                self._go_on_soon()

    def send(self, data: bytes) -> None:
        """Write bytes if the peer is still there."""
        if self.transport is not None and not self.transport.is_closing():
            self.transport.write(data)

    def close(self) -> None:
        """Close once what was written has been sent, which the peer has ``LINGER`` seconds to read."""
        if self.transport is not None:
            if self.transport.get_write_buffer_size():
                self._loop.call_later(LINGER, self.transport.abort)
            self.transport.close()

    def _go_on(self) -> None:
        start = 0
        for _ in range(self.per_turn):
            if self._held or self.transport is None or self.transport.is_closing():
                break
            end = self._buffer.find(b"\n", self._looked)
            if end < 0:
                self._looked = len(self._buffer)
                if len(self._buffer) - start > self.limit:
                    return self._overflow()
                self.transport.resume_reading()
                break
            if end - start > self.limit:
                return self._overflow()
            data = bytes(self._buffer[start:end])
            start = self._looked = end + 1
            if data:
                self.line_received(data)
        else:
            if self.transport is not None:
                self.transport.pause_reading()
                self._go_on_soon()
        if start and self._buffer:
            del self._buffer[:start]
            self._looked -= start
        return None

    def _go_on_soon(self) -> None:
        if not self._scheduled:
            self._scheduled = True
            self._loop.call_soon(self._next_turn)

    def _next_turn(self) -> None:
        self._scheduled = False
        self._go_on()

    def _overflow(self) -> None:
        self._buffer.clear()
        self._looked = 0
        self.too_long()
        self.close()


class Acceptor(AcceptLoop):
    """Accepts one plugin's connections, each with a protocol of its own, within ``budget`` a second."""

    def __init__(self, listener: socket.socket, made: Callable[[], LineProtocol], budget: TokenBucket) -> None:
        super().__init__(listener, self._connect, budget=budget)
        self._made = made
        self._tasks: set[asyncio.Task[object]] = set()

    def _connect(self, connection: socket.socket, _: object) -> None:
        task = self._loop.create_task(self._loop.connect_accepted_socket(self._made, connection))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
