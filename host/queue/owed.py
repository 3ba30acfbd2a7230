"""Records that the trail is owed: they stand in the database from their change's transaction until they are on disk.

A change on demand and the record of it are safe at different moments; so are what a verb of the control socket has
others do and the record of its call, which is owed from its begin on. A process that is killed between them leaves its
records here, and the next one makes those that the trail does not have. What the trail has is known by all that the
record says, and by its time: it is not made before it is owed. An accepted event has one record, known by its id; it is
owed only where it may be missing at a start (``host.intake.unrecorded``).
"""

from __future__ import annotations

import asyncio
import json
import os
import sqlite3
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from host.database.store import Store
from host.queue.interface import Changed
from isolator.audit import reader
from isolator.audit.client import AuditClient, moment, utc_now
from isolator.audit.record import Record, parse
from isolator.audit.schema import (
    HOST,
    ConfigChanged,
    ControlCalled,
    EventAccepted,
    EventCancelled,
    EventDead,
    EventReplayed,
    EventRetried,
    EventSkipped,
    PluginPaused,
    PluginResumed,
    RecordData,
    ToolsApproved,
)
from isolator.errors import UnavailableError
from isolator.ipc.tasks import Tasks

LOOK = 20_000
"""Newest records among which those of a killed process are looked for, whatever the clock says; and all since then."""
UNKNOWN = "unknown"
"""Verdict of a call of the control socket whose host ended before its answer."""
AT_ONCE = 1000
"""Records that are made before the trail has some of them."""
_LATER = (
    "UPDATE owed SET since=:now WHERE id NOT IN (SELECT value FROM json_each(:made))"
    " AND record IN (SELECT record FROM owed WHERE id IN (SELECT value FROM json_each(:settled)))"
)
"""A time, the ids of all that is made, and of what of it is settled, in JSON."""
_KINDS = {
    kind.TYPE: kind
    for kind in (
        ConfigChanged, ControlCalled, EventAccepted, EventCancelled, EventDead, EventReplayed, EventRetried,
        EventSkipped, PluginPaused, PluginResumed, ToolsApproved,
    )
}  # fmt: skip


@dataclass(frozen=True)
class Owed:
    """A record for the trail, which may have it from the time ``since`` on."""

    record: RecordData
    plugin: str | None
    event_id: str | None
    id: str
    since: str

    @property
    def content(self) -> dict[str, Any]:
        """All that it says, but for its time."""
        return {"type": self.record.TYPE, "plugin": self.plugin, "event_id": self.event_id, "data": self.record.data}

    def is_made(self, of_its_event: list[Record]) -> bool:
        """Look for it among the trail's records of its event, newest first: the one that it is stands for no other.

        To be asked of what is owed newest first, too: of records that say the same each then has one.
        """
        if isinstance(self.record, EventAccepted):
            return any(record.type == EventAccepted.TYPE for record in of_its_event)
        content = self.content
        for number, record in enumerate(of_its_event):
            found = {key: getattr(record, key) for key in content}
            if record.type == ControlCalled.TYPE:
                found["data"] = record.data | {"verdict": UNKNOWN}  # as it is owed: nobody knew it yet
            if record.time >= self.since and content == found:
                del of_its_event[number]
                return True
        return False


def owed(record: RecordData, plugin: str | None, event_id: str | None = None) -> Owed:
    """A record that is owed from now on."""
    return Owed(record, plugin, event_id, os.urandom(8).hex(), utc_now())


class Change:
    """Records of one change, which ``make`` makes of what its transaction has found; they are owed from then on."""

    def __init__(self, debts: Debts, make: Callable[..., list[Owed]]) -> None:
        self._debts, self._make = debts, make
        self._records: list[Owed] = []
        self._noted: list[Owed] = []
        """All that was noted so far, also by a transaction that has failed: the database tells which are owed."""

    def note(self, db: sqlite3.Connection, *found: Any, **more: Any) -> None:
        """Owe them, in the transaction of the change, which may run again; in place of what was noted before."""
        self.drop(db)
        self._records = self._make(*found, **more)
        self._noted += self._records
        self._debts.note(db, self._records)

    def __enter__(self) -> Change:
        return self

    def __exit__(self, _: object, error: BaseException | None, __: object) -> None:
        """Make them: the change is safe. After an error, those of them that are owed all the same."""
        if error is None:
            self._debts.pay(self._records)
        elif isinstance(error, Exception):
            self._debts.pay_once_kept(self._noted)

    async def restate(self, *found: Any, **more: Any) -> None:
        """Note them anew, as more is known by now; where that cannot be written, what was noted stays."""
        before = self._records
        try:
            await self._debts.write(lambda db: self.note(db, *found, **more))
        except UnavailableError:
            self._records = before

    def drop(self, db: sqlite3.Connection) -> None:
        """Owe nothing any more, in the transaction that undoes the change, and is followed by the error."""
        self._debts.forget(db, self._noted)


class Debts:
    """The records that a host owes, and those that the one before it has left; ``trail``: the folder of the trail."""

    def __init__(self, store: Store, audit: AuditClient, trail: Path) -> None:
        self._store, self._audit, self._trail = store, audit, trail
        self._unsettled: list[Owed] = []
        """Records that are made, at their times, and owed until they are on disk."""
        self._settling = False
        self._tasks = Tasks()
        self.write = store.run

    def close(self) -> None:
        """Wait for the trail no more; the process that comes next looks whether it has them."""
        self._tasks.cancel()

    @staticmethod
    def note(db: sqlite3.Connection, records: Iterable[Owed]) -> None:
        """Owe records, in the transaction of their change."""
        rows = [(one.id, one.since, json.dumps(one.content)) for one in records]
        db.executemany("INSERT OR IGNORE INTO owed (id, since, record) VALUES (?,?,?)", rows)

    @staticmethod
    def forget(db: sqlite3.Connection, records: Iterable[Owed]) -> None:
        """Owe records no more, in a transaction."""
        db.executemany("DELETE FROM owed WHERE id=?", [(one.id,) for one in records])

    def begin(self, called: ControlCalled, plugin: str | None) -> Owed:
        """Owe a record of a call that begins now, whose verdict is ``UNKNOWN``, until ``end``.

        It is owed when this returns, unless the database cannot be written at the moment, for which no call waits.
        """
        begun = owed(called, plugin)
        if self._store.blocked is None:
            self._store.submit(lambda db: self.note(db, [begun]))
            self._store.commit()
        return begun

    def end(self, begun: Owed, called: ControlCalled, *, urgent: bool) -> None:
        """Record a call whose verdict is known by now; ``urgent`` as for ``AuditClient.record``."""
        self._make([replace(begun, record=called)], urgent=urgent)

    def drop(self, begun: Sequence[Owed]) -> None:
        """Owe no records of calls that the successor of this process begins anew, and records."""
        self._store.submit(lambda db: self.forget(db, begun))

    def pay(self, records: Sequence[Owed]) -> None:
        """Record what was noted; its change is safe. Where there is no room for it, it is recorded once there is."""
        self._make(records)

    def _make(self, records: Sequence[Owed], *, urgent: bool = False) -> None:
        if len(records) > self._audit.room:
            self._tasks.run("records that wait for room", self._pay_later(records))
            return
        for one in records:
            of_delivery = one.event_id is not None and one.plugin is not None
            delivery_id = f"{one.event_id}.{one.plugin}" if of_delivery else None
            at = moment()
            self._audit.record(
                one.record, plugin=one.plugin, event_id=one.event_id, delivery_id=delivery_id, urgent=urgent, at=at
            )
            self._unsettled.append(replace(one, since=at.time))
        if records and not self._settling:
            self._settling = True
            self._tasks.run("records that are owed", self._settle())

    def pay_once_kept(self, noted: Iterable[Owed]) -> None:
        """Record what was noted of a change that has failed behind its transaction, or waits for a disk with room.

        What it notes until then is among it.
        """

        async def kept() -> None:
            await self._store.committed()
            await self._store.durable()
            ids = {name for (name,) in self._store.rows("SELECT id FROM owed")}
            self.pay([one for one in noted if one.id in ids])

        self._tasks.run("records of a change that has failed", kept())

    def of_event(self, event_id: str, record: Callable[[Changed], RecordData]) -> Change:
        """The records of one change of an event's deliveries, which are made of each that is changed."""
        return Change(self, lambda changed: [owed(record(one), one.plugin, event_id) for one in changed])

    def of_plugin(self, plugin: str | None, record: Callable[..., RecordData]) -> Change:
        """The one record of a change of a plugin, or of none."""
        return Change(self, lambda *found: [owed(record(*found), plugin)])

    def of_config(self, plugin: str, values: Iterable[str], by: str) -> Change:
        """The record of config values that are set with a version of a plugin; no values: no record.

        It is noted with ``waits`` where that is known.
        """
        names = sorted(values)
        return Change(self, lambda **more: [owed(ConfigChanged(names=names, by=by, **more), plugin)] if names else [])

    def find(self, more: Sequence[Owed] = ()) -> asyncio.Task[None] | None:
        """Make the records that another process has left, and ``more`` of them that are not owed yet.

        The task takes as long as the trail cannot be written; None: there are none.
        """
        if more:
            self._store.submit(lambda db: self.note(db, more))
        left = {one.id: one for one in (*self._left(), *more)}
        if not left:
            return None
        finding = self._find(list(left.values()), self._audit.numbered)
        return self._tasks.run("records of another host process", finding)

    async def _pay_later(self, records: Sequence[Owed]) -> None:
        await self._audit.durable()
        self.pay(records)

    async def _settle(self) -> None:
        try:
            while settled := list(self._unsettled):
                await self._audit.durable()
                await self._forget(settled)  # where that fails, they are forgotten with those that come next
                del self._unsettled[: len(settled)]
        finally:
            self._settling = False

    async def _find(self, left: list[Owed], numbered: int) -> None:
        await self._audit.passed()  # what that process had handed over has its place
        since, own = min(one.since for one in left), f"{HOST}:{self._audit.session}:"
        made = await asyncio.to_thread(_made, self._trail, since, own, numbered)
        newest_first = sorted(left, key=lambda one: one.since, reverse=True)
        settled = [one for one in newest_first if one.is_made(made.get(one.event_id, []))]
        await self._forget(settled)
        ids = {one.id for one in settled}
        for number, one in enumerate(one for one in left if one.id not in ids):
            if number % AT_ONCE == 0:
                await self._audit.durable(within=AT_ONCE)
            self.pay([one])

    async def _forget(self, settled: list[Owed]) -> None:
        """Owe what is on disk no more; what says the same is none of it, made by now or not."""
        # Of events that were accepted none says the same.
        of_many = {one.id for one in settled if not isinstance(one.record, EventAccepted)}

        def forget(db: sqlite3.Connection) -> None:
            if of_many:
                made = {one.id: one.since for one in (*settled, *self._unsettled)}
                db.execute(_LATER, {"now": utc_now(), "made": json.dumps([*made]), "settled": json.dumps([*of_many])})
                for one in settled:
                    made.pop(one.id, None)
                db.executemany("UPDATE owed SET since=? WHERE id=?", [(since, name) for name, since in made.items()])
            self.forget(db, settled)

        await self.write(forget)

    def _left(self) -> Iterator[Owed]:
        rows = self._store.read(lambda db: db.execute("SELECT id, since, record FROM owed").fetchall())
        for name, since, text in rows:
            try:
                said = json.loads(text)
                record = _KINDS[said["type"]](**said["data"])
                plugin, event_id = said["plugin"], said["event_id"]
            except (ValueError, TypeError, KeyError, RecursionError):
                continue  # a damaged row
            if isinstance(since, str) and isinstance(plugin, str | None) and isinstance(event_id, str | None):
                yield Owed(record, plugin, event_id, name, since)


def _made(trail: Path, since: str, own: str, numbered: int) -> dict[str | None, list[Record]]:
    """The trail's records of those kinds that may have been made since a time, by their events.

    Without those of the origin ``own`` with a number above ``numbered``: this process makes them meanwhile.
    """
    found: dict[str | None, list[Record]] = {}
    for number, line in enumerate(reader.backwards(trail)):
        record = parse(line)
        if record is None:
            continue
        if number >= LOOK and record.origin.startswith(HOST) and record.time < since:
            break
        name = record.origin.removeprefix(own)
        if record.type in _KINDS and not (name.isdecimal() and int(name) > numbered):
            found.setdefault(record.event_id, []).append(record)
    return found
