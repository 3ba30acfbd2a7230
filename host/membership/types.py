"""Event types of a cluster: what one host registers, the log says to all, in its order before the first such event.

The fold has them. Rows and catalogue of this host follow it, in the fold's own transaction: so a process that starts
knows what the log said, and a host without ``[cluster]`` goes on with what it had. A type is the cluster's, not the
host's that registered it: it stays when that one leaves.
"""

from __future__ import annotations

import asyncio
import functools
import json
import logging
import sqlite3
import time
from collections.abc import Awaitable, Callable, Iterable, Sequence
from typing import Final

from host.cluster.delivery.fates import waiting
from host.cluster.delivery.follower import TypesFollower
from host.cluster.entries import MAX_SCHEMA
from host.cluster.entries import EventType as Entry
from host.cluster.fold import Applied, State
from host.cluster.log import LogUnavailableError
from host.database.store import Store
from host.events import BUILT_IN, Catalogue, EventType, from_schema
from isolator.errors import IsolatorError, UnavailableError, UsageError

AGAIN: Final = 1.0
"""Seconds until the log is asked again to take a type of this host's."""
OF_CLUSTER: Final = "cluster:"
"""Begin of ``by`` in the rows of types that the log has."""
_BROKEN = (IsolatorError, ValueError, TypeError, AttributeError, RecursionError)
_SHOWN: Final = 5
_SHIPPED: Final = Catalogue()
"""The types that no log can change."""
_log = logging.getLogger(__name__)


class ClusterTypes(TypesFollower):
    """Event types that all hosts have in common; ``decide`` has the log decide something."""

    def __init__(
        self,
        store: Store,
        catalogue: Catalogue,
        state: Callable[[], State],
        decide: Callable[[Entry], Awaitable[Applied]],
    ) -> None:
        self._store, self._catalogue, self._state, self._decide = store, catalogue, state, decide
        self._followed: dict[str, Entry] = {}
        """What the catalogue has from the log."""
        self._seen: State | None = None
        self.problems: dict[str, str] = {}
        """By type, what is wrong with it here, a line each."""

    def lines(self) -> list[str]:
        """The problems with types, the first few of them: a hostile host can make many."""
        found = [*self.problems.values()]
        more = [f"{len(found) - _SHOWN} more event types have problems; see the daemon's log"]
        return found[:_SHOWN] + (more if len(found) > _SHOWN else [])

    # As commands ask

    def readers(self, name: str) -> Sequence[str]:
        """Plugins of any host that want such events."""
        return [one.plugin.name for one in self._state().plugins.values() if name in one.plugin.hooks]

    def waiting(self, name: str) -> int:
        """Number of its events that a plugin of any host is not through with."""
        return self._store.read(lambda db: waiting(db, self._state(), name, time.time()))

    async def register(self, made: EventType, schema: str, by: str, *, unread: bool) -> None:
        """Have all hosts know a type from now on; ``unread``: only if no plugin of any host wants such events by then.

        Raises UsageError if it has changed meanwhile, UnavailableError if the hosts cannot agree now.
        """
        known = self._state().types.get(made.name)
        try:
            entry = Entry(made.name, schema, made.order_by, made.version, by, known.digest if known else "", unread)
        except ValueError:
            why = f"a cluster takes schemas of at most {MAX_SCHEMA} characters, and this one has {len(schema)}"
            raise UsageError(f"event {made.name}", why, "make it smaller") from None
        mine = self._catalogue.get(made.name) if known is None else None
        if mine is not None and mine.version == made.version and not _differ(mine, made):
            return  # it is on its way, as soon as the log answers
        if known is None or known.digest != entry.digest:
            await self._write(entry, "registered")

    async def unregister(self, name: str, by: str) -> None:
        """Have all hosts forget a type; raises as ``register``."""
        known = self._state().types.get(name)
        if known is None:
            raise UsageError(f"event {name}", "is on its way into the cluster's log", "try again in a moment")
        gone = Entry(name, "", known.order_by, known.version, by, known.digest, unread=True, removed=True)
        await self._write(gone, "forgotten")

    async def _write(self, entry: Entry, what: str) -> None:
        try:
            void = (await self._decide(entry)).void
        except LogUnavailableError as error:
            why = f"may not be {what}, all hosts have to know it: {error}"
            remedy = "see 'isolator cluster status', then try again"
            raise UnavailableError(f"event {entry.name}", why, remedy) from None
        except ValueError as error:
            raise UsageError(f"event {entry.name}", str(error), "make its schema smaller") from None
        if void:
            raise UsageError(f"event {entry.name}", f"is not {what}: {void}", "look at it again: isolator event types")

    async def share(self) -> None:
        """Give the cluster the types that this host had before, one after the other; the cluster's own hold.

        Returns when the log has an answer for each.
        """
        for row in self._store.read(_own_rows):
            name, schema, order_by, version, by = row
            while True:
                try:
                    void = (await self._decide(Entry(name, schema, order_by, version, by or ""))).void
                    if void and name not in self._state().types:
                        self._note(name, f"event type {name} stays this host's own: {void}")
                    break
                except LogUnavailableError:
                    await asyncio.sleep(AGAIN)
                except ValueError as error:
                    self._note(name, f"event type {name} stays this host's own: {error}")
                    break
            known = self._state().types.get(name)
            if known is not None:
                await self._store.run(functools.partial(_put, entry=known))

    # As the log is read

    def applied(self, db: sqlite3.Connection, entries: Iterable[Applied]) -> None:
        """Write the rows of types that counted, in the fold's transaction."""
        for one in entries:
            if isinstance(one.entry, Entry) and not one.void:
                _put(db, one.entry)

    def again(self, db: sqlite3.Connection) -> None:
        """Have the rows that the fold has, which was replaced, in its transaction."""
        db.execute(f"DELETE FROM event_types WHERE by LIKE '{OF_CLUSTER}%'")
        for (text,) in db.execute("SELECT value FROM cluster_fold WHERE part='types'").fetchall():
            found = json.loads(text)
            _put(db, Entry(**{key: value for key, value in found.items() if key != "kind"}))

    @staticmethod
    def left(db: sqlite3.Connection) -> None:
        """Keep what the cluster had as this host's own: it leaves."""
        db.execute(f"UPDATE event_types SET by=substr(by, {len(OF_CLUSTER) + 1}) WHERE by LIKE '{OF_CLUSTER}%'")

    def kept(self, entries: Iterable[Applied]) -> None:
        """Follow the fold, once a message is on disk."""
        types = [one.entry for one in entries if isinstance(one.entry, Entry) and not one.void]
        for entry in types:
            if entry.removed:
                self._forget(entry.name)
        if types or self._state() is not self._seen:
            self.follow()

    def follow(self, *, complete: bool = False) -> None:
        """Have the catalogue know what the fold has; ``complete``: the log was read, what it does not have is gone."""
        self._seen, followed = self._state(), {*self._followed}
        state = self._seen
        for name, entry in state.types.items():
            if self._followed.get(name) is entry:
                continue
            self._followed[name] = entry
            made = _read(entry)
            if made is None:
                self._note(name, f"event type {name} of the cluster cannot be used by this version; it is passed over")
            else:
                before = self._catalogue.get(name)
                self._catalogue.register(made)
                if before is not None and name not in followed and _differ(before, made):
                    line = f"event type {name} was another one on this host: the cluster's holds now, compare them"
                    self._note(name, line)
                elif self.problems.get(name, "").endswith("passed over"):
                    del self.problems[name]
        if complete:
            for name in self._followed.keys() - state.types.keys():
                self._forget(name)

    def _forget(self, name: str) -> None:
        known = self._catalogue.get(name)
        self._followed.pop(name, None)
        self.problems.pop(name, None)
        if known is not None and known not in BUILT_IN:
            self._catalogue.unregister(name)

    def _note(self, name: str, line: str) -> None:
        _log.warning("%s", line)
        self.problems[name] = line


def _differ(one: EventType, other: EventType) -> bool:
    return (one.schema(), one.order_by) != (other.schema(), other.order_by)


def _own_rows(db: sqlite3.Connection) -> list[tuple[str, str, str | None, int, str | None]]:
    rows = f"SELECT * FROM event_types WHERE coalesce(by, '') NOT LIKE '{OF_CLUSTER}%'"
    return [row for row in db.execute(rows).fetchall() if all(isinstance(text, str) for text in row[:2])]


def _put(db: sqlite3.Connection, entry: Entry) -> None:
    if entry.removed:
        db.execute("DELETE FROM event_types WHERE name=?", (entry.name,))
    elif _read(entry) is not None:
        row = (entry.name, entry.schema, entry.order_by, entry.version, OF_CLUSTER + entry.by)
        db.execute("INSERT OR REPLACE INTO event_types VALUES (?,?,?,?,?)", row)


def _read(entry: Entry) -> EventType | None:
    """The type of an entry, which a hostile host may have written; None for one that this host would not register."""
    try:
        made = from_schema(entry.name, json.loads(entry.schema), entry.order_by, entry.version, stored=True)
        _SHIPPED.check(made)
    except _BROKEN:
        return None
    return made
