"""File locks (flock(2)) on files that their holders remove.

Whoever had the lock may have removed the file since it was opened here; such a lock keeps nobody off. So each taker
compares the file behind its descriptor with the one that the path names, while it holds the lock.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import stat


def lock_file(path: str | os.PathLike[str], *, create: bool = True, wait: bool = False) -> int | None:
    """Open (or make, 0600) a regular file and take its exclusive lock.

    Returns the descriptor that holds the lock, open for reading and appending; closing it releases the lock. Returns
    None when somebody else holds the lock and ``wait`` is False, or when the file was removed meanwhile and ``create``
    is False. Raises OSError when the file cannot be opened or is no regular file; the path's last component may be no
    link.
    """
    flags = os.O_RDWR | os.O_APPEND | os.O_NONBLOCK | os.O_CLOEXEC | os.O_NOFOLLOW | (os.O_CREAT if create else 0)
    while True:
        fd = os.open(path, flags, 0o600)
        try:
            if not stat.S_ISREG(os.fstat(fd).st_mode):
                raise OSError(errno.EINVAL, "not a regular file", os.fspath(path))
            fcntl.flock(fd, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
            if _is_at(fd, path):
                return fd
        except BlockingIOError:
            os.close(fd)
            return None
        except BaseException:
            os.close(fd)
            raise
        os.close(fd)
        if not create:
            return None


def _is_at(fd: int, path: str | os.PathLike[str]) -> bool:
    mine = os.fstat(fd)
    with contextlib.suppress(FileNotFoundError):
        return os.path.samestat(mine, os.stat(path, follow_symlinks=False))
    return False
