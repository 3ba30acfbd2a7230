"""Syncs of a database whose end comes when a test wants it."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

import pytest

from host.database import wal
from host.database.store import Store
from isolator.linux.aio import FileSync


@contextlib.contextmanager
def unheard(store: Store) -> Iterator[None]:
    """Let the store not hear of the end of a sync meanwhile."""
    log = store._wal
    assert log._direct is not None
    log._loop.remove_reader(log._direct.fileno())
    yield
    log._loop.add_reader(log._direct.fileno(), log._direct_ended)


def noted_steps(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Steps of the log, in turn; a machine that is busy with other things does not count as a slow disk."""
    steps: list[str] = []
    monkeypatch.setattr(wal, "DELAY", 100.0)
    for name, real in (("write_out", FileSync.write_out), ("begin", FileSync.begin)):

        def noted(sync: FileSync, name: str = name, real: Callable[[FileSync], None] = real) -> None:
            steps.append(name)
            real(sync)

        monkeypatch.setattr(FileSync, name, noted)
    return steps
