"""Linux's native asynchronous I/O (io_submit(2)): sync of a file without a thread (``IOCB_CMD_FDSYNC``, kernel 4.18).

The kernel syncs in a worker of its own and reports to an eventfd, so that an event loop goes on meanwhile and learns of
the end as of any other descriptor. A thread that calls ``fdatasync`` would have to take the interpreter's lock from the
loop before it could say that it is done.
"""

from __future__ import annotations

import ctypes
import os

from isolator.linux._libc import MACHINE, call, failed, libc

_NUMBERS = {
    "x86_64": {"setup": 206, "destroy": 207, "getevents": 208, "submit": 209, "cancel": 210},
    "aarch64": {"setup": 0, "destroy": 1, "submit": 2, "cancel": 3, "getevents": 4},
}
_FDSYNC, _RESFD = 3, 1
_START_WRITING = 2
"""``SYNC_FILE_RANGE_WRITE`` of sync_file_range(2)."""
_ALL = ctypes.c_int64(0)
"""Its offset and number of bytes: all of the file."""


class Iocb(ctypes.Structure):
    """``struct iocb`` of linux/aio_abi.h; two fields that are always 0 here stand in the other order on big-endian."""

    _fields_ = (
        ("data", ctypes.c_uint64),
        ("key", ctypes.c_uint32),
        ("rw_flags", ctypes.c_uint32),
        ("opcode", ctypes.c_uint16),
        ("reqprio", ctypes.c_int16),
        ("fildes", ctypes.c_uint32),
        ("buf", ctypes.c_uint64),
        ("nbytes", ctypes.c_uint64),
        ("offset", ctypes.c_int64),
        ("reserved2", ctypes.c_uint64),
        ("flags", ctypes.c_uint32),
        ("resfd", ctypes.c_uint32),
    )


class _Event(ctypes.Structure):
    """``struct io_event``."""

    _fields_ = (
        ("data", ctypes.c_uint64),
        ("obj", ctypes.c_uint64),
        ("res", ctypes.c_int64),
        ("res2", ctypes.c_int64),
    )


class Context:
    """Requests that the kernel works on, ``room`` at a time. Raises OSError where the kernel or the host has none."""

    def __init__(self, room: int) -> None:
        numbers = _NUMBERS.get(MACHINE)
        if numbers is None:
            raise OSError(38, os.strerror(38), "io_setup")
        self._submit, self._getevents, self._cancel, self._destroy = (
            ctypes.c_long(numbers[name]) for name in ("submit", "getevents", "cancel", "destroy")
        )
        self._context = ctypes.c_ulong(0)
        setup = ctypes.c_long(numbers["setup"])
        call(libc.syscall, "io_setup", setup, ctypes.c_long(room), ctypes.byref(self._context))
        self._event = _Event()
        self._none, self._one = ctypes.c_long(0), ctypes.c_long(1)

    def submit(self, block: ctypes.Array[ctypes._Pointer[Iocb]]) -> None:
        """Have the kernel work on one request; raises OSError when it does not."""
        if libc.syscall(self._submit, self._context, self._one, block) != 1:
            raise failed("io_submit")

    def ended(self, *, wait: bool = False) -> tuple[int, int] | None:
        """The ``data`` and the result of a request that has ended; None if none has. Raises OSError."""
        least = self._one if wait else self._none
        found = libc.syscall(self._getevents, self._context, least, self._one, ctypes.byref(self._event), None)
        if found < 0:
            raise failed("io_getevents")
        return (self._event.data, self._event.res) if found else None

    def cancel(self, block: Iocb) -> None:
        """Have a request end, if it has not ended yet."""
        libc.syscall(self._cancel, self._context, ctypes.byref(block), ctypes.byref(_Event()))

    def close(self) -> None:
        """Wait for the requests that cannot be cancelled, and let go of everything."""
        libc.syscall(self._destroy, self._context)


class FileSync:
    """Syncs of one open file, one at a time. Raises OSError where the kernel or the host does not offer this.

    ``fileno`` is readable once the sync that was begun has ended.
    """

    def __init__(self, fd: int) -> None:
        self._context = Context(1)
        self._fd = fd
        self._eventfd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._block = in_array(Iocb(opcode=_FDSYNC, fildes=fd, flags=_RESFD, resfd=self._eventfd))

    def fileno(self) -> int:
        """The eventfd that tells of the end of a sync."""
        return self._eventfd

    def write_out(self) -> None:
        """Hand the file's changed pages to the disk at once, for which ``begin`` alone waits until its worker runs.

        Nothing is safe by that, and an error is left to the sync that is to follow. Waits while the disk's queue is
        full (sync_file_range(2)).
        """
        libc.sync_file_range(self._fd, _ALL, _ALL, _START_WRITING)

    def begin(self) -> None:
        """Have the data of the file synced that is written by now; raises OSError when that cannot be begun."""
        self._context.submit(self._block)

    def end(self) -> OSError | None:
        """The outcome of the sync that has ended: None if all is on disk; to be called when ``fileno`` is readable."""
        os.eventfd_read(self._eventfd)
        try:
            ended = self._context.ended(wait=True)
        except OSError as error:
            return error
        result = ended[1] if ended is not None else 0
        return OSError(-result, os.strerror(-result), "fdatasync") if result < 0 else None

    def close(self) -> None:
        """Wait for a sync that is under way, and let go of everything."""
        self._context.close()
        os.close(self._eventfd)


def in_array(block: Iocb) -> ctypes.Array[ctypes._Pointer[Iocb]]:
    """One request as io_submit(2) takes it."""
    return (ctypes.POINTER(Iocb) * 1)(ctypes.pointer(block))
