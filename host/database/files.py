"""The files of the database: what may be one, whether it is still the same, and space kept for a full disk."""

from __future__ import annotations

import contextlib
import functools
import os
import sqlite3
import stat
import struct
import time
from pathlib import Path

from isolator.errors import IsolatorError
from isolator.linux.descriptors import owning

RESERVE, RESERVE_SHARE = 4 << 20, 8
"""Bytes reserved for a checkpoint on a full disk; on a small disk at most this part of what is free."""
OPENING = 5.0
"""Seconds that a connection waits for its shared lock while it is opened."""
RESTORE = "restore it from a backup, and keep this one until then: queued events and config are in it"

# None is bound as it is. Without an adapter the module looks for one at None itself, and makes and drops the error that
# there is none, which takes longer than to bind a text.
sqlite3.register_adapter(type(None), dict[None, None]().get)


class Reserve:
    """Space on the disk that is given back when nothing else is left. Without one everything goes on as well."""

    def __init__(self, path: str) -> None:
        self._path, self._size = path, 0
        self.held = False

    def hold(self) -> None:
        """Reserve the space, unless the disk has too little of it."""
        with contextlib.suppress(OSError):
            fd = os.open(self._path, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
            try:
                disk = os.fstatvfs(fd)
                # Once given back it is taken whole again, or whatever came then would live on the reserve.
                self._size = self._size or min(RESERVE, disk.f_bavail * disk.f_frsize // RESERVE_SHARE) or 1
                os.posix_fallocate(fd, 0, self._size)
                self.held = True
            except OSError:
                os.ftruncate(fd, 0)
            finally:
                os.close(fd)

    def release(self) -> None:
        """Give the space back."""
        self.held = False
        with (
            contextlib.suppress(OSError),
            owning(os.open(self._path, os.O_WRONLY | os.O_CLOEXEC | os.O_NOFOLLOW)) as fd,
        ):
            os.ftruncate(fd, 0)


def check_file(path: Path) -> None:
    """Raise IsolatorError if the file, which need not exist yet, cannot be the database."""
    try:
        status = path.lstat()
    except FileNotFoundError:
        return
    if stat.S_ISLNK(status.st_mode):
        raise IsolatorError(str(path), "is a symbolic link", "remove it; the database must be a plain file")
    if not stat.S_ISREG(status.st_mode):
        raise IsolatorError(str(path), "is not a plain file", RESTORE)
    if status.st_uid != os.geteuid():
        raise IsolatorError(str(path), f"belongs to uid {status.st_uid}", f"chown {os.geteuid()} {path}")
    if not status.st_mode & stat.S_IWUSR or not status.st_mode & stat.S_IRUSR:
        raise IsolatorError(str(path), f"has the mode {status.st_mode & 0o777:o}", f"chmod 600 {path}")


def identity(name: str) -> tuple[int, int] | None:
    """Device and inode behind a name, None if there is none."""
    try:
        status = os.stat(name, follow_symlinks=False)
    except FileNotFoundError:
        return None
    return status.st_dev, status.st_ino


def has_wal_header(fd: int) -> bool:
    """Whether a write-ahead log begins with a header whose checksum fits (SQLite's file format, "WAL File Format")."""
    for _ in range(3):  # it may be in the middle of being written; the thread that syncs is the one that waits
        if _is_wal_header(os.pread(fd, 32, 0)):
            return True
        time.sleep(0.001)
    return False


@functools.lru_cache(maxsize=2)
def _is_wal_header(header: bytes) -> bool:
    """Whether these are the bytes of such a header; remembered, as a log keeps its own until it is begun anew."""
    if len(header) != 32 or header[:4] not in (b"\x37\x7f\x06\x82", b"\x37\x7f\x06\x83"):
        return False
    words = struct.unpack(f"{'>' if header[3] & 1 else '<'}6I", header[:24])
    one = two = 0
    for first, second in zip(words[::2], words[1::2], strict=True):
        one = (one + first + two) & 0xFFFFFFFF
        two = (two + second + one) & 0xFFFFFFFF
    return (one, two) == struct.unpack(">2I", header[24:])


def is_damage(error: sqlite3.Error) -> bool:
    """Whether the file itself is of no use, not its disk."""
    return getattr(error, "sqlite_errorcode", 0) & 0xFF in (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB)


def is_full(error: sqlite3.Error) -> bool:
    """Whether the disk may be full; an I/O error is what SQLite reports where its index of the log cannot grow."""
    code = getattr(error, "sqlite_errorcode", 0) & 0xFF
    return code in (sqlite3.SQLITE_FULL, sqlite3.SQLITE_IOERR)


def connect(path: Path) -> sqlite3.Connection:
    """Open a connection that waits for no lock from then on. Raises sqlite3.Error.

    While it is opened it does wait: a connection that is closed, in this process or another, holds the file's pending
    lock for a moment, to see whether it was the last (``sqlite3WalClose``).
    """
    connection = sqlite3.connect(
        path, timeout=OPENING, isolation_level=None, check_same_thread=False, cached_statements=256
    )
    connection.text_factory = _text
    connection.execute("PRAGMA synchronous=NORMAL")  # reads the schema
    connection.execute("PRAGMA busy_timeout=0")
    return connection


def copy(source: sqlite3.Connection, target: Path) -> None:
    """Write what ``source`` sees to a new file, and close it."""
    with contextlib.closing(source):
        os.close(os.open(target, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600))
        with contextlib.closing(sqlite3.connect(target, isolation_level=None)) as copy:
            copy.execute("PRAGMA journal_mode=OFF")
            copy.execute("PRAGMA synchronous=OFF")
            source.backup(copy)


def save_elsewhere(connection: sqlite3.Connection, path: Path, wal: int, before: tuple[int, int] | None) -> str:
    """Write all that a connection knows to a new file in the place of ``path``; returns what became of the content.

    ``before``: the identity of the file that was there. Raises OSError, sqlite3.Error.
    """
    new = Path(f"{path}.new")
    new.unlink(missing_ok=True)
    with contextlib.closing(sqlite3.connect(new)) as target:
        connection.backup(target)
        damage = target.execute("PRAGMA quick_check(1)").fetchone()[0]
    if damage != "ok":
        new.unlink()
        raise sqlite3.DatabaseError(damage.splitlines()[-1])
    named = identity(str(path))
    kept = "all of its content was saved" if has_wal_header(wal) else "what could be read of it was saved"
    if named is not None and named != before:
        aside = Path(f"{path}.aside-{time.time_ns()}")
        path.rename(aside)
        kept += f"; the other file is {aside}"
    # A log that does not belong to the new file must not be beside it.
    for name in (f"{path}-wal", f"{path}-shm", f"{new}-wal", f"{new}-shm"):
        Path(name).unlink(missing_ok=True)
    new.rename(path)
    for saved, flags in ((path, os.O_RDONLY), (path.parent, os.O_RDONLY | os.O_DIRECTORY)):
        with owning(os.open(saved, flags | os.O_CLOEXEC)) as fd:
            os.fsync(fd)
    return kept


def _text(raw: bytes) -> str | None:
    """A text of the database; None for one that is damaged: whoever reads rows checks their types."""
    try:
        return raw.decode()
    except UnicodeDecodeError:
        return None
