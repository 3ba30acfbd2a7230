"""Pauses of delivery that an operator has set: a paused plugin's events wait, and its sidecar stays as it is.

They are in the database, so that they survive this process and the daemon.
"""

from __future__ import annotations

import sqlite3
import time
from dataclasses import dataclass

from host.database.store import Store
from host.queue.owed import Debts, owed
from isolator.audit.schema import PluginPaused, PluginResumed


@dataclass(frozen=True)
class Paused:
    """Pause of one plugin: since when (Unix time), and the name of who set it."""

    since: float
    by: str


class Pauses:
    """The plugins that are paused, by name; each pause and its end are on record."""

    def __init__(self, store: Store, debts: Debts) -> None:
        self._store, self._debts = store, debts
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

    def names(self) -> frozenset[str]:
        """The names of the plugins that are paused."""
        return frozenset(self._pauses)

    async def set(self, name: str, by: str) -> bool:
        """Pause a plugin, at once; returns when that is safe on disk, and whether it was not paused before."""
        if name in self._pauses:
            return False
        pause = self._pauses[name] = Paused(time.time(), by)
        row, records = (name, pause.since, by), [owed(PluginPaused(by=by), name)]

        def keep(db: sqlite3.Connection) -> None:
            db.execute("INSERT OR REPLACE INTO pauses VALUES (?,?,?)", row)
            self._debts.note(db, records)

        try:
            await self._store.run(keep)
        except BaseException:
            self._pauses.pop(name, None)
            raise
        self._debts.pay(records)
        return True

    async def end(self, name: str, by: str | None) -> Paused | None:
        """End the pause of a plugin; returns it when its end is safe on disk, None if there was none.

        ``by`` None: the plugin is removed, which has a record of its own.
        """
        pause = self._pauses.pop(name, None)
        if pause is None:
            return None
        seconds = round(max(0.0, time.time() - pause.since), 3)
        records = [owed(PluginResumed(by=by, seconds=seconds), name)] if by is not None else []

        def forget(db: sqlite3.Connection) -> None:
            db.execute("DELETE FROM pauses WHERE plugin=?", (name,))
            self._debts.note(db, records)

        try:
            await self._store.run(forget)
        except BaseException:
            self._pauses.setdefault(name, pause)
            raise
        self._debts.pay(records)
        return pause
