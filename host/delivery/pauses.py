"""Pauses of delivery that an operator has set: a paused plugin's events wait, and its sidecar stays as it is.

They are in the database, so that they survive this process and the daemon.
"""

from __future__ import annotations

import time
from dataclasses import dataclass

from host.database import Store


@dataclass(frozen=True)
class Paused:
    """Pause of one plugin: since when (Unix time), and the name of who set it."""

    since: float
    by: str


class Pauses:
    """The plugins that are paused, by name."""

    def __init__(self, store: Store) -> None:
        self._store = store
        rows = store.read(lambda db: db.execute("SELECT plugin, since, by FROM pauses").fetchall())
        # A damaged row still says that somebody wanted nothing to be sent.
        self._pauses = {
            name: Paused(since if isinstance(since, float) else 0.0, by if isinstance(by, str) else "")
            for name, since, by in rows
            if isinstance(name, str)
        }

    def of(self, name: str) -> Paused | None:
        """The pause of a plugin, if it is paused."""
        return self._pauses.get(name)

    async def set(self, name: str, by: str) -> bool:
        """Pause a plugin, at once; returns when that is safe on disk, and whether it was not paused before."""
        if name in self._pauses:
            return False
        pause = self._pauses[name] = Paused(time.time(), by)
        row = (name, pause.since, by)
        try:
            await self._store.run(lambda db: db.execute("INSERT OR REPLACE INTO pauses VALUES (?,?,?)", row))
        except BaseException:
            self._pauses.pop(name, None)
            raise
        return True

    async def end(self, name: str) -> Paused | None:
        """End the pause of a plugin; returns it when its end is safe on disk, None if there was none."""
        pause = self._pauses.pop(name, None)
        if pause is None:
            return None
        try:
            await self._store.run(lambda db: db.execute("DELETE FROM pauses WHERE plugin=?", (name,)))
        except BaseException:
            self._pauses.setdefault(name, pause)
            raise
        return pause
