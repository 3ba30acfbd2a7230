"""Waiting for changes in a directory (inotify(7)), non-blocking, for an event loop or a poll."""

from __future__ import annotations

import contextlib
import ctypes
import os
import struct

from isolator.base.structs import struct_class
from isolator.linux._libc import call, libc

IN_MODIFY = 0x2
IN_ATTRIB = 0x4
IN_CLOSE_WRITE = 0x8
IN_MOVED_FROM = 0x40
IN_MOVED_TO = 0x80
IN_CREATE = 0x100
IN_DELETE = 0x200
IN_DELETE_SELF = 0x400
IN_MOVE_SELF = 0x800
IN_ONLYDIR = 0x01000000
IN_DONT_FOLLOW = 0x02000000

_HEADER = struct.Struct("iIII")


@struct_class(frozen=True)
class Event:
    """A change: ``name`` is the entry in the watched directory, empty for the directory itself."""

    watch: int
    mask: int
    name: str


class Inotify:
    """An inotify instance; ``fileno`` is readable when events wait."""

    def __init__(self) -> None:
        self._fd = call(libc.inotify_init1, "inotify_init1", os.O_NONBLOCK | os.O_CLOEXEC)

    def fileno(self) -> int:
        return self._fd

    def watch(self, path: str, mask: int) -> int:
        """Watch ``path`` for the events in ``mask``; returns the watch number."""
        return call(libc.inotify_add_watch, f"watch of {path}", self._fd, os.fsencode(path), ctypes.c_uint32(mask))

    def unwatch(self, number: int) -> None:
        """End a watch; no error when the kernel has ended it, as it does with the folder."""
        with contextlib.suppress(OSError):
            call(libc.inotify_rm_watch, "inotify_rm_watch", self._fd, number)

    def read(self) -> list[Event]:
        """Read every waiting event; empty when there is none."""
        try:
            data = os.read(self._fd, 65536)
        except BlockingIOError:
            return []
        events, offset = [], 0
        while offset < len(data):
            watch, mask, _cookie, length = _HEADER.unpack_from(data, offset)
            offset += _HEADER.size
            name = data[offset : offset + length].rstrip(b"\0")
            events.append(Event(watch, mask, os.fsdecode(name)))
            offset += length
        return events

    def close(self) -> None:
        """Close the instance and all its watches."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1
