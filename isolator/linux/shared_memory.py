"""System V shared memory (shmget(2)): a segment that the battery puts on the host, for a cage to find."""

from __future__ import annotations

import contextlib
import ctypes
from collections.abc import Iterator

from isolator.linux._libc import call, failed, libc

_IPC_PRIVATE, _IPC_CREAT, _IPC_RMID = 0, 0o1000, 0


@contextlib.contextmanager
def readable_segment(data: bytes) -> Iterator[int]:
    """The id of a segment that anybody in this IPC namespace may read; it is gone when the context, or this process,
    ends: it is marked for removal at once, and Linux lets it be attached all the same."""
    segment = call(libc.shmget, "shmget", _IPC_PRIVATE, ctypes.c_size_t(len(data)), _IPC_CREAT | 0o644)
    libc.shmat.restype = ctypes.c_void_p
    address = libc.shmat(segment, None, 0)
    error = failed("shmat") if address == ctypes.c_void_p(-1).value else None
    call(libc.shmctl, "shmctl", segment, _IPC_RMID, None)
    if error is not None:
        raise error
    ctypes.memmove(address, data, len(data))
    try:
        yield segment
    finally:
        call(libc.shmdt, "shmdt", ctypes.c_void_p(address))
