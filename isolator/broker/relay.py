"""Carry bytes between a cage's connection and the outside's, both directions, with half-close.

Callbacks on the event loop rather than streams: one read buffer serves every flow, and a direction keeps bytes of its
own only while its sink is full, at most one read's worth; its source then waits, and TCP makes the sender wait.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import struct

CHUNK = 256 * 1024
SMALL = 32 * 1024
BUDGET = 32 * 1024 * 1024
"""Bytes that all flows together may keep waiting; beyond it they read in small pieces."""
_LINGER_RESET = struct.pack("ii", 1, 0)
_ROUNDS = 4


def reset(sock: socket.socket) -> None:
    """Close a connection so that its peer sees a reset at once, not an orderly end."""
    with contextlib.suppress(OSError):
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _LINGER_RESET)
    sock.close()


class Scratch:
    """The read buffer of one event loop, and the number of bytes that its flows keep waiting."""

    def __init__(self) -> None:
        self.buffer = memoryview(bytearray(CHUNK))
        self.waiting = 0


class Pipe:
    """One direction. ``ended`` is set when the source's end was passed on, or ``error`` says why it broke off."""

    def __init__(self, source: socket.socket, sink: socket.socket, scratch: Scratch) -> None:
        self.total = 0
        self.touched = 0.0
        self.error: OSError | None = None
        self.ended: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._source, self._sink, self._scratch = source, sink, scratch
        self._loop = asyncio.get_running_loop()
        self._rest = memoryview(b"")
        self._reading = False

    def start(self, first: bytes = b"") -> None:
        """Begin, after sending ``first`` (bytes of the source that were read already)."""
        self.touched = self._loop.time()
        if first:
            self._send(memoryview(first))
        if not self._rest and not self.ended.done():
            self._read(True)

    def stop(self) -> None:
        """Take the pipe off the loop; bytes that still wait are dropped."""
        self._read(False)
        if self._rest:
            self._loop.remove_writer(self._sink)
            self._keep(memoryview(b""))
        if not self.ended.done():
            self.ended.set_result(None)

    def _readable(self) -> None:
        buffer = self._scratch.buffer
        size = CHUNK if self._scratch.waiting < BUDGET else SMALL
        self.touched = self._loop.time()
        for _ in range(_ROUNDS):
            try:
                count = self._source.recv_into(buffer, size)
            except BlockingIOError:
                return
            except OSError as error:
                self._fail(error)
                return
            if not count:
                self._finish()
                return
            if not self._send(buffer[:count]) or count < size // 2:
                return

    def _send(self, data: memoryview) -> bool:
        """Pass ``data`` on; False when the sink took only part of it and the source now waits."""
        try:
            sent = self._sink.send(data)
        except BlockingIOError:
            sent = 0
        except OSError as error:
            self._fail(error)
            return False
        self.total += sent
        if sent == len(data):
            return True
        # A copy: the scratch buffer is the next flow's in a moment.
        self._keep(memoryview(bytes(data[sent:])))
        self._read(False)
        self._loop.add_writer(self._sink, self._writable)
        return False

    def _writable(self) -> None:
        self.touched = self._loop.time()
        try:
            sent = self._sink.send(self._rest)
        except BlockingIOError:
            return
        except OSError as error:
            self._fail(error)
            return
        self.total += sent
        self._keep(self._rest[sent:])
        if not self._rest:
            self._loop.remove_writer(self._sink)
            self._read(True)

    def _keep(self, rest: memoryview) -> None:
        self._scratch.waiting += len(rest) - len(self._rest)
        self._rest = rest

    def _read(self, wanted: bool) -> None:
        if wanted != self._reading:
            self._reading = wanted
            if wanted:
                self._loop.add_reader(self._source, self._readable)
            else:
                self._loop.remove_reader(self._source)

    def _finish(self) -> None:
        with contextlib.suppress(OSError):
            self._sink.shutdown(socket.SHUT_WR)
        self.stop()

    def _fail(self, error: OSError) -> None:
        self.error = error
        self.stop()
