"""Opening files without following what an attacker may have planted, and closing what was inherited."""

from __future__ import annotations

import ctypes
import errno
import os
import stat
import struct

from isolator.linux._libc import call, libc, syscall
from isolator.linux.descriptors import owning

RESOLVE_NO_MAGICLINKS = 0x02
RESOLVE_NO_SYMLINKS = 0x04
RESOLVE_BENEATH = 0x08

_AT_FDCWD, _AT_EACCESS, _AT_EMPTY_PATH = -100, 0x200, 0x1000
_OPEN_HOW = struct.Struct("=3Q")
"""Flags, mode and ``RESOLVE_`` flags of openat2(2)."""


def openat2(
    directory: int,
    path: str,
    flags: int = os.O_RDONLY,
    *,
    mode: int = 0,
    resolve: int = RESOLVE_BENEATH | RESOLVE_NO_SYMLINKS | RESOLVE_NO_MAGICLINKS,
) -> int:
    """Open ``path`` below the ``directory`` descriptor; by default no symlink is followed and ``..`` cannot escape."""
    how = _OPEN_HOW.pack(flags | os.O_CLOEXEC, mode, resolve)
    return syscall("openat2", directory, os.fsencode(path), how, len(how), what=path)


def remove_tree(path: str | os.PathLike[str], *, ignore_errors: bool = False) -> None:
    """Remove a folder and everything in it, by descriptors; raises OSError."""
    if ignore_errors and not os.path.lexists(path):
        return
    import shutil  # brings every archive format along, and is not needed before something is removed

    shutil.rmtree(path, ignore_errors=ignore_errors)


def open_nofollow(path: str, flags: int = os.O_PATH) -> int:
    """Open an absolute path in which no component is a symlink (ELOOP otherwise)."""
    return openat2(_AT_FDCWD, path, flags, resolve=RESOLVE_NO_SYMLINKS | RESOLVE_NO_MAGICLINKS)


def let_group_write(fd: int, gid: int) -> None:
    """Make the group ``gid`` that of the file behind ``fd``, open with O_PATH at least, and let it write; OSError."""
    status, path = os.fstat(fd), f"/proc/self/fd/{fd}"  # fchown and fchmod take no O_PATH
    if status.st_gid != gid:
        os.chown(path, -1, gid)
    if not status.st_mode & stat.S_IWGRP:
        os.chmod(path, stat.S_IMODE(status.st_mode) | stat.S_IWGRP)


def check_access(fd: int, mode: int) -> None:
    """Raise OSError unless the calling process, as it is now, may use the file behind ``fd`` so (``os.W_OK``, ...)."""
    try:
        syscall("faccessat2", fd, b"", mode, _AT_EACCESS | _AT_EMPTY_PATH)
    except OSError as error:
        raise OSError(error.errno, error.strerror) from None


def read_plain(path: str | os.PathLike[str], *, most: int) -> bytes:
    """Content of a plain file of at most ``most`` bytes; follows no link and never waits. Raises OSError."""
    with owning(os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC | os.O_NOFOLLOW)) as fd:
        if not stat.S_ISREG(os.fstat(fd).st_mode):
            raise OSError(errno.EINVAL, "is not a plain file", str(path))
        content = b""
        while chunk := os.read(fd, most + 1 - len(content)):
            content += chunk
        if len(content) > most:
            raise OSError(errno.EFBIG, f"is larger than {most} bytes", str(path))
        return content


def write_file(path: str, text: str, *, folder: int | None = None) -> None:
    """Write to a file that is there, in one call, as the kernel's own want it; raises OSError.

    ``folder``: a descriptor of what ``path`` is relative to.
    """
    with owning(os.open(path, os.O_WRONLY | os.O_CLOEXEC, dir_fd=folder)) as fd:
        os.write(fd, text.encode())


def write_all(fd: int, data: bytes | bytearray) -> None:
    """Write all of it, however little is taken at a time: by a pipe, or a disk that is nearly full. Raises OSError."""
    left = memoryview(data)
    while left:
        left = left[os.write(fd, left) :]


def close_all_but(keep: set[int]) -> None:
    """Close every descriptor that is not in ``keep`` (close_range(2))."""
    low = 0
    for fd in sorted(keep):
        if fd > low:
            syscall("close_range", low, fd - 1, 0)
        low = fd + 1
    syscall("close_range", low, 0xFFFFFFFF, 0)


def eventfd() -> int:
    """A non-blocking, close-on-exec event counter."""
    return os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)


def sync_filesystem(fd: int) -> None:
    """Flush the file system behind ``fd`` (syncfs(2)); raises OSError also for a write that failed before (EIO)."""
    call(libc.syncfs, "sync of a file system", ctypes.c_int(fd))
