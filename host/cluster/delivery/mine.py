"""Plugins of this host that are the cluster's, as long as this host has them.

A plugin that the cluster does not know is its host's own, if it was added before the host had a cluster. One that was
the cluster's, and that a command on another host has ended while this one was away, is nobody's: it acts no more.
"""

from __future__ import annotations

import sqlite3
from typing import Final

from host.database.store import Store

_TABLE: Final = "CREATE TABLE IF NOT EXISTS cluster_mine (plugin TEXT PRIMARY KEY) WITHOUT ROWID"


class Mine:
    """Their names, in this host's database."""

    def __init__(self, store: Store) -> None:
        self._store = store
        store.read(lambda db: db.execute(_TABLE))
        rows = store.read(lambda db: db.execute("SELECT plugin FROM cluster_mine").fetchall())
        self._names = {name for (name,) in rows}

    def __contains__(self, plugin: str) -> bool:
        return plugin in self._names

    def add(self, plugin: str) -> None:
        """Note that a plugin is the cluster's."""
        if plugin not in self._names:
            self._names.add(plugin)
            self._store.submit(lambda db: db.execute("INSERT OR IGNORE INTO cluster_mine VALUES (?)", (plugin,)))

    def discard(self, plugin: str) -> None:
        """Forget a plugin that this host has no more."""
        if plugin in self._names:
            self._names.discard(plugin)
            self._store.submit(lambda db: db.execute("DELETE FROM cluster_mine WHERE plugin=?", (plugin,)))

    def left(self, db: sqlite3.Connection) -> None:
        """Have all of them be this host's own: it leaves the cluster. Safe to repeat."""
        self._names.clear()
        db.execute("DELETE FROM cluster_mine")
