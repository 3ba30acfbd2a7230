"""Files in memory that nobody can change any more (memfd_create(2), seals)."""

from __future__ import annotations

import fcntl
import os

_SEALS = fcntl.F_SEAL_WRITE | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_SEAL


def make_sealed(data: bytes) -> int:
    """A descriptor of a file in memory that holds ``data`` for good."""
    fd = os.memfd_create("sealed", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        with open(fd, "wb", closefd=False) as file:
            file.write(data)
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, _SEALS)
    except BaseException:
        os.close(fd)
        raise
    return fd


def is_sealed(fd: int) -> bool:
    """Whether somebody else's descriptor is one of a sealed file in memory."""
    try:
        return fcntl.fcntl(fd, fcntl.F_GET_SEALS) & _SEALS == _SEALS
    except OSError:
        return False


def read_sealed(fd: int, limit: int) -> bytes:
    """The bytes of a sealed file that somebody else has made; raises OSError or ValueError for anything else.

    It cannot change meanwhile and never blocks, which a file of another kind might.
    """
    if fcntl.fcntl(fd, fcntl.F_GET_SEALS) & _SEALS != _SEALS:
        raise ValueError("a file in memory that is not sealed")
    size = os.fstat(fd).st_size
    if size > limit:
        raise ValueError(f"{size} bytes; at most {limit}")
    return os.pread(fd, size, 0)
