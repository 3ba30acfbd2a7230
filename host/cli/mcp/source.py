"""Lines of a client at standard input, which may be a pipe, a socket, a terminal or a file."""

from __future__ import annotations

import asyncio
import os

from host.wire import mcp as protocol

_CHUNK = 1 << 16


class Source:
    """Lines of the descriptor ``fd``. It is read only while a line is awaited; its flags, which others share, stay."""

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self._loop = asyncio.get_running_loop()
        self._buffer = bytearray()
        self._skipping = False
        """The rest of a line that is too long is passed over."""
        self._ended = False
        self._ready = asyncio.Event()
        try:
            self._loop.add_reader(fd, self._ready.set)
            self._watched = True
            self._loop.remove_reader(fd)
        except PermissionError:  # a file, which can always be read
            self._watched = False

    async def line(self) -> bytes:
        """The next line that is not blank, or as much of one that is too long as shows it; empty at the end."""
        while True:
            while not self._ended and b"\n" not in self._buffer and len(self._buffer) <= protocol.MAX_LINE:
                await self._read()
            end = self._buffer.find(b"\n", 0, protocol.MAX_LINE + 1)
            if end < 0 and not self._buffer:
                return b""
            line = bytes(self._buffer[: end if end >= 0 else protocol.MAX_LINE + 1])
            del self._buffer[: len(line) + (end >= 0)]
            skipped, self._skipping = self._skipping, end < 0
            if not skipped and line.strip():
                return line

    async def _read(self) -> None:
        if self._watched:
            self._ready.clear()
            self._loop.add_reader(self._fd, self._ready.set)
            try:
                await self._ready.wait()
            finally:
                self._loop.remove_reader(self._fd)
        try:
            data = os.read(self._fd, _CHUNK)
        except BlockingIOError:  # another has read it, or set it non-blocking
            return
        except OSError:
            data = b""
        self._buffer += data
        self._ended = not data
