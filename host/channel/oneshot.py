"""One-shot delivery: one connection, one write, one line or end of file back.

The rules come from what fifty-line scripts really do (see docs/host-api.md): they receive once, so the request is one
``send``; they die of a connection that closes without a request, so a connection is only made when a request is ready
to go; they serve one connection at a time. Nothing the peer sends is kept beyond 64 KiB, and nothing it does not
send is waited for beyond the deadline.
"""

from __future__ import annotations

import asyncio
import socket
import time

from host.channel.reply import ONESHOT_REPLY, LostError


class Exchange:
    """One request on a fresh non-blocking connection and its reply, without a task or a stream object: the hot path.

    ``reply`` gets the reply's line, or LostError. Whoever made it calls ``close`` when done, before closing the socket.
    """

    def __init__(self, sock: socket.socket, request: bytes, timeout: float) -> None:
        self._loop = asyncio.get_running_loop()
        self.reply: asyncio.Future[bytes] = self._loop.create_future()
        self.sent_ns = 0
        """When the request was sent, by ``time.perf_counter_ns``."""
        self._sock, self._request, self._timeout = sock, request, timeout
        self._timer: asyncio.TimerHandle | None = None
        self._chunks: list[bytes] = []
        self._size = 0

    def send(self) -> None:
        """Send the request and listen for the reply for at most ``timeout`` seconds; what goes wrong is the reply's."""
        if self.reply.done():
            return
        self.sent_ns = time.perf_counter_ns()
        try:
            # One write. A short one counts as sent: the plugin has read what came, and a second piece would be
            # another message to it.
            self._sock.send(self._request)
        except OSError as error:
            self._fail(f"the plugin closed the connection at once: {error.strerror}", crash=True)
            return
        # By number: asyncio formats the socket into an exception that it then drops, which costs two system calls.
        self._loop.add_reader(self._sock.fileno(), self._readable)
        self._timer = self._loop.call_later(self._timeout, self._fail, "no reply in time")

    def close(self) -> None:
        """Listen no more, and send nothing that was not sent yet."""
        self.reply.cancel()
        if self._timer is not None:
            self._timer.cancel()
            self._loop.remove_reader(self._sock.fileno())

    def _readable(self) -> None:
        if self.reply.done():
            return
        try:
            chunk = self._sock.recv(65536)
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
            self._fail(f"reply longer than {ONESHOT_REPLY} bytes")
        elif end >= 0:
            self.reply.set_result(b"".join((*self._chunks, chunk)))
        elif chunk:
            self._chunks.append(chunk)
        elif self._size:
            self.reply.set_result(b"".join(self._chunks))
        else:
            self._fail("connection closed without a reply", crash=True)

    def _fail(self, why: str, *, crash: bool = False) -> None:
        if not self.reply.done():
            self.reply.set_exception(LostError(why, crash=crash))


async def exchange(sock: socket.socket, request: bytes, timeout: float) -> bytes:
    """Send one request and return the reply's line, in at most ``timeout`` seconds; raises LostError."""
    one = Exchange(sock, request, timeout)
    one.send()
    try:
        return await one.reply
    finally:
        one.close()
