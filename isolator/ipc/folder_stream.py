"""A folder as a stream of bytes: what a collector writes and root, which believes none of it, reads and bounds.

A record is a letter and its fields; texts are bytes after their length. Folders nest: ``d`` enters one, ``u`` leaves
it, so a name is always one component of a path. A file's content comes in chunks after their length; an empty one ends
it.
``s`` names a single file, which is not copied, by device and inode. ``p`` has, like a file, the content of a package,
and stands alone. ``g`` is a signature, behind everything else. ``e`` is the end of a collector that refuses or
fails, ``.`` that of a whole stream.
"""

from __future__ import annotations

import hashlib
import os
import select
import struct
import time
from collections.abc import Callable, Iterable, Iterator

from isolator.linux.files import write_all

MAX_FILES = 50_000
MAX_BYTES = 2 << 30
MAX_DEPTH = 64

ENTER, LEAVE, LINK, FILE, SINGLE, PACKAGE, SIGNATURE, ERROR, END = b"d", b"u", b"l", b"f", b"s", b"p", b"g", b"e", b"."
CHUNK = 1 << 18
_COPIED = 1 << 14
"""Bytes of a chunk that is written by itself: a copy costs more than a call."""
LONGEST_TEXT = 4096
"""Bytes of a name, a link's goal or a part of an error."""
_LENGTH, _FILE, _SINGLE = struct.Struct("=I"), struct.Struct("=?q"), struct.Struct("=QQ")


def chunks(fd: int) -> Iterator[bytes]:
    """The content of an open file from where it stands."""
    while chunk := os.read(fd, CHUNK):
        yield chunk


class FolderWriter:
    """Writes one stream to a descriptor; whole only after ``end`` or ``error``."""

    def __init__(self, fd: int) -> None:
        self._fd, self._held = fd, bytearray()

    def enter(self, name: bytes) -> None:
        """Begin a folder."""
        self._write(ENTER + _text(name))

    def leave(self) -> None:
        """End the folder."""
        self._write(LEAVE)

    def link(self, name: bytes, goal: bytes) -> None:
        """Name a symbolic link."""
        self._write(LINK + _text(name) + _text(goal))

    def file(self, name: bytes, source: Iterable[bytes], *, executable: bool, mtime_ns: int) -> None:
        """Copy a file from its content in chunks, of at most ``CHUNK`` bytes each."""
        self._write(FILE + _text(name) + _FILE.pack(executable, mtime_ns))
        self._content(source)

    def package(self, source: Iterable[bytes]) -> None:
        """Copy a package, likewise."""
        self._write(PACKAGE)
        self._content(source)

    def single(self, device: int, inode: int) -> None:
        """Name a single file."""
        self._write(SINGLE + _SINGLE.pack(device, inode))

    def signature(self, signature: bytes) -> None:
        """Pass on one signature."""
        self._write(SIGNATURE + _text(signature))

    def error(self, path: bytes, why: str, remedy: str) -> None:
        """End the stream with an error; ``path`` is below the folder."""
        self._write(ERROR + b"".join(_text(part[:LONGEST_TEXT]) for part in (path, why.encode(), remedy.encode())))
        self._flush()

    def end(self) -> None:
        """End the stream."""
        self._write(END)
        self._flush()

    def _content(self, source: Iterable[bytes]) -> None:
        try:
            for chunk in source:
                self._write(_LENGTH.pack(len(chunk)))
                if len(chunk) < _COPIED:
                    self._write(chunk)
                else:
                    self._flush()
                    write_all(self._fd, chunk)
        finally:
            self._write(_LENGTH.pack(0))  # also of what cannot be read to its end: the error comes as a record

    def _write(self, data: bytes) -> None:
        self._held += data
        if len(self._held) >= CHUNK:
            self._flush()

    def _flush(self) -> None:
        held, self._held = self._held, bytearray()
        write_all(self._fd, held)


class FolderDigest:
    """SHA-256 over names, modes and contents of a folder, each folder before what is in it."""

    def __init__(self) -> None:
        self._digest = hashlib.sha256()

    def folder(self, path: str) -> None:
        """Count a folder."""
        self._update("d", path)

    def link(self, path: str, goal: str) -> None:
        """Count a link."""
        self._update("l", path, goal)

    def file(self, path: str, sha256: str, *, executable: bool) -> None:
        """Count a file by the SHA-256 of its content."""
        self._update("x" if executable else "f", path, sha256)

    def hexdigest(self) -> str:
        """The digest of all of it."""
        return self._digest.hexdigest()

    def _update(self, *fields: str) -> None:
        # With lengths: a file name may hold any byte, and two different folders must never have the same digest.
        for text in (str(len(fields)), *fields):
            data = text.encode(errors="surrogateescape")
            self._digest.update(len(data).to_bytes(8, "big") + data)


class FolderReader:
    """Reads one stream from a pipe. Each method raises EOFError at its end, ValueError for what no writer writes, and
    TimeoutError when the whole of it has not come ``seconds`` after the reader was made."""

    def __init__(self, fd: int, seconds: float) -> None:
        self._fd, self._end = fd, time.monotonic() + seconds
        self._held = bytearray()
        self._poll = select.poll()
        self._poll.register(fd, select.POLLIN)

    def kind(self) -> bytes:
        """Read the letter of the next record."""
        return self._read(1)

    def text(self) -> bytes:
        """Read a text."""
        return self._read(self._length(LONGEST_TEXT))

    def name(self) -> str:
        """Read a name, which is one component of a path and leads nowhere."""
        name = os.fsdecode(self.text())
        if name in ("", ".", "..") or "/" in name or "\0" in name:
            raise ValueError("no name")
        return name

    def goal(self) -> str:
        """Read a link's goal."""
        goal = os.fsdecode(self.text())
        if not goal or "\0" in goal:
            raise ValueError("no goal")
        return goal

    def facts(self) -> tuple[bool, int]:
        """Read whether a file is executable, and its time of change in nanoseconds."""
        executable, mtime_ns = _FILE.unpack(self._read(_FILE.size))
        return executable, mtime_ns

    def content(self, take: Callable[[bytes], None]) -> None:
        """Pass on the content of a file chunk by chunk."""
        while length := self._length(CHUNK):
            take(self._read(length))

    def identity(self) -> tuple[int, int]:
        """Read device and inode of a single file."""
        device, inode = _SINGLE.unpack(self._read(_SINGLE.size))
        return device, inode

    def _length(self, most: int) -> int:
        (length,) = _LENGTH.unpack(self._read(_LENGTH.size))
        if length > most:
            raise ValueError("too long")
        return int(length)

    def _read(self, size: int) -> bytes:
        while len(self._held) < size:
            if not self._poll.poll(max(0.0, self._end - time.monotonic()) * 1000):
                raise TimeoutError
            chunk = os.read(self._fd, CHUNK)
            if not chunk:
                raise EOFError
            self._held += chunk
        data = bytes(self._held[:size])
        del self._held[:size]
        return data


def _text(data: bytes) -> bytes:
    return _LENGTH.pack(len(data)) + data
