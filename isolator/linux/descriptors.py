"""Ownership of file descriptors: each has one owner, which closes it."""

from __future__ import annotations

import os
import sys

TYPE_CHECKING = False  # typing, which has it too, takes longer to import than all else here; mypy goes by the name
if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator


def close_all(fds: Iterable[int]) -> None:
    """Close descriptors; those that are closed already, or no such numbers, are passed over. A list is emptied."""
    for fd in list(fds):
        try:  # noqa: SIM105  # a start that counts does without contextlib
            os.close(fd)
        except (OSError, OverflowError):
            pass
    if isinstance(fds, list):
        fds.clear()


class owning:
    """Context of one descriptor, which is closed at its end."""

    def __init__(self, fd: int) -> None:
        self._fd = fd

    def __enter__(self) -> int:
        return self._fd

    def __exit__(self, *_: object) -> None:
        os.close(self._fd)


def check_open(fds: Iterable[int]) -> None:
    """Raise OSError, OverflowError or ValueError for what is no open descriptor; waits for nothing that it leads to."""
    import fcntl

    for fd in fds:
        fcntl.fcntl(fd, fcntl.F_GETFD)


def open_standard_streams() -> None:
    """Open /dev/null on each of the descriptors 0 to 2 that whoever started this process had closed.

    For the first line of every entry point: the next descriptor that is opened would get the free number, and pass for
    a standard stream of whatever this process starts.
    """
    while (fd := os.open("/dev/null", os.O_RDWR | os.O_CLOEXEC)) <= 2:
        os.set_inheritable(fd, True)
    os.close(fd)
    sys.stdin = sys.stdin or open(0, closefd=False)  # noqa: SIM115  # they last as long as the process
    sys.stdout = sys.stdout or open(1, "w", closefd=False)  # noqa: SIM115
    sys.stderr = sys.stderr or open(2, "w", closefd=False)  # noqa: SIM115


def allow_many_files() -> None:
    """Raise this process's limit of open files to the hard one: a login shell allows 1024, and every child inherits it.

    A running plugin takes about six descriptors of its supervisor, a folder that a cage sees one or two.
    """
    import resource

    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


class FdSet:
    """Descriptors with one owner; a context manager that closes what is still in it.

    with FdSet() as owned:
        folder = owned.add(os.open(...))
        ...
        return owned.release_all()  # somebody else owns them from here on
    """

    def __init__(self, fds: Iterable[int] = ()) -> None:
        """``fds`` may make them one by one: those before one that fails are closed."""
        self._fds: list[int] = []
        try:
            for fd in fds:
                self.add(fd)
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> FdSet:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __len__(self) -> int:
        return len(self._fds)

    def __iter__(self) -> Iterator[int]:
        return iter(self._fds)

    def add(self, fd: int) -> int:
        """Take ownership of a descriptor; returns it."""
        self._fds.append(fd)
        return fd

    def release(self, fd: int) -> int:
        """Give up ownership of one descriptor; returns it."""
        self._fds.remove(fd)
        return fd

    def release_all(self) -> list[int]:
        """Give up ownership of every descriptor; returns them in the order in which they were added."""
        fds, self._fds = self._fds, []
        return fds

    def close(self) -> None:
        """Close every descriptor that is still owned; idempotent."""
        close_all(self._fds)
