"""Terminal of a cage's own, of ``isolator run --tty``."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import fcntl
import os
import termios
import tty
from collections.abc import Callable
from functools import partial
from typing import TypeVar

from isolator.linux.readable import readable, resolve

T = TypeVar("T")

_STREAMS = (0, 1, 2)
_ATOMIC = 4096
"""A pipe or terminal that has room takes so many bytes without blocking (PIPE_BUF)."""
_END_OF_FILE = b"\x04\x04"
"""The first ends a line that has no end yet."""


class CageTerminal:
    """A terminal of a cage's own, joined to this process's standard input and output.

    Nothing of the caller's terminal is in the cage: no ioctl made there can type into it (TIOCSTI) or change it. Where
    standard input is a terminal it is made raw, so that keys like ^C act on the cage's; ``StreamsRestored`` around it.
    """

    def __init__(self, master: int, mount: int = -1, stream: int = -1) -> None:
        """Take over the ends of ``cage.terminal.new_terminal``; the caller's own, or of a daemon's making."""
        self.mount = mount
        """Detached; goes to /dev/pts of the cage."""
        self._master = master
        self.stream = stream
        """The cage's end: its standard input, output and errors."""
        self._copies: list[asyncio.Task[None]] = []
        self._within_line = False
        """True after output that has not ended its line, as a prompt does not."""
        self.resize()

    def resize(self) -> None:
        """Give it the size of the caller's terminal; the kernel tells the programs on it."""
        for fd in _STREAMS:
            if os.isatty(fd):
                size = fcntl.ioctl(fd, termios.TIOCGWINSZ, b"\0" * 8)
                fcntl.ioctl(self._master, termios.TIOCSWINSZ, size)
                return

    def join(self) -> None:
        """Begin to copy keys and output; the cage has been started."""
        if os.isatty(0):
            tty.setraw(0, termios.TCSANOW)
        if self.stream >= 0:
            os.close(self.stream)
            self.stream = -1
        self._copies = [asyncio.create_task(self._copy_keys()), asyncio.create_task(self._copy_output())]

    async def finish(self) -> None:
        """Copy the output that is left; the cage has ended, and nothing holds its end open any more."""
        if self._copies:
            keys, output = self._copies
            keys.cancel()
            await asyncio.gather(keys, output, return_exceptions=True)

    def end_line(self) -> None:
        """End the line that the command has begun on the caller's terminal, before this process says something."""
        if self._within_line and os.isatty(1):
            with contextlib.suppress(OSError):  # closed, or nobody reads it
                os.write(1, b"\r\n")

    def close(self) -> None:
        """Stop copying, and close every descriptor."""
        for task in self._copies:
            task.cancel()
        for fd in (self.mount, self._master, self.stream):
            if fd >= 0:
                os.close(fd)

    async def _copy_keys(self) -> None:
        while data := await _attempt(0, partial(os.read, 0, _ATOMIC)):
            await self._type(data)
        await self._type(_END_OF_FILE)

    async def _type(self, data: bytes) -> None:
        while data:
            data = data[await _attempt(self._master, partial(os.write, self._master, data), to_write=True) :]

    async def _copy_output(self) -> None:
        try:
            while data := await _attempt(self._master, self._output):
                self._within_line = not data.endswith(b"\n")
                while data:
                    data = data[await _attempt(1, partial(os.write, 1, data[:_ATOMIC]), to_write=True) :]
        except OSError:  # nobody reads it: hang up, as a terminal does that is closed
            keys = self._copies[0]
            keys.cancel()
            await asyncio.wait([keys])
            os.close(self._master)
            self._master = -1

    def _output(self) -> bytes:
        try:
            return os.read(self._master, 1 << 16)
        except OSError as error:
            if error.errno == errno.EIO:  # nobody has the other end open any more
                return b""
            raise


async def _attempt(fd: int, action: Callable[[], T], *, to_write: bool = False) -> T:
    """Do it once ``fd`` is ready, and again while it would block."""
    while True:
        try:
            await (_writable(fd) if to_write else readable(fd))
        except PermissionError:  # a regular file, which always is
            await asyncio.sleep(0)
        with contextlib.suppress(BlockingIOError):
            return action()


async def _writable(fd: int) -> None:
    loop = asyncio.get_running_loop()
    ready: asyncio.Future[None] = loop.create_future()
    loop.add_writer(fd, resolve, ready)
    try:
        await ready
    finally:
        loop.remove_writer(fd)
