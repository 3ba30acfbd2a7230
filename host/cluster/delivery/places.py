"""Events of the log that counted, each with its place, in the database of every host.

Every host keeps every event, so that a plugin that moves here finds what it has to go on with. An event of this host
is there from its emission, without a place until it was read back. A wish to repeat a delivery has its place, too.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Final, NamedTuple

from host.cluster.delivery import cloudevent, unread
from host.cluster.entries import MAX_NUMBER, Claim, Ended, EventRef, Plugin, Position, Range, Replay
from host.cluster.entries import Event as LogEvent
from host.cluster.fold import Applied, Member, Shard, State
from host.cluster.placement import shard_of
from host.cluster.store import members_of
from host.database.store import Store
from host.queue import rows
from host.queue.interface import Event, Subscriber
from host.queue.sqlite import REPLAY_TTL

Place = tuple[int, int]
"""The place of a message, and the number of an entry in it."""
BEGIN: Final[Place] = (0, 0)
END: Final = MAX_NUMBER
"""A number after those of every entry of a message."""
GIVEN_UP: Final = frozenset({"dead", "expired", "quarantined", "cancelled"})
"""States that a holder may tell the others of."""
BATCH: Final = 256
"""Events that a cursor reads from the database at a time."""
Subscriptions = Callable[[Event], Mapping[str, Subscriber]]
"""The subscribers of an event on this host, by plugin; none of an event that is not valid here."""

_TABLES = """
CREATE TABLE IF NOT EXISTS cluster_events (
  host TEXT NOT NULL, series INTEGER NOT NULL, number INTEGER NOT NULL, place INTEGER, seq INTEGER, plugin TEXT,
  PRIMARY KEY (host, series, number)
) WITHOUT ROWID;
CREATE INDEX IF NOT EXISTS cluster_events_place ON cluster_events(place, number);
CREATE INDEX IF NOT EXISTS cluster_events_seq ON cluster_events(seq);
CREATE TABLE IF NOT EXISTS cluster_held (
  plugin TEXT NOT NULL, shard INTEGER NOT NULL, epoch INTEGER NOT NULL, PRIMARY KEY (plugin, shard)
) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS cluster_read (plugin TEXT PRIMARY KEY, place INTEGER NOT NULL, number INTEGER NOT NULL);
CREATE TRIGGER IF NOT EXISTS cluster_pruned AFTER DELETE ON events
  BEGIN DELETE FROM cluster_events WHERE seq=OLD.seq; END;
"""
_COLUMNS = ", ".join(f"e.{name}" for name in rows.EVENT_COLUMNS)
_READ = f"SELECT c.host, c.series, c.number, c.place, c.plugin, {_COLUMNS} FROM cluster_events c"


class Local(NamedTuple):
    """A delivery as it stands in this host's database."""

    state: str
    attempts: int
    crashes: int
    due: float


@dataclass(slots=True)
class Read:
    """An event that counted; ``event`` is None if it is no longer here.

    ``plugin``: it is the wish to repeat ``of`` there; else ``of`` is itself.
    """

    ref: EventRef
    at: Place
    event: Event | None
    of: EventRef
    plugin: str | None = None
    _subscribers: Mapping[str, Subscriber] | None = field(default=None, repr=False)

    def subscribers(self, subscriptions: Subscriptions) -> Mapping[str, Subscriber]:
        """The subscribers of the event on this host, by plugin."""
        if self._subscribers is None:
            self._subscribers = subscriptions(self.event) if self.event is not None else {}
        return self._subscribers


def shard_of_event(event_id: str, key: str | None, shards: int) -> int:
    """The shard of a plugin that an event with this order key belongs to."""
    return shard_of(key if key is not None else event_id, shards) if shards > 1 else 0


def is_later(member: Member, ref: EventRef, last: EventRef) -> bool:
    """Whether an event of a host comes after its last that was read."""
    return ref.number > last.number if ref.series == last.series else ref.series in later_series(member, last)


def later_series(member: Member, ref: EventRef) -> tuple[int, ...]:
    """The outboxes of a host that came after an event's."""
    known = (*member.retired, member.events.series)
    return known[known.index(ref.series) + 1 :] if ref.series in known else known


class Places:
    """The events that counted, in one host's database."""

    def __init__(self, store: Store, host: str, number: Callable[[], int]) -> None:
        self._store, self._host, self._number = store, host, number
        store.make(_TABLES + unread.TABLES)
        self.fold: Callable[[], State] = State
        """The fold's state; what a message means is asked once it is folded."""

    @property
    def state(self) -> State:
        """The fold's state."""
        return self.fold()

    # Written in the transaction of the fold, or of an emission

    @staticmethod
    def expect(db: sqlite3.Connection, ref: EventRef, seq: int) -> None:
        """Keep that an event of this host has a number in the log."""
        db.execute("INSERT INTO cluster_events (host, series, number, seq) VALUES (?,?,?,?)", (*ref, seq))

    @staticmethod
    def renumbered(db: sqlite3.Connection, events: Iterable[tuple[EventRef, EventRef]]) -> None:
        """Expect events of this host under other numbers than when they were accepted."""
        rows = [(*new[1:], *old) for old, new in events]
        where = "host=? AND series=? AND number=? AND place IS NULL"
        db.executemany(f"UPDATE cluster_events SET series=?, number=? WHERE {where}", rows)

    def apply(self, db: sqlite3.Connection, place: int, time: float, entries: Iterable[Applied]) -> None:
        """Write what a message means for the queue's tables."""
        for one in entries:
            match one.entry:
                case LogEvent() if not one.void:
                    self._place(db, one.ref, place, time, one.entry)
                case LogEvent() if one.void == "accepted before":
                    db.execute("DELETE FROM cluster_events WHERE host=? AND series=? AND number=?", one.ref)
                case Replay() if not one.void:
                    self._repeat(db, one.ref, place, time, one.entry)
                case Ended() if not one.void and one.ref.host != self._host:
                    self._end(db, one.entry, time)
                case Plugin(removed=True) if not one.void:
                    self._end_all(db, one.entry.name, time)
                case Claim() if not one.void and one.ref.host != self._host:
                    self._move(db, one.entry, time)

    def _place(self, db: sqlite3.Connection, ref: EventRef, place: int, time: float, entry: LogEvent) -> None:
        where = (place, *ref)
        if db.execute("UPDATE cluster_events SET place=? WHERE host=? AND series=? AND number=?", where).rowcount:
            return
        try:
            seq = self._keep(db, ref.host, cloudevent.read(entry.cloudevent), time, entry.unique or None)
        except ValueError:
            seq = None  # nobody can deliver it
        db.execute("INSERT INTO cluster_events VALUES (?,?,?,?,?,NULL)", (*ref, place, seq))

    def _keep(
        self, db: sqlite3.Connection, host: str, new: cloudevent.Emitted, time: float, unique: str | None
    ) -> int | None:
        """Keep the event of a host; returns its number here, None for one whose id another event has."""
        found = db.execute("SELECT seq, dedupe_key FROM events WHERE id=?", (new.id,)).fetchone()
        if found is None:
            seq = self._number()
            row = (seq, new.id, new.name, new.time, time, new.expires, new.subject, new.payload)
            db.execute("UPDATE events SET dedupe_key=NULL WHERE dedupe_key=?", (unique,))
            db.execute("INSERT INTO events VALUES (?,?,?,?,?,?,?,?,?,?,?)", (*row, unique, new.trace, new.by))
            return seq
        seq = int(found[0])
        known = db.execute("SELECT place, host FROM cluster_events WHERE seq=? AND plugin IS NULL", (seq,)).fetchone()
        if known is None or known[0] is not None or (known[1] != host and (unique is None or found[1] != unique)):
            return None
        # Its sender has numbered it anew; or it was emitted here, too, and all hosts deliver the one that comes first.
        db.execute("UPDATE events SET payload=?, expires=? WHERE seq=?", (new.payload, new.expires, seq))
        db.execute("DELETE FROM cluster_events WHERE seq=?", (seq,))
        return seq

    def _repeat(self, db: sqlite3.Connection, ref: EventRef, place: int, time: float, entry: Replay) -> None:
        seq = self.seq_of(db, entry.event)
        db.execute("INSERT OR REPLACE INTO cluster_events VALUES (?,?,?,?,?,?)", (*ref, place, seq, entry.plugin))
        given_up = f"UPDATE deliveries SET state='moved' WHERE seq=? AND plugin=? AND state IN {rows.GIVEN_UP}"
        db.execute(given_up, (seq, entry.plugin))
        db.execute("UPDATE events SET expires=max(expires, ?) WHERE seq=?", (time + REPLAY_TTL, seq))

    def _end(self, db: sqlite3.Connection, ended: Ended, time: float) -> None:
        seq = self.seq_of(db, ended.event)
        if seq is not None and ended.state in GIVEN_UP:
            row = (seq, ended.plugin, ended.state, ended.why, time)
            db.execute(
                "INSERT INTO deliveries (seq, plugin, state, detail, updated) VALUES (?,?,?,?,?) ON CONFLICT"
                " DO UPDATE SET state=excluded.state, detail=excluded.detail, updated=excluded.updated",
                row,
            )

    def _move(self, db: sqlite3.Connection, claim: Claim, time: float) -> None:
        """End what this host has left of a shard, as before a restart; what its lanes have is ended by the cursor."""
        known = self.state.plugins.get(claim.plugin)
        if known is None:
            return  # the same message has removed it since, which ends everything
        left = db.execute(
            f"SELECT d.seq, d.key, e.id FROM deliveries d JOIN events e ON e.seq=d.seq"
            f" WHERE d.plugin=? AND d.state IN {rows.PENDING}",
            (claim.plugin,),
        ).fetchall()
        moved = [
            (time, seq, claim.plugin)
            for seq, key, name in left
            if shard_of_event(name, key, known.plugin.shards) == claim.shard
        ]
        db.executemany("UPDATE deliveries SET state='moved', due=0, updated=? WHERE seq=? AND plugin=?", moved)

    @staticmethod
    def _end_all(db: sqlite3.Connection, plugin: str, time: float) -> None:
        """End what this host has left of a plugin that the cluster has no more."""
        where = f"plugin=? AND state IN {rows.PENDING}"
        db.execute(f"UPDATE deliveries SET state='moved', due=0, updated=? WHERE {where}", (time, plugin))

    @staticmethod
    def again(db: sqlite3.Connection) -> None:
        """Forget every place: the log is read anew, from its beginning."""
        db.execute("DELETE FROM cluster_events WHERE plugin IS NOT NULL")
        db.execute("UPDATE cluster_events SET place=NULL")
        db.execute("UPDATE cluster_read SET place=0, number=0")
        db.execute("DELETE FROM cluster_unread")

    @staticmethod
    def adopted(db: sqlite3.Connection, before: State) -> None:
        """Keep what this host has not read: the fold is a copy from a later place than ``before``."""
        place = db.execute("SELECT place FROM cluster_self").fetchone()[0]
        unread.note(db, before, members_of(db), place)

    def lacking(self, names: Iterable[str]) -> dict[str, list[Range]]:
        """The events with which a holder of a plugin goes on and which this host does not have, by plugin, if any."""

        def query(db: sqlite3.Connection) -> dict[str, list[Range]]:
            if db.execute("SELECT 1 FROM cluster_unread LIMIT 1").fetchone() is None:
                return {}
            return {name: found for name in names if (found := self._lacking(db, name))}

        return self._store.read(query)

    def _lacking(self, db: sqlite3.Connection, name: str) -> list[Range]:
        known = self.state.plugins[name]
        found = unread.since(db, known)
        if not found:
            return []
        lacking: set[Range] = set()
        for shard in range(known.plugin.shards):
            position = self.state.position((name, shard))
            lacking.update(self.unread(found, position))
            opened = (one.event for one in position.open)
            lacking.update(unread.ranges(ref for ref in opened if self.seq_of(db, ref) is None))
        return sorted(lacking)

    def unread(self, found: Iterable[Range], position: Position) -> list[Range]:
        """Events that this host has never read, and with which a position goes on."""
        read = {ref.host: ref for ref in position.read}
        rest = (unread.rest(self.state, one, read) for one in found)
        return [one for one in rest if one is not None]

    def own(self, plugin: str) -> Place | None:
        """How far this host has read for a plugin of which every host has its own copy."""
        found = self._store.row("SELECT place, number FROM cluster_read WHERE plugin=?", (plugin,))
        return (found[0], found[1]) if found is not None else None

    def begin_own(self, plugin: str, at: Place) -> None:
        """Keep how far that is; nothing has to have been read to miss what comes."""
        row = (plugin, *at)
        self._store.submit(lambda db: db.execute("INSERT OR IGNORE INTO cluster_read VALUES (?,?,?)", row))

    def seq_of(self, db: sqlite3.Connection, ref: EventRef) -> int | None:
        """This host's number of an event, if it has it."""
        return self._of(db, "seq", ref)

    @staticmethod
    def _of(db: sqlite3.Connection, column: str, ref: EventRef) -> int | None:
        where = f"SELECT {column} FROM cluster_events WHERE host=? AND series=? AND number=?"
        found = db.execute(where, ref).fetchone()
        return found[0] if found is not None else None

    # Read

    def at(self, place: int) -> list[Read]:
        """The events of one message."""
        return self._reads("LEFT JOIN events e ON e.seq=c.seq WHERE c.place=? ORDER BY c.number", (place,))

    def after(self, at: Place) -> list[Read]:
        """The next events after a place, at most ``BATCH``."""
        where = "LEFT JOIN events e ON e.seq=c.seq WHERE (c.place, c.number) > (?,?) ORDER BY c.place, c.number LIMIT ?"
        return self._reads(where, (*at, BATCH))

    def of(self, refs: Iterable[EventRef]) -> list[Read]:
        """Those of these events that are here, in the log's order."""
        where = "LEFT JOIN events e ON e.seq=c.seq WHERE c.host=? AND c.series=? AND c.number=?"
        return sorted((read for ref in refs for read in self._reads(where, ref)), key=lambda read: read.at)

    @staticmethod
    def ref_of(db: sqlite3.Connection, seq: int) -> EventRef | None:
        """The number in the log of an event of this host's number."""
        where = "SELECT host, series, number FROM cluster_events WHERE seq=? AND plugin IS NULL"
        found = db.execute(where, (seq,)).fetchone()
        return EventRef(*found) if found is not None else None

    def standing(self, event_id: str) -> tuple[Event, EventRef | None, Place | None] | None:
        """A stored event, with its number in the log and its place there, as far as it has them."""

        def query(db: sqlite3.Connection) -> tuple[Event, EventRef | None, Place | None] | None:
            event = rows.event(db, "id=?", event_id)
            if event is None:
                return None
            where = "SELECT host, series, number, place FROM cluster_events WHERE seq=? AND plugin IS NULL"
            found = db.execute(where, (event.seq,)).fetchone()
            if found is None:
                return event, None, None
            return event, EventRef(*found[:3]), (found[3], found[2]) if found[3] is not None else None

        return self._store.read(query)

    def left(self, plugin: str) -> list[tuple[Subscriber, Event, Local]]:
        """This host's deliveries to a plugin that are not final, in the log's order; those without a place are last."""
        found = self._store.rows(
            f"SELECT d.key, d.state, d.attempts, d.crashes, d.due, {_COLUMNS} FROM deliveries d"
            " JOIN events e ON e.seq=d.seq LEFT JOIN cluster_events c ON c.seq=d.seq AND c.plugin IS NULL"
            f" WHERE d.plugin=? AND d.state IN {rows.PENDING} ORDER BY c.place IS NULL, c.place, c.number, d.seq",
            (plugin,),
        )
        return [
            (Subscriber(plugin, key), event, Local(*local))
            for key, *local, event in ((*row[:5], rows.read_event(row[5:])) for row in found)
            if event is not None
        ]

    def begin(self, db: sqlite3.Connection, read: Mapping[str, EventRef], began: int) -> Place:
        """The place after which stands whatever is later than what was ``read`` of each host, and than ``began``."""
        places = []
        for host, member in self.state.members.items():
            last = read.get(host)
            wanted: list[tuple[str, tuple[int, ...]]] = [("place > ?", (began,))]
            if last is not None:
                wanted = [("series=? AND number > ?", last[1:])]
                wanted += [("series=?", (series,)) for series in later_series(member, last)]
            for where, values in wanted:
                found = db.execute(f"SELECT min(place) FROM cluster_events WHERE host=? AND {where}", (host, *values))
                places.append(found.fetchone()[0])
        first = min((place for place in places if place is not None), default=self.state.place + 1)
        return (max(first, began + 1), 0)

    def needed(self, db: sqlite3.Connection, now: float) -> int | None:
        """The number of the first event that a plugin of any host is not through with and that has not expired."""
        floors = [place for (place,) in db.execute("SELECT place FROM cluster_read")]
        for name, known in self.state.plugins.items():
            if known.plugin.placement != "one":
                continue
            for shard in range(known.plugin.shards):
                position = self.state.position((name, shard))
                read = {ref.host: ref for ref in position.read}
                floors.append(self.begin(db, read, known.began)[0])
                opened = (self._of(db, "place", one.event) for one in position.open)
                floors += [place for place in opened if place is not None]
        found = db.execute(
            "SELECT min(e.seq) FROM cluster_events c JOIN events e ON e.seq=c.seq"
            " WHERE (c.place >= ? OR c.place IS NULL) AND e.expires > ?",
            (min(floors, default=self.state.place + 1), now),
        ).fetchone()[0]
        return int(found) if found is not None else None

    def held_before(self, shard: Shard) -> int | None:
        """The epoch in which this host held a shard last."""
        found = self._store.row("SELECT epoch FROM cluster_held WHERE plugin=? AND shard=?", shard)
        return found[0] if found is not None else None

    def hold(self, shard: Shard, epoch: int) -> None:
        """Keep the epoch in which this host holds a shard."""
        self._store.submit(lambda db: db.execute("INSERT OR REPLACE INTO cluster_held VALUES (?,?,?)", (*shard, epoch)))

    def local(self, plugin: str, refs: Iterable[EventRef], after: Place | None) -> dict[int, Local]:
        """This host's deliveries to a plugin, by the event's number: of these events, and of those after a place."""
        select = "SELECT d.seq, d.state, d.attempts, d.crashes, d.due"
        select += " FROM deliveries d JOIN cluster_events c ON c.seq=d.seq AND c.plugin IS NULL"

        def query(db: sqlite3.Connection) -> list[tuple[int, str, int, int, float]]:
            where = f"{select} WHERE d.plugin=? AND c.host=? AND c.series=? AND c.number=?"
            found = [row for ref in refs for row in db.execute(where, (plugin, *ref))]
            later = f"{select} WHERE d.plugin=? AND (c.place, c.number) > (?,?)"
            return found + (db.execute(later, (plugin, *after)).fetchall() if after is not None else [])

        found = self._store.read(query)
        return {seq: Local(state, attempts, crashes, due) for seq, state, attempts, crashes, due in found}

    def _reads(self, where: str, values: tuple[object, ...]) -> list[Read]:
        def query(db: sqlite3.Connection) -> list[Read]:
            reads = []
            for host, series, number, place, plugin, *event in db.execute(f"{_READ} {where}", values).fetchall():
                stored = rows.read_event(tuple(event)) if event[0] is not None else None
                ref = EventRef(host, series, number)
                of = self.ref_of(db, stored.seq) if plugin is not None and stored is not None else ref
                reads.append(Read(ref, (place or 0, number), stored, of or ref, plugin))
            return reads

        return self._store.read(query)
