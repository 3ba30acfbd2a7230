"""Private roots: each below ``BASE``, of a daemon that a command starts for itself and removes with all its traces.

The command holds the lock of the folder's ``lock`` for as long as it lives. A folder whose lock is free was left by a
command that was killed; the next command that makes a root, or ``isolator gc``, removes it with its users and mounts.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
from collections.abc import Iterator
from pathlib import Path

from isolator.cli.purge import purge_root
from isolator.errors import IsolatorError
from isolator.linux.lock import lock_file
from isolator.paths import Paths
from isolator.recovery.daemon import Leftover

BASE = Path("/var/lib/isolator-dev")
_LOCK = "lock"


class PrivateRoot:
    """A new root; a context manager that removes it, for which its daemon must have ended."""

    def __init__(self) -> None:
        clear()
        while (made := _make()) is None:
            pass  # somebody took it for abandoned before it was locked
        self.paths, self._lock = made

    def __enter__(self) -> PrivateRoot:
        return self

    def __exit__(self, *_: object) -> None:
        try:
            _remove(self.paths)
        finally:
            os.close(self._lock)


def _make() -> tuple[Paths, int] | None:
    """A new root and its lock; None when another command has begun to remove it."""
    folder = BASE / secrets.token_hex(4)
    with contextlib.suppress(FileNotFoundError):
        folder.mkdir(mode=0o755, parents=True)
        if (lock := lock_file(folder / _LOCK)) is not None:
            return Paths.of(folder), lock
    return None


def find() -> list[Leftover]:
    """The roots that killed commands left; changes nothing."""
    with _abandoned() as roots:
        return [Leftover("private root", str(paths.root)) for paths in roots]


def clear() -> list[Leftover]:
    """Remove the roots that killed commands left, but for those whose daemon is still ending; returns what it was."""
    done = []
    with _abandoned() as roots:
        for paths in roots:
            with contextlib.suppress(IsolatorError):
                _remove(paths)
                done.append(Leftover("private root", str(paths.root)))
    return done


def _remove(paths: Paths) -> None:
    purge_root(paths)
    shutil.rmtree(paths.root)
    with contextlib.suppress(OSError):
        BASE.rmdir()


@contextlib.contextmanager
def _abandoned() -> Iterator[list[Paths]]:
    """The roots whose lock is free; locked meanwhile."""
    with contextlib.ExitStack() as stack:
        found = []
        for folder in sorted(BASE.iterdir()) if BASE.is_dir() else ():
            with contextlib.suppress(OSError):
                fd = lock_file(folder / _LOCK)
                if fd is not None:
                    stack.callback(os.close, fd)
                    found.append(Paths.of(folder))
        yield found
