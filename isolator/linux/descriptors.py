"""Ownership of file descriptors: each has one owner, which closes it."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable
from types import TracebackType


def close_all(fds: Iterable[int]) -> None:
    """Close descriptors; those that are closed already are passed over. A list is emptied."""
    for fd in list(fds):
        with contextlib.suppress(OSError):
            os.close(fd)
    if isinstance(fds, list):
        fds.clear()


class FdSet:
    """Descriptors with one owner; a context manager that closes what is still in it.

    with FdSet() as owned:
        folder = owned.add(os.open(...))
        ...
        return owned.release_all()  # somebody else owns them from here on
    """

    def __init__(self, fds: Iterable[int] = ()) -> None:
        self._fds = list(fds)

    def __enter__(self) -> FdSet:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.close()

    def __len__(self) -> int:
        return len(self._fds)

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
