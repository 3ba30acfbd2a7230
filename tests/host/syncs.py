"""Syncs of a database whose end comes when a test wants it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from host.database.store import Store


@contextlib.contextmanager
def unheard(store: Store) -> Iterator[None]:
    """Let the store not hear of the end of a sync meanwhile."""
    log = store._wal
    assert log._direct is not None
    log._loop.remove_reader(log._direct.fileno())
    yield
    log._loop.add_reader(log._direct.fileno(), log._direct_ended)
