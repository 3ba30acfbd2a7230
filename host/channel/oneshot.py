"""One-shot channel: one connection, one write, one line or end of file back.

The rules come from the habits of fifty-line scripts (see docs/host-api.md): they receive once, so the request is one
``send``; they die of a connection that closes without a request, so a connection is only made when a request is ready
to go; they serve one connection at a time. Of a reply at most 64 KiB are kept, and none is awaited beyond the deadline.
"""

from __future__ import annotations

import asyncio
import socket
import time
from typing import Self

from host.channel.reply import ONESHOT_REPLY, LostError
from isolator.ipc.body import Body
from isolator.ipc.succession import Departure, to_bytes, to_text


class ExchangeState(Body):
    """An unanswered request on its way to another host."""

    socket: int
    received: str
    """of its reply"""
    sent_ns: int
    deadline: float


class Exchange:
    """A request on a fresh non-blocking connection and its reply, without a task or a stream object: the hot path.

    ``reply`` gets the reply's line, or LostError. The caller calls ``send``, and ``listen`` in the same turn of the
    event loop; it ends the exchange with ``close``, before it closes the socket.
    """

    def __init__(self, sock: socket.socket, request: bytes, timeout: float) -> None:
        self._loop = asyncio.get_running_loop()
        self.reply: asyncio.Future[bytes] = self._loop.create_future()
        self.sent_ns = 0
        """CLOCK_MONOTONIC in ns when the request was sent."""
        self.unused = False
        """The request was given up, and nothing was written to the connection."""
        self.sock, self._request, self._timeout = sock, request, timeout
        self._deadline = 0.0
        self._timer: asyncio.TimerHandle | None = None
        self._chunks: list[bytes] = []
        self._size = 0

    def send(self) -> None:
        """Send the request; an error is set on ``reply``."""
        if self.reply.done():
            return
        self.sent_ns = time.monotonic_ns()
        try:
            # One write. A short one counts as sent: the plugin has read that much, and a second piece would be another
            # message to it.
            self.sock.send(self._request)
        except OSError as error:
            self._fail(f"the plugin closed the connection at once: {error.strerror}", crash=True)

    def listen(self) -> None:
        """Await the reply to the request that was sent, for at most ``timeout`` seconds."""
        if not self.reply.done():
            self._listen(self._loop.time() + self._timeout)

    def _listen(self, deadline: float) -> None:
        self._deadline = deadline
        # By number: asyncio formats the socket into an exception that it then drops, which costs two system calls.
        self._loop.add_reader(self.sock.fileno(), self._readable)
        self._timer = self._loop.call_at(deadline, self._fail, "no reply in time")

    @property
    def unanswered(self) -> bool:
        """Whether the request was sent, and its reply is still to come."""
        return self._timer is not None and not self.reply.done()

    def pass_on(self, departure: Departure) -> ExchangeState:
        """Hand an unanswered request to the successor of this process; it is to be closed here, all the same."""
        if self._timer is not None:
            self._timer.cancel()
        self._loop.remove_reader(self.sock.fileno())
        return ExchangeState(
            socket=departure.copy(self.sock.fileno()),
            received=to_text(b"".join(self._chunks)),
            sent_ns=self.sent_ns,
            deadline=self._deadline,
        )

    @classmethod
    def taken_over(cls, sock: socket.socket, state: ExchangeState) -> Self:
        """The request of another process, whose reply is awaited on this socket; deadlines are of the same clock."""
        exchange = cls(sock, b"", 0.0)
        received = to_bytes(state.received)
        exchange._chunks, exchange._size = [received] if received else [], len(received)
        exchange.sent_ns = state.sent_ns
        exchange._listen(state.deadline)
        return exchange

    def give_up(self, why: str) -> None:
        """End a request that was not sent, for that reason."""
        self.sent_ns = time.monotonic_ns()
        self.unused = True
        self._fail(why)

    def close(self) -> None:
        """Await the reply no more; a request that was not sent yet never is."""
        self.reply.cancel()
        if self._timer is not None:
            self._timer.cancel()
            self._loop.remove_reader(self.sock.fileno())

    def _readable(self) -> None:
        if self.reply.done():
            return
        try:
            chunk = self.sock.recv(65536)
        except (BlockingIOError, InterruptedError):
            return
        except OSError as error:
            self._fail(f"connection broken: {error.strerror}", crash=True)
            return
        end = chunk.find(b"\n")
        if end >= 0:
            chunk = chunk[:end]
        self._size += len(chunk)
        if self._size > ONESHOT_REPLY:
            self._fail(f"reply longer than {ONESHOT_REPLY} bytes", answered=True)
        elif end >= 0:
            self.reply.set_result(b"".join((*self._chunks, chunk)))
        elif chunk:
            self._chunks.append(chunk)
        elif self._size:
            self.reply.set_result(b"".join(self._chunks))
        else:
            self._fail("connection closed without a reply", crash=True)

    def _fail(self, why: str, *, crash: bool = False, answered: bool = False) -> None:
        if not self.reply.done():
            self.reply.set_exception(LostError(why, crash=crash, answered=answered))
