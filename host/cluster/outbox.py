"""Outbox: events of this host on their way into the log, in the database of the platform's own transaction.

Each event gets the next number of this outbox's generation, which is random. What is sent is on disk; it is sent again
until it has been read back, from the number after the last that the log has. Rows stay for an hour after that: a log
that lost its newest messages in a power cut gets them again.

A database that was put back from an earlier copy knows fewer numbers than the log. It begins another generation, and
its rows that were not read back get numbers of that.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Callable, Sequence
from typing import Final

from pydantic import TypeAdapter

from host.cluster.entries import MAX_ENTRIES, MAX_MESSAGE, MAX_NUMBER, Event, EventRef, Message, Number, Replay
from host.cluster.fold import Applied, Member
from host.database.store import Store as Database
from isolator.errors import IsolatorError

KEEP: Final = 3600.0
"""Seconds, by the log's time, for which rows stay that were read back."""
KEEP_ROWS: Final = 100_000
"""At most so many of them."""
FILL: Final = MAX_MESSAGE - (4 << 10)
"""Bytes of entries in one message."""
_GENERATION_BITS = 52
_ENTRY: TypeAdapter[Event | Replay] = TypeAdapter(Event | Replay)


Renumbered = Callable[[sqlite3.Connection, Sequence[tuple[EventRef, EventRef]]], None]


class OutboxFullError(IsolatorError):
    """The outbox holds as much as it may: the log has taken nothing for long."""


class Outbox:
    """The outbox of one database. ``limit``: bytes of events that were not read back yet."""

    def __init__(self, database: Database, host: str, limit: int, random: Callable[[int], int]) -> None:
        self._database, self._host, self._limit, self._random = database, host, limit, random
        self.generation = 0
        self.renumbered: Renumbered = lambda _, __: None
        """Told in its transaction of events that were accepted and get other numbers."""

    def new_generation(self) -> int:
        """A random number for a generation."""
        return self._random(_GENERATION_BITS) | 1

    def open(self, db: sqlite3.Connection) -> None:
        """Take the outbox up; if this host has another name than before, in another generation."""
        name, self.generation = db.execute("SELECT host, generation FROM cluster_self").fetchone()
        if name != self._host:
            db.execute("UPDATE cluster_self SET host=?", (self._host,))
            self.renew(db)

    def put(self, db: sqlite3.Connection, entry: Event | Replay) -> EventRef:
        """Number an entry, in the caller's transaction; raises OutboxFullError before anything is written.

        Should the database turn out to be an earlier copy, the entry reaches the log under another number.
        """
        text = _ENTRY.dump_json(entry).decode()
        size = len(text.encode())
        if size > FILL:
            raise IsolatorError("the event", f"has {size} bytes with its attributes", f"at most {FILL} fit a cluster")
        generation, last, unsent = db.execute("SELECT generation, emitted, unsent FROM cluster_self").fetchone()
        if unsent + size > self._limit:
            why = f"is full: {unsent >> 20} MiB of events wait for the log, which has not taken them"
            remedy = "see 'isolator cluster status'; [cluster] outbox in host.toml sets how many may wait"
            raise OutboxFullError("the cluster's outbox", why, remedy)
        db.execute("INSERT INTO cluster_outbox VALUES (?,?,NULL)", (last + 1, text))
        db.execute("UPDATE cluster_self SET emitted=?, unsent=?", (last + 1, unsent + size))
        return EventRef(self._host, generation, last + 1)

    def next(
        self, db: sqlite3.Connection, log: Member, end: int = MAX_NUMBER
    ) -> tuple[int, tuple[Event | Replay, ...]]:  # fmt: skip
        """The first number and the entries of the next message, for a log that has this host's events so far.

        Nothing after ``end``. Begins another generation if the numbers that it would need are not here.
        """
        last = self.fit(db, log)
        where = "number>? AND number<=? ORDER BY number LIMIT ?"
        rows = db.execute(f"SELECT entry FROM cluster_outbox WHERE {where}", (last, end, MAX_ENTRIES))
        entries: list[Event | Replay] = []
        size = 0
        for (text,) in rows:
            size += len(text.encode()) + 1
            if size > FILL and entries:
                break
            entries.append(_ENTRY.validate_json(text))
        return last + 1, tuple(entries)

    def message(self, found: tuple[int, tuple[Event | Replay, ...]]) -> Message | None:
        """The message of what ``next`` found, once that is on disk; None: the log has all."""
        first, entries = found
        return Message(self._host, "ev", Number(self.generation, first), entries) if entries else None

    def forget(self, db: sqlite3.Connection) -> None:
        """Drop the rows that the log has: no other log is to get them."""
        db.execute("DELETE FROM cluster_outbox WHERE back IS NOT NULL")

    def fit(self, db: sqlite3.Connection, log: Member) -> int:
        """Begin another generation if the number after the log's is not here to be sent; returns the log's.

        So it does if the log has had another one since: of two copies of a database the later one was put back last.
        """
        if self.is_fit(db, log):
            return self._last(log)
        self.renew(db, MAX_NUMBER if self.generation in log.retired else self._last(log))
        return 0

    def is_fit(self, db: sqlite3.Connection, log: Member) -> bool:
        """Whether this generation can go on behind what the log has."""
        if self.is_earlier_copy(db, log):
            return False
        last = self._last(log)
        first = db.execute("SELECT MIN(number) FROM cluster_outbox WHERE number>?", (last,)).fetchone()[0]
        return first in (None, last + 1)

    def is_earlier_copy(self, db: sqlite3.Connection, log: Member) -> bool:
        """Whether the log has more of this host than its database knows: an earlier copy was put back."""
        return self.generation in log.retired or self._last(log) > self.emitted(db)

    @staticmethod
    def emitted(db: sqlite3.Connection) -> int:
        """The newest number of this generation."""
        return int(db.execute("SELECT emitted FROM cluster_self").fetchone()[0])

    def _last(self, log: Member) -> int:
        return log.events.number if log.events.series == self.generation else 0

    def renew(self, db: sqlite3.Connection, log: int = MAX_NUMBER) -> None:
        """Begin another generation, with the rows that were not read back or that the log, up to ``log``, has lost."""
        before, self.generation = self.generation, self.new_generation()
        rows = "FROM cluster_outbox WHERE back IS NULL OR number>?"
        unsent = db.execute(f"SELECT COALESCE(SUM(LENGTH(CAST(entry AS BLOB))), 0) {rows}", (log,)).fetchone()[0]
        waiting = db.execute(f"SELECT number, entry {rows} ORDER BY number", (log,)).fetchall()
        db.execute("DELETE FROM cluster_outbox")
        db.executemany("INSERT INTO cluster_outbox VALUES (?,?,NULL)", enumerate((row[1] for row in waiting), 1))
        db.execute("UPDATE cluster_self SET generation=?, emitted=?, unsent=?", (self.generation, len(waiting), unsent))
        numbers = [(number, at) for at, (number, _) in enumerate(waiting, 1)]
        name = self._host
        self.renumbered(
            db, [(EventRef(name, before, old), EventRef(name, self.generation, new)) for old, new in numbers]
        )

    def is_own(self, entries: Sequence[Applied]) -> bool:
        """Whether these entries, which stand in the log under this host's name, may be what this outbox has sent."""
        first, last = entries[0].ref, entries[-1].ref
        if first.series != self.generation:
            return True
        where = "number BETWEEN ? AND ?"
        rows = dict(self._database.rows(f"SELECT number, entry FROM cluster_outbox WHERE {where}", (first[2], last[2])))
        return last.number <= self._database.read(self.emitted) and all(
            _ENTRY.validate_json(rows[one.ref.number]) == one.entry for one in entries if one.ref.number in rows
        )

    def waiting(self) -> tuple[int, int]:
        """How many events wait to be read back, and their bytes."""
        count = "SELECT COUNT(*) FROM cluster_outbox WHERE back IS NULL"
        events, size = self._database.row(f"SELECT ({count}), unsent FROM cluster_self")
        return events, size


def read_back(db: sqlite3.Connection, last: int, time: float) -> None:
    """Note that the log has the numbers up to ``last``, at a time of the log; rows of an hour before are dropped."""
    size = db.execute(
        "SELECT COALESCE(SUM(LENGTH(CAST(entry AS BLOB))), 0) FROM cluster_outbox WHERE number<=? AND back IS NULL",
        (last,),
    ).fetchone()[0]
    db.execute("UPDATE cluster_outbox SET back=? WHERE number<=? AND back IS NULL", (time, last))
    db.execute("UPDATE cluster_self SET unsent=unsent-?", (size,))
    db.execute("DELETE FROM cluster_outbox WHERE back<?", (time - KEEP,))
    db.execute("DELETE FROM cluster_outbox WHERE number<=? AND back IS NOT NULL", (last - KEEP_ROWS,))
