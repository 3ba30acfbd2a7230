"""Approved tools of each server, in the host's database: exactly as they were shown to the operator who agreed."""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Callable

from host.database.store import Store
from host.mcp.tools import Item

_TABLE = """CREATE TABLE IF NOT EXISTS mcp_pins (
  plugin TEXT NOT NULL, position INTEGER NOT NULL, name TEXT NOT NULL, body TEXT NOT NULL, PRIMARY KEY (plugin, name)
) WITHOUT ROWID"""


class Pins:
    """The approved items by plugin."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._known: dict[str, tuple[Item, ...]] = {}

    def of(self, plugin: str) -> tuple[Item, ...]:
        """The approved items of a plugin, in the order in which they were approved."""
        if plugin not in self._known:
            self._known[plugin] = self._store.read(lambda db: _read(db, plugin))
        return self._known[plugin]

    async def approve(
        self, plugin: str, items: tuple[Item, ...], beside: Callable[[sqlite3.Connection], object] = lambda _: None
    ) -> None:
        """Approve these items and no others; ``beside`` is written in the same transaction, which may run again."""
        rows = [(plugin, number, item.name, json.dumps(dict(item.body))) for number, item in enumerate(items)]

        def write(db: sqlite3.Connection) -> None:
            db.execute(_TABLE)
            db.execute("DELETE FROM mcp_pins WHERE plugin=?", (plugin,))
            db.executemany("INSERT INTO mcp_pins VALUES (?,?,?,?)", rows)
            beside(db)

        await self._store.run(write)
        self._known[plugin] = items

    def forget(self, plugin: str) -> None:
        """Know nothing more of a plugin that was removed."""
        self._known.pop(plugin, None)


def _read(db: sqlite3.Connection, plugin: str) -> tuple[Item, ...]:
    if not db.execute("SELECT 1 FROM sqlite_master WHERE name='mcp_pins'").fetchone():
        return ()
    rows = db.execute("SELECT name, body FROM mcp_pins WHERE plugin=? ORDER BY position", (plugin,)).fetchall()
    return tuple(Item(name, json.loads(body)) for name, body in rows)
