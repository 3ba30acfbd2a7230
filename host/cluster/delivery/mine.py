"""Whose the plugins of this host are that the fold does not know, as long as this host has them.

One that was here before the host had a cluster is the host's own, from when the log was read to its end without it. One
that was the cluster's, and that a command on another host has ended while this one was away, is nobody's: it acts no
more. Of any other nobody knows: it acts once the log says whose it is.
"""

from __future__ import annotations

import sqlite3
from typing import Final

from host.database.store import Store

_TABLE: Final = "CREATE TABLE IF NOT EXISTS {} (plugin TEXT PRIMARY KEY) WITHOUT ROWID"


class Names:
    """Names of plugins, in a table of this host's database."""

    def __init__(self, store: Store, table: str) -> None:
        self._store, self._table = store, table
        store.make(_TABLE.format(table))
        self._names = {name for (name,) in store.rows(f"SELECT plugin FROM {table}")}

    def __contains__(self, plugin: str) -> bool:
        return plugin in self._names

    def add(self, plugin: str) -> None:
        if plugin not in self._names:
            self._names.add(plugin)
            self._store.submit(lambda db: db.execute(f"INSERT OR IGNORE INTO {self._table} VALUES (?)", (plugin,)))

    def discard(self, plugin: str) -> None:
        if plugin in self._names:
            self._names.discard(plugin)
            self._store.submit(lambda db: db.execute(f"DELETE FROM {self._table} WHERE plugin=?", (plugin,)))

    def clear(self, db: sqlite3.Connection) -> None:
        """Forget all of them. Safe to repeat."""
        self._names.clear()
        db.execute(f"DELETE FROM {self._table}")
