"""Events of the log that this host has never read: they were trimmed off before, and the fold came as a copy.

Other hosts may have them, so a host that lacks what waits for a plugin does not claim it. What is gone for a plugin
that this host serves all the same is a loss: it is kept in the transaction that finds it, and told afterwards.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Iterable, Mapping
from typing import Final, NamedTuple

from host.cluster.entries import MAX_LOST, MAX_NUMBER, EventRef, Range
from host.cluster.fold import Incarnation, Member, State

TABLES: Final = """
CREATE TABLE IF NOT EXISTS cluster_unread (
  host TEXT NOT NULL, series INTEGER NOT NULL, first INTEGER NOT NULL, last INTEGER NOT NULL, until INTEGER NOT NULL,
  PRIMARY KEY (host, series, first)
) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS cluster_losses (
  plugin TEXT NOT NULL, host TEXT NOT NULL, series INTEGER NOT NULL, first INTEGER NOT NULL, last INTEGER NOT NULL,
  why TEXT NOT NULL, PRIMARY KEY (plugin, host, series, first)
) WITHOUT ROWID;
"""
UNREAD: Final = "the log was trimmed before this host had read them"
GONE: Final = "they are not on this host any more, and not in the log"
MOST: Final = 64
"""Ranges of one loss."""


class Loss(NamedTuple):
    """Events that a plugin on this host never got, and that this host cannot deliver; ``why`` in a few words."""

    plugin: str
    range: Range
    why: str


def note(db: sqlite3.Connection, before: State, after: Mapping[str, Member], place: int) -> None:
    """Keep which events stand between this host's fold and a copy of that at ``place``, which takes its place.

    What plugins of which this host has its own copy had not read of them is lost to these.
    """
    found = list(_between(before, after))
    db.executemany("INSERT OR REPLACE INTO cluster_unread VALUES (?,?,?,?,?)", [(*one, place) for one in found])
    if before.place:
        for (plugin,) in db.execute("SELECT plugin FROM cluster_read").fetchall():
            lose(db, plugin, bounded(found), UNREAD)


def _between(before: State, after: Mapping[str, Member]) -> Iterable[Range]:
    for host, member in after.items():
        known = before.member(host)
        last = known.events
        if member.events == last:
            continue
        for series in (*member.retired, member.events.series):
            if series in known.retired:
                continue
            first = last.number + 1 if series == last.series else 1
            end = member.events.number if series == member.events.series else MAX_NUMBER
            if first <= end:
                yield Range(host, series, first, end)


def since(db: sqlite3.Connection, known: Incarnation) -> list[Range]:
    """The events since a plugin began that this host has never read."""
    rows = db.execute("SELECT host, series, first, last FROM cluster_unread WHERE until > ?", (known.began,))
    return [Range(*row) for row in rows]


def rest(state: State, one: Range, read: Mapping[str, EventRef]) -> Range | None:
    """The part of such events that comes after what was ``read`` of each host; None: there is none."""
    last = read.get(one.host)
    if last is None:
        return one
    if last.series == one.series:
        left = one._replace(first=max(one.first, last.number + 1))
        return left if left.first <= left.last else None
    member = state.member(one.host)
    order = (*member.retired, member.events.series)
    is_earlier = one.series in order and last.series in order and order.index(one.series) < order.index(last.series)
    return None if is_earlier else one


def ranges(refs: Iterable[EventRef]) -> list[Range]:
    """Events as ranges of numbers."""
    found: list[Range] = []
    for ref in sorted(refs):
        if found and found[-1][:2] == ref[:2] and found[-1].last + 1 == ref.number:
            found[-1] = found[-1]._replace(last=ref.number)
        else:
            found.append(Range(*ref, ref.number))
    return found


def lose(db: sqlite3.Connection, plugin: str, lost: Iterable[Range], why: str) -> None:
    """Keep that events are lost to a plugin, until that was told."""
    rows = [(plugin, *one, why) for one in lost]
    db.executemany("INSERT OR REPLACE INTO cluster_losses VALUES (?,?,?,?,?,?)", rows)


def bounded(some: Iterable[Range]) -> list[Range]:
    """Ranges, or, if they are too many, one of each sender's numbers, as far as two of these lists fit one entry.

    Whoever wrote them may be hostile.
    """
    found = list(some)
    if len(found) <= MOST:
        return found
    whole: dict[tuple[str, int], Range] = {}
    for one in found:
        known = whole.get(one[:2], one)
        whole[one[:2]] = one._replace(first=min(one.first, known.first), last=max(one.last, known.last))
    return [*whole.values()][: MAX_LOST // 2]


def losses(db: sqlite3.Connection) -> list[Loss]:
    """What was not told yet."""
    rows = db.execute(
        "SELECT plugin, host, series, first, last, why FROM cluster_losses ORDER BY 1, 2, 3, 4"
    ).fetchall()
    return [Loss(plugin, Range(*numbers), why) for plugin, *numbers, why in rows]


def told(db: sqlite3.Connection, some: Iterable[Loss]) -> None:
    """Forget losses that are on the trail."""
    for one in some:
        where = "DELETE FROM cluster_losses WHERE plugin=? AND host=? AND series=? AND first=?"
        db.execute(where, (one.plugin, *one.range[:3]))
