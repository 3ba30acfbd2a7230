# SPDX-FileCopyrightText: Isolator contributors
# SPDX-License-Identifier: Apache-2.0
"""One asynchronous connection: connecting in turn, calls that overlap, and the end that fails all of them.

Whoever opens a link reads its notifications with ``notifications``; answers are handed to their calls on the way. When
the connection ends, or the daemon says that it could not read a line, every open call fails: none is left waiting.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import AsyncGenerator, Mapping
from typing import Any

from isolator_client import address
from isolator_client.errors import IsolatorError, UnavailableError, make
from isolator_client.protocol import Lines, Message, Notification, Reply, pauses, request

CONNECT_PATIENCE = 30.0
"""Seconds to wait for a place in the daemon's backlog."""

FLUSH_PATIENCE = 1.0
"""Seconds that the daemon gets to take what was written, once the link is closed."""

CHUNK = 1 << 16


class Link:
    """A connection that ``connect`` made."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader = reader
        self._writer = writer
        self._numbers = 0
        self._open: dict[int, asyncio.Future[dict[str, Any]]] = {}
        self.over = False
        self.reason: IsolatorError | None = None
        """Why the connection ended, if the daemon said so."""
        self.proven = False
        """Whether the daemon has answered anything on this connection."""

    def number(self) -> int:
        """Take a number for a request."""
        self._numbers += 1
        return self._numbers

    async def ask(self, method: str, params: Mapping[str, Any]) -> dict[str, Any]:
        """Send a request and wait for its answer; needs somebody to read ``notifications`` meanwhile.

        Raises UsageError for what cannot be sent, the error that the daemon answers, and UnavailableError when the
        connection ends before.
        """
        number = self.number()
        return await self.exchange(number, request(number, method, params))

    async def exchange(self, number: int, line: bytes) -> dict[str, Any]:
        """Send the request ``number``, written already, and wait for its answer, as ``ask`` does."""
        if self.over:
            raise self.reason or lost()
        answer: asyncio.Future[dict[str, Any]] = asyncio.get_running_loop().create_future()
        self._open[number] = answer
        try:
            await self.send(line)
            return await answer
        finally:
            del self._open[number]
            if answer.done() and not answer.cancelled():
                answer.exception()  # taken note of, also when the caller was cancelled before it could

    async def send(self, line: bytes) -> None:
        """Write a line, and wait while too much is unsent. The reader, not this, notices that the daemon is gone."""
        self._writer.write(line)
        with contextlib.suppress(ConnectionError):
            await self._writer.drain()

    async def messages(self) -> AsyncGenerator[Message, None]:
        """Yield every message, until the connection ends. Raises IsolatorError for what is no message."""
        lines = Lines()
        while data := await self._read():
            for message in lines.feed(data):
                yield message

    async def notifications(self) -> AsyncGenerator[Notification, None]:
        """Yield what the daemon sends by itself, until the connection ends, and hand answers to the calls."""
        try:
            async with contextlib.aclosing(self.messages()) as arriving:
                async for message in arriving:
                    if isinstance(message, Notification):
                        yield message
                    elif message.number is None and message.error is not None:
                        self._end(message.error)
                        return
                    else:
                        self._settle(message)
        except IsolatorError as error:
            self._end(error)
        finally:
            self._end(None)

    async def close(self) -> None:
        """Close the connection; open calls fail."""
        self._end(None)
        self._writer.close()
        try:
            async with asyncio.timeout(FLUSH_PATIENCE):
                await self._writer.wait_closed()
        except (OSError, TimeoutError):
            self._writer.transport.abort()

    async def _read(self) -> bytes:
        try:
            return await self._reader.read(CHUNK)
        except OSError:
            return b""

    def _settle(self, reply: Reply) -> None:
        self.proven = True
        answer = self._open.get(reply.number) if reply.number is not None else None
        if answer is None or answer.done():
            return  # of a call that was given up
        if reply.error is not None:
            answer.set_exception(reply.error)
        else:
            answer.set_result(reply.result)

    def _end(self, reason: IsolatorError | None) -> None:
        """Fail every open call; the first reason counts."""
        self.over = True
        self.reason = self.reason or reason
        reason = self.reason or lost()
        waiting = [answer for answer in self._open.values() if not answer.done()]
        # The daemon could not read one line of several: nobody can say which, so none of them is to blame.
        kind = "unavailable" if len(waiting) > 1 else reason.code
        for answer in waiting:
            answer.set_exception(make(kind, *reason.args))


async def connect(path: str, *, patience: float = CONNECT_PATIENCE) -> Link:
    """Connect to the socket ``path``, waiting at most ``patience`` seconds for a place in its backlog.

    Raises UnavailableError when no daemon runs there or all its places are taken, DeniedError when this user cannot
    reach the socket.
    """
    # A socket of our own: asyncio takes EAGAIN, a full backlog, for a connection that is on its way.
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC | socket.SOCK_NONBLOCK)
    try:
        await _connect_in_turn(sock, path, asyncio.get_running_loop().time() + patience)
        reader, writer = await asyncio.open_unix_connection(sock=sock)
        # asyncio asks for 256 KiB at a time, for which the C library maps memory and gives it back: 35 us for a line.
        writer.transport.max_size = CHUNK  # type: ignore[attr-defined]
        return Link(reader, writer)
    except BaseException:
        sock.close()
        raise


async def _connect_in_turn(sock: socket.socket, path: str, end: float) -> None:
    for pause in pauses(0.001, 0.05):  # nothing tells when a place becomes free
        try:
            with address.short_name(path) as name:
                return sock.connect(name)
        except BlockingIOError as error:
            if asyncio.get_running_loop().time() > end:
                raise address.refusal(error, path) from None
        except OSError as error:
            raise address.refusal(error, path) from None
        await asyncio.sleep(pause)


def lost() -> UnavailableError:
    """Make the error of a call whose connection ended."""
    return UnavailableError("the daemon", "ended the connection before it answered", "repeat the call")
