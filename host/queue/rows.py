"""Statements on the queue's tables: change, list, show, prune."""

from __future__ import annotations

import json
import sqlite3
from typing import Any

from host.database import schema
from host.queue.interface import DeliveryRow, Event, EventRow

EVENT_COLUMNS = ("seq", "id", "name", "time", "accepted", "expires", "payload", "subject", "trace")
EVENT = f"SELECT {', '.join(EVENT_COLUMNS)} FROM events"
DELIVERY = (
    "SELECT e.id, e.name, d.plugin, d.state, d.attempts, d.status, d.detail, d.reply, d.latency_us, d.updated, d.due"
    " FROM deliveries d JOIN events e ON e.seq=d.seq"
)
GIVEN_UP = "('dead', 'expired', 'quarantined')"
ENDED = "('ok', 'skipped', 'cancelled', 'moved')"
PENDING = "('queued', 'retry', 'in_flight')"
OUTCOME = (
    "UPDATE deliveries SET state=?, attempts=?, crashes=?, due=?, status=?, detail=?,"
    " reply=coalesce(?, reply), latency_us=coalesce(?, latency_us), updated=? WHERE seq=? AND plugin=?"
)
"""Sets the state of a delivery."""
BEGUN = (
    "UPDATE deliveries SET state='in_flight', attempts=?, due=0, status=NULL, detail=NULL, updated=?"
    " WHERE seq=? AND plugin=?"
)
"""Counts an attempt that begins; with ``OUTCOME`` run most often of all."""
LISTED = 4 << 20
"""Bytes of payloads and replies in one listing: the newest events have them, and all others are listed without."""


def event(db: sqlite3.Connection, where: str, value: object) -> Event | None:
    """An event as dispatch needs it."""
    row = db.execute(f"{EVENT} WHERE {where}", (value,)).fetchone()
    return read_event(row) if row is not None else None


def ids(db: sqlite3.Connection, prefix: str, limit: int) -> list[str]:
    """The first ids of stored events that begin with ``prefix``."""
    found = db.execute(
        "SELECT id FROM events WHERE id >= ? AND id < ? ORDER BY id LIMIT ?", (prefix, prefix + "\U0010ffff", limit)
    ).fetchall()
    return [row[0] for row in found]


def read_event(row: tuple[Any, ...]) -> Event | None:
    """An event from a row of ``EVENT``; None for one that is damaged."""
    event = Event(*row)
    texts = all(isinstance(text, str) for text in (event.id, event.name, event.time, event.payload, event.subject))
    times = isinstance(event.accepted, (int, float)) and isinstance(event.expires, (int, float))
    if not texts or not times or not isinstance(event.trace, str | None):
        return None
    whole = event.payload.startswith("{") and event.payload.endswith("}") and "\n" not in event.payload
    return event if whole else None


def event_row(db: sqlite3.Connection, where: str, value: object, *, whole: bool = True) -> EventRow | None:
    """An event with its deliveries, as listings show it; without payload and replies unless ``whole``."""
    columns = f"seq, id, name, time, accepted, subject, {'payload' if whole else 'NULL'}, by"
    found = db.execute(f"SELECT {columns} FROM events WHERE {where}", (value,)).fetchone()
    if found is None:
        return None
    seq, event_id, name, time, accepted, subject, payload, by = found
    of = DELIVERY if whole else DELIVERY.replace("d.reply", "NULL")
    deliveries = db.execute(f"{of} WHERE d.seq=? ORDER BY d.plugin", (seq,)).fetchall()
    return EventRow(
        event_id, name, time, accepted, subject, _payload(payload), by, tuple(_delivery(row) for row in deliveries),
        size=len(payload or "") + sum(len(row[7] or "") for row in deliveries), cut=not whole,
    )  # fmt: skip


def delivery(db: sqlite3.Connection, event_id: str, plugin: str) -> DeliveryRow | None:
    """One delivery as listings show it."""
    row = db.execute(f"{DELIVERY} WHERE e.id=? AND d.plugin=?", (event_id, plugin)).fetchone()
    return _delivery(row) if row is not None else None


def events(
    db: sqlite3.Connection,
    limit: int,
    name: str | None,
    since: float,
    plugin: str | None,
    state: str | None,
    room: int = LISTED,
) -> list[EventRow]:
    """Events with their deliveries, newest first; with ``plugin`` and ``state`` those with such a delivery.

    Payloads and replies as far as there is ``room`` for them, in bytes.
    """
    such = (
        " AND EXISTS (SELECT 1 FROM deliveries d WHERE d.seq=events.seq"
        " AND (?4 IS NULL OR d.plugin=?4) AND (?5 IS NULL OR d.state=?5))"
    )
    found = db.execute(
        "SELECT seq FROM events WHERE (?1 IS NULL OR name=?1) AND accepted >= ?2"
        f"{such if plugin is not None or state is not None else ''} ORDER BY seq DESC LIMIT ?3",
        (name, since, limit, plugin, state)[: 5 if plugin is not None or state is not None else 3],
    ).fetchall()
    listed = []
    for (seq,) in found:
        row = event_row(db, "seq=?", seq, whole=room > 0)
        if row is not None:
            listed.append(row)
            room -= row.size
    return listed


def dead(db: sqlite3.Connection, plugin: str | None, limit: int) -> list[DeliveryRow]:
    """Deliveries that were given up, newest first; replies of the newest as far as there is room (``LISTED``)."""
    found = db.execute(
        f"{DELIVERY} WHERE d.state IN {GIVEN_UP} AND (? IS NULL OR d.plugin=?) ORDER BY d.seq DESC LIMIT ?",
        (plugin, plugin, limit),
    )
    listed, room = [], LISTED
    for row in found:
        room -= len(row[7] or "")
        listed.append(_delivery(row if room >= 0 else (*row[:7], None, *row[8:])))
    return listed


def end_unfinished(db: sqlite3.Connection, plugin: str, after: int, limit: int) -> list[tuple[int, str, int]]:
    """Delete the first ``limit`` of a plugin's deliveries that are not final, of events behind number ``after``.

    Returns (event's number, its id, attempts so far) of each, in order.
    """
    ended = db.execute(
        "SELECT d.seq, e.id, d.attempts FROM deliveries d JOIN events e ON e.seq=d.seq"
        f" WHERE d.plugin=? AND d.seq>? AND d.state NOT IN {GIVEN_UP} AND d.state NOT IN {ENDED}"
        " ORDER BY d.seq LIMIT ?",
        (plugin, after, limit),
    ).fetchall()
    db.executemany("DELETE FROM deliveries WHERE seq=? AND plugin=?", [(seq, plugin) for seq, _, _ in ended])
    return ended


def waiting(db: sqlite3.Connection, name: str) -> int:
    """Number of the deliveries of one event type that are not final."""
    count: int = db.execute(
        "SELECT count(*) FROM deliveries d JOIN events e ON e.seq=d.seq"
        f" WHERE e.name=? AND d.state NOT IN {GIVEN_UP} AND d.state NOT IN {ENDED}",
        (name,),
    ).fetchone()[0]
    return count


def replay(
    db: sqlite3.Connection, seq: int, plugin: str | None, now: float, expires: float
) -> list[tuple[str, str | None, int]]:
    """Queue an event's deliveries again that were given up, with ``plugin`` also one that has ended there.

    (plugin, key, attempts before) of each; the event expires at the Unix time ``expires`` at the earliest.
    """
    states = GIVEN_UP if plugin is None else "('dead', 'expired', 'quarantined', 'ok', 'skipped', 'cancelled')"
    found = db.execute(
        f"SELECT plugin, key, attempts FROM deliveries WHERE seq=? AND state IN {states} AND (? IS NULL OR plugin=?)",
        (seq, plugin, plugin),
    ).fetchall()
    db.executemany(
        "UPDATE deliveries SET state='queued', attempts=0, crashes=0, due=0, detail='replayed', updated=?"
        " WHERE seq=? AND plugin=?",
        [(now, seq, name) for name, _, _ in found],
    )
    db.execute("UPDATE events SET expires=max(expires, ?) WHERE seq=?", (expires, seq))
    return found


def pending(db: sqlite3.Connection) -> list[tuple[Any, ...]]:
    """The deliveries that are not final, as ``SqliteQueue`` takes them up at its start, in the order of their events.

    (number, plugin, key, attempts, crashes, due, expires, state).
    """
    return db.execute(
        "SELECT d.seq, d.plugin, d.key, d.attempts, d.crashes, d.due, e.expires, d.state FROM deliveries d"
        f" JOIN events e ON e.seq=d.seq WHERE d.state IN {PENDING} ORDER BY d.seq"
    ).fetchall()


def newest_number(db: sqlite3.Connection) -> int:
    """Number of the newest event in the database, which is never pruned; 0 if there is none."""
    return int(db.execute("SELECT coalesce(max(seq), 0) FROM events").fetchone()[0])


def prune(
    db: sqlite3.Connection, oldest: int, before: float, keep_dead: int, pruned: int, needed: int | None = None
) -> int:
    """Drop finished deliveries older than event number ``oldest`` or Unix time ``before``; bound the dead letters.

    Events from number ``needed`` on stay. ``pruned`` is the previous call's result. At most 4000 further events a call
    and no scan of those that stay, so that a call stays short.
    """
    first_kept = db.execute("SELECT seq FROM events WHERE accepted >= ? ORDER BY seq LIMIT 1", (before,)).fetchone()
    start: int = max(pruned, db.execute("SELECT coalesce(min(seq), 0) FROM events").fetchone()[0])
    below: int = min(max(oldest, first_kept[0] if first_kept is not None else oldest), start + 4000)
    below = below if needed is None else min(below, needed)
    db.execute(f"DELETE FROM deliveries WHERE seq < ? AND state IN {ENDED}", (below,))
    for (plugin,) in db.execute(f"SELECT DISTINCT plugin FROM deliveries WHERE {schema.GIVEN_UP}").fetchall():
        last = db.execute(
            f"SELECT seq FROM deliveries WHERE plugin=? AND {schema.GIVEN_UP} ORDER BY seq DESC LIMIT 1 OFFSET ?",
            (plugin, keep_dead),
        ).fetchone()
        if last is not None:
            db.execute(f"DELETE FROM deliveries WHERE plugin=? AND {schema.GIVEN_UP} AND seq<=?", (plugin, last[0]))
    db.execute(
        "DELETE FROM events WHERE seq < ? AND seq < (SELECT max(seq) FROM events)"
        " AND NOT EXISTS (SELECT 1 FROM deliveries d WHERE d.seq=events.seq)",
        (below,),
    )
    return max(below, pruned)


def _payload(text: object) -> dict[str, Any]:
    """A payload as listings show it; empty when it is damaged."""
    try:
        found = json.loads(text) if isinstance(text, str) else None
    except (ValueError, RecursionError):
        found = None
    return found if isinstance(found, dict) else {}


def _delivery(row: tuple[Any, ...]) -> DeliveryRow:
    event_id, name, plugin, state, attempts, status, detail, reply, latency, updated, due = row
    return DeliveryRow(
        event_id,
        name,
        plugin,
        state,
        attempts,
        status,
        detail,
        reply,
        latency,
        updated,
        due if state == "retry" and due else None,
    )
