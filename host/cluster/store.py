"""The fold of a host in its database: state, dedupe keys and values, written together with what follows from them.

Tables of the cluster are made when it is turned on. The state is kept in rows, of which a message changes few: the
parts of ``State`` are compared by identity, because nothing in them changes in place but a ``Member``.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final

from pydantic import TypeAdapter

from host.cluster.entries import EventRef, EventType, Position, Range
from host.cluster.fold import Freed, Incarnation, Lease, Member, State
from host.database.store import Store as Database
from isolator.errors import IsolatorError

FORMAT: Final = 1
"""Format of these tables. Who raises it raises ``isolator.ipc.formats.TABLES``, too, which a reload's trial knows."""
KEEP: Final = 14 * 86400.0
"""Seconds by the log's time for which a dedupe key is kept: as long as the log keeps its entries."""
_PRUNE_EVERY = 1000
_TABLES = """
CREATE TABLE IF NOT EXISTS cluster_self (
  one INTEGER PRIMARY KEY CHECK (one = 1), format INTEGER NOT NULL, host TEXT NOT NULL, log TEXT NOT NULL,
  session INTEGER NOT NULL, generation INTEGER NOT NULL, emitted INTEGER NOT NULL, unsent INTEGER NOT NULL,
  place INTEGER NOT NULL, time REAL NOT NULL, digest TEXT NOT NULL, mark TEXT NOT NULL
);
CREATE TABLE IF NOT EXISTS cluster_fold (
  part TEXT NOT NULL, key TEXT NOT NULL, value TEXT NOT NULL, PRIMARY KEY (part, key)
) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS cluster_unique (
  name TEXT PRIMARY KEY, host TEXT NOT NULL, series INTEGER NOT NULL, number INTEGER NOT NULL, time REAL NOT NULL
) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS cluster_values (
  plugin TEXT NOT NULL, key TEXT NOT NULL, value TEXT NOT NULL, PRIMARY KEY (plugin, key)
) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS cluster_outbox (
  number INTEGER PRIMARY KEY, entry TEXT NOT NULL, back REAL
);
CREATE INDEX IF NOT EXISTS cluster_outbox_waiting ON cluster_outbox(number) WHERE back IS NULL;
CREATE INDEX IF NOT EXISTS cluster_outbox_back ON cluster_outbox(back) WHERE back IS NOT NULL;
"""
_OF_PARTS: dict[str, TypeAdapter[Any]] = {
    "members": TypeAdapter(Member),
    "plugins": TypeAdapter(Incarnation),
    "leases": TypeAdapter(Lease),
    "freed": TypeAdapter(Freed),
    "positions": TypeAdapter(Position),
    "lost": TypeAdapter(tuple[Range, ...]),
    "types": TypeAdapter(EventType),
}
_BY_SHARD = ("leases", "freed", "positions", "lost")

_OF_THE_FOLD: dict[str, tuple[TypeAdapter[Any], int]] = {
    "fold": (TypeAdapter(list[tuple[str, str, str]]), 3),
    "unique": (TypeAdapter(list[tuple[str, str, int, int, float]]), 5),
    "values": (TypeAdapter(list[tuple[str, str, str]]), 3),
}
"""Tables, each with its rows and the number of its columns."""

Write = Callable[[sqlite3.Connection], None]
"""Something to write, which may run again with the same effect."""


@dataclass(frozen=True, slots=True)
class Kept:
    """This host as its database knows it. ``log`` tells which log it follows; empty before the first.

    ``mark`` is that of the message at the fold's place.
    """

    log: str
    session: int
    mark: str


def make_tables(db: sqlite3.Connection, host: str, generation: int) -> None:
    """Make the cluster's tables, unless they are there; raises IsolatorError for those of a newer version."""
    for statement in _TABLES.split(";"):
        db.execute(statement)
    db.execute(
        "INSERT OR IGNORE INTO cluster_self VALUES (1, ?, ?, '', 0, ?, 0, 0, 0, 0.0, '', '')",
        (FORMAT, host, generation),
    )
    found = db.execute("SELECT format FROM cluster_self").fetchone()[0]
    if found > FORMAT:
        why = f"were written by a newer version (format {found})"
        raise IsolatorError("the cluster's tables", why, "install that version again")


def kept(db: sqlite3.Connection) -> Kept:
    """The database's facts about this host."""
    return Kept(*db.execute("SELECT log, session, mark FROM cluster_self").fetchone())


def keep_log(db: sqlite3.Connection, created: str) -> None:
    """Note which log this host follows."""
    db.execute("UPDATE cluster_self SET log=?", (created,))


class FoldStore:
    """Values of a fold (``host.cluster.fold.Store``), and the state itself, of one database."""

    def __init__(self, database: Database) -> None:
        self._database = database
        self._seen: dict[str, EventRef] = {}
        """Dedupe keys of the message that is being folded."""
        self._writes: list[tuple[str, tuple[Any, ...]]] = []
        self._written: dict[str, dict[Any, Any]] = {part: {} for part in _OF_PARTS}
        """The parts of the state as the database has them."""
        self._folded = 0

    def load(self) -> State:
        """The state up to the place where the database is."""
        state = State(*self._database.row("SELECT place, time, digest FROM cluster_self"))
        for part, key, value in self._database.rows("SELECT * FROM cluster_fold"):
            getattr(state, part)[_key_of(part, key)] = _OF_PARTS[part].validate_json(value)
        self._written = {part: dict(getattr(state, part)) for part in _OF_PARTS}
        return state

    def is_first(self, unique: str, event: EventRef, time: float) -> bool:
        found = self._seen.get(unique)
        if found is None:
            where = "name=? AND time>?"
            row = self._database.row(
                f"SELECT host, series, number FROM cluster_unique WHERE {where}", (unique, time - KEEP)
            )
            found = self._seen[unique] = EventRef(*row) if row is not None else event
            if row is None:
                self._writes.append(
                    ("INSERT OR REPLACE INTO cluster_unique VALUES (?,?,?,?,?)", (unique, *event, time))
                )
        return found == event

    def put(self, plugin: str, key: str, value: str | None) -> None:
        if value is None:
            self._writes.append(("DELETE FROM cluster_values WHERE plugin=? AND key=?", (plugin, key)))
        else:
            self._writes.append(("INSERT OR REPLACE INTO cluster_values VALUES (?,?,?)", (plugin, key, value)))

    def forget(self, plugin: str) -> None:
        self._writes.append(("DELETE FROM cluster_values WHERE plugin=?", (plugin,)))

    def changes(self, state: State, host: str, mark: str) -> Write:
        """Changes by the folding of one message of a host, to be written before the next message is folded."""
        writes, self._writes, self._seen = self._writes, [], {}
        for part, form in _OF_PARTS.items():
            now, before = getattr(state, part), self._written[part]
            for key in [key for key in before if key not in now]:
                writes.append(("DELETE FROM cluster_fold WHERE part=? AND key=?", (part, _text_of(key))))
                del before[key]
            for key, value in now.items():
                if before.get(key) is not value or (part == "members" and key == host):
                    row = (part, _text_of(key), form.dump_json(value).decode())
                    writes.append(("INSERT OR REPLACE INTO cluster_fold VALUES (?,?,?)", row))
                    before[key] = value
        at = (state.place, state.time, state.digest, mark)
        writes.append(("UPDATE cluster_self SET place=?, time=?, digest=?, mark=?", at))
        self._folded += 1
        if self._folded % _PRUNE_EVERY == 0:
            writes.append(("DELETE FROM cluster_unique WHERE time<=?", (state.time - KEEP,)))

        def write(db: sqlite3.Connection) -> None:
            for statement, values in writes:
                db.execute(statement, values)

        return write

    def reset(self, db: sqlite3.Connection) -> None:
        """Empty the fold: the log is to be folded from its beginning. Only in a transaction of its own."""
        for table in ("fold", "unique", "values"):
            db.execute(f"DELETE FROM cluster_{table}")
        db.execute("UPDATE cluster_self SET place=0, time=0.0, digest='', mark=''")


def dump(db: sqlite3.Connection) -> dict[str, Any]:
    """The whole fold, as JSON can have it; ``restore`` takes it back."""
    place, time, digest, mark = db.execute("SELECT place, time, digest, mark FROM cluster_self").fetchone()
    rows = {table: db.execute(f"SELECT * FROM cluster_{table}").fetchall() for table in _OF_THE_FOLD}
    return {"place": place, "time": time, "digest": digest, "mark": mark, **rows}


def size(db: sqlite3.Connection) -> int:
    """Characters of the fold, roughly: values of plugins are as many as their holders write."""
    columns = {"fold": "key || value", "unique": "name", "values": "plugin || key || value"}
    sums = (f"SELECT SUM(LENGTH({one}) + 50) FROM cluster_{table}" for table, one in columns.items())
    return sum(db.execute(one).fetchone()[0] or 0 for one in sums)


def restore(db: sqlite3.Connection, found: dict[str, Any]) -> None:
    """Put another host's fold in the place of this one's; raises ValueError, TypeError, KeyError for what is none."""
    for table, (form, columns) in _OF_THE_FOLD.items():
        rows = form.validate_python(found[table])
        if table == "fold":
            for part, key, value in rows:
                _key_of(part, key)
                _OF_PARTS[part].validate_json(value)
        db.execute(f"DELETE FROM cluster_{table}")
        db.executemany(f"INSERT INTO cluster_{table} VALUES ({','.join('?' * columns)})", rows)
    at = TypeAdapter(tuple[int, float, str, str]).validate_python(
        (found["place"], found["time"], found["digest"], found["mark"]), strict=True
    )
    db.execute("UPDATE cluster_self SET place=?, time=?, digest=?, mark=?", at)


def members_of(db: sqlite3.Connection) -> dict[str, Member]:
    """The hosts, as the database has them."""
    rows = db.execute("SELECT key, value FROM cluster_fold WHERE part='members'").fetchall()
    return {key: _OF_PARTS["members"].validate_json(value) for key, value in rows}


def value_of(db: sqlite3.Connection, plugin: str, key: str) -> str | None:
    """A value that a plugin keeps in the cluster, as far as this host has read the log."""
    row = db.execute("SELECT value FROM cluster_values WHERE plugin=? AND key=?", (plugin, key)).fetchone()
    return row[0] if row is not None else None


def _text_of(key: str | tuple[str, int]) -> str:
    return key if isinstance(key, str) else f"{key[1]} {key[0]}"


def _key_of(part: str, text: str) -> str | tuple[str, int]:
    if part not in _BY_SHARD:
        return text
    number, _, name = text.partition(" ")
    return name, int(number)
