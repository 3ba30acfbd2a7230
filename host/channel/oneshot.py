"""One-shot delivery: one connection, one write, one line or end of file back.

The rules come from what fifty-line scripts really do (see docs/host-api.md): they receive once, so the request is one
``send``; they die of a connection that closes without a request, so a connection is only made when a request is ready
to go; they serve one connection at a time. Nothing the peer sends is kept beyond 64 KiB, and nothing it does not
send is waited for beyond the deadline.
"""

from __future__ import annotations

import asyncio
import socket

from host.channel import ONESHOT_REPLY, LostError


class _Exchange:
    """Collects the reply without a task or a stream object: this is the hot path."""

    __slots__ = ("_chunks", "_future", "_size", "_sock")

    def __init__(self, sock: socket.socket, future: asyncio.Future[bytes]) -> None:
        self._sock = sock
        self._future = future
        self._chunks: list[bytes] = []
        self._size = 0

    def readable(self) -> None:
        if self._future.done():
            return
        try:
            chunk = self._sock.recv(65536)
        except (BlockingIOError, InterruptedError):
            return
        except OSError as error:
            self._future.set_exception(LostError(f"connection broken: {error.strerror}", crash=True))
            return
        end = chunk.find(b"\n")
        if end >= 0:
            chunk = chunk[:end]
        self._size += len(chunk)
        if self._size > ONESHOT_REPLY:
            self._future.set_exception(LostError(f"reply longer than {ONESHOT_REPLY} bytes"))
        elif end >= 0:
            self._future.set_result(b"".join((*self._chunks, chunk)))
        elif chunk:
            self._chunks.append(chunk)
        elif self._size:
            self._future.set_result(b"".join(self._chunks))
        else:
            self._future.set_exception(LostError("connection closed without a reply", crash=True))

    def expired(self) -> None:
        if not self._future.done():
            self._future.set_exception(LostError("no reply in time"))


async def exchange(sock: socket.socket, request: bytes, timeout: float) -> bytes:
    """Send one request on a fresh non-blocking connection and return the reply's line.

    ``timeout`` in seconds. Raises LostError; the caller closes the socket.
    """
    loop = asyncio.get_running_loop()
    try:
        # One write. A short one counts as sent: the plugin has read what came, and a second piece would be another
        # message to it.
        sock.send(request)
    except OSError as error:
        raise LostError(f"the plugin closed the connection at once: {error.strerror}", crash=True) from None
    future: asyncio.Future[bytes] = loop.create_future()
    reader = _Exchange(sock, future)
    # By number: asyncio formats the socket into an exception that it then drops, which costs two system calls.
    fd = sock.fileno()
    loop.add_reader(fd, reader.readable)
    timer = loop.call_later(timeout, reader.expired)
    try:
        return await future
    finally:
        timer.cancel()
        loop.remove_reader(fd)
