"""Operational events: ``isolator.*``, about the plugins and the daemon, for plugins that are granted them.

They are made of the records of the trail, which is followed from a mark in the database as long as a plugin receives
one of them. The mark, and the conditions that stand at present, are kept after the events are safe; an event that was
accepted before a crash is known by its record's hash. What no record tells of (a queue, the trail itself) is kept
before, with its event, and that is emitted again after a crash, under the same key. So each begin of a condition makes
one event, whoever is killed meanwhile. They carry names and numbers only: no payload, log line, reply, address or path
of a plugin.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

from host.database.store import Store
from host.events import OPERATIONAL
from host.intake.intake import EventIntake
from host.plugins.registry import Registry
from host.queue.sqlite import SqliteQueue
from isolator.audit import reader, schema
from isolator.audit.client import AWAY, AuditClient
from isolator.audit.record import Record, parse
from isolator.errors import IsolatorError, UsageError
from isolator.ipc.tasks import Tasks

_logger = logging.getLogger(__name__)

BEAT = 0.5
"""Seconds between two looks at the trail, the queues and the audit process."""
AT_REST = 2.0
"""Seconds between two looks while no plugin is granted an operational event; one that is hears of all since then."""
HIGH, LOW = 0.8, 0.5
"""Parts of a queue's limit: from the one on it is high, and below the other it is so no longer."""
MOST_BACK = 4096
"""Records that are read backwards for the begin of what a first receiver is granted: 2000 a second of ``AT_REST``."""
MOST_CONDITIONS = 16_384
"""Conditions that are remembered; beyond that all are forgotten and begin anew."""

_DENIALS = {
    schema.NetDenied.TYPE: "connection",
    schema.NetQuery.TYPE: "lookup",
    schema.SyscallDenied.TYPE: "call",
    schema.FsDenied.TYPE: "file",
    schema.ApiCalled.TYPE: "api",
}
_GIVEN_UP = {schema.EventDead.TYPE: "dead", schema.EventQuarantined.TYPE: "quarantined"}
_CHANGES = (
    schema.PluginAdded.TYPE, schema.PluginUpdated.TYPE, schema.PluginRolledBack.TYPE, schema.PluginApproved.TYPE,
    schema.PluginRemoved.TYPE,
)  # fmt: skip
_TYPES = (
    schema.PluginFailed.TYPE, schema.PluginPending.TYPE, schema.EventResponse.TYPE, *_CHANGES, *_DENIALS, *_GIVEN_UP,
)  # fmt: skip
_MARKS = [f'"type":"{kind}"'.encode() for kind in _TYPES]


@dataclass(frozen=True)
class Operational:
    """An operational event; ``key``: there is never a second one with the same."""

    name: str
    payload: Mapping[str, Any]
    key: str


@dataclass
class Conditions:
    """The conditions that stand; only the begin of one is an event."""

    standing: set[str] = field(default_factory=set)
    changed: bool = False

    def begins(self, *condition: str) -> bool:
        """Note that a condition stands; whether it did not stand before."""
        if len(self.standing) >= MOST_CONDITIONS:
            self.standing.clear()
        key = " ".join(condition)
        if key in self.standing:
            return False
        self.standing.add(key)
        self.changed = True
        return True

    def ends(self, *condition: str) -> None:
        """Note that a condition stands no longer."""
        key = " ".join(condition)
        if key in self.standing:
            self.standing.discard(key)
            self.changed = True

    def of_record(self, record: Record, event: str | None) -> Operational | None:
        """The event that a record of the trail makes, if any; ``event``: the name of the event that it is about."""
        kind, plugin = record.type, record.plugin
        if plugin is None or plugin.startswith("_"):  # a user's own run is no plugin
            return None
        where: dict[str, Any] = {"plugin": plugin, "at": record.time, "record": record.seq}
        if kind == schema.PluginFailed.TYPE:
            return Operational("isolator.plugin.failed", where, record.hash)
        if kind == schema.PluginPending.TYPE:
            found = {**where, "version": str(record.data.get("version"))[:256]}
            return Operational("isolator.update.pending", found, record.hash)
        if kind in _CHANGES:
            for denial in _DENIALS.values():
                self.ends("denied", plugin, denial)
            if kind == schema.PluginRemoved.TYPE:
                self.ends("dead", plugin)
        elif kind == schema.EventResponse.TYPE:
            if record.data.get("outcome") in ("ok", "skipped"):
                self.ends("dead", plugin)
        elif kind in _GIVEN_UP:
            # An operational event that could not be delivered makes no other one, or two notifiers would never end.
            if (event is None or not event.startswith(OPERATIONAL)) and self.begins("dead", plugin):
                about = {"event_id": record.event_id, "event": event}
                found = {**where, "state": _GIVEN_UP[kind]} | {k: v for k, v in about.items() if v is not None}
                return Operational("isolator.delivery.dead", found, record.hash)
        elif record.data.get("verdict", "denied") == "denied" and self.begins("denied", plugin, _DENIALS[kind]):
            return Operational("isolator.denied", {**where, "kind": _DENIALS[kind]}, record.hash)
        return None


class OperationalEvents:
    """The source of operational events of one host."""

    def __init__(
        self,
        trail: Path,
        audit: AuditClient,
        store: Store,
        registry: Registry,
        queue: SqliteQueue,
        intake: EventIntake,
    ) -> None:
        self._trail, self._audit, self._store = trail, audit, store
        self._registry, self._queue, self._intake = registry, queue, intake
        self._follower: reader.Follower | None = None
        self._reading: asyncio.Future[list[bytes]] | None = None
        self._seq, self._saved, self._conditions = 0, -1, Conditions()
        row = store.row("SELECT seq, standing FROM operational")
        self._begun = row is not None and isinstance(row[0], int)
        self._owed: Operational | None = None
        """An event whose condition is kept, and that may not have been accepted."""
        if self._begun:
            self._seq = row[0]
            with contextlib.suppress(ValueError, TypeError, KeyError):
                kept = json.loads(row[1])
                self._conditions.standing = {str(one) for one in kept["standing"]}
                self._owed = Operational(**kept["owed"]) if kept["owed"] else None
        self._tasks = Tasks()
        self._tasks.keep("operational events", self._run)

    def close(self) -> None:
        """Make no more of them; the mark is safe."""
        self._tasks.cancel()

    async def _run(self) -> None:
        try:
            while True:
                await asyncio.sleep(AT_REST if self._registry.hears_since is None else BEAT)
                try:
                    await self._look()
                except (OSError, IsolatorError) as error:
                    _logger.info("operational events wait: %s", error)
                    self._close_file()
        finally:
            self._close_file()

    async def _look(self) -> None:
        if self._registry.hears_since is None:
            if self._begun:  # whoever is granted them later hears of what comes then
                self._begun, self._conditions, self._owed = False, Conditions(), None
                self._close_file()
                self._store.submit(lambda db: db.execute("DELETE FROM operational"))
            return
        if self._owed is not None:
            await self._tell()
        if self._audit.blocked == AWAY:
            return  # it is being started
        if self._audit.blocked is not None:
            self._close_file()  # its disk may have to be unmounted
            if self._conditions.begins("blocked"):
                self._owed = Operational("isolator.audit.blocked", {"record": self._seq}, f"blocked {self._seq}")
                await self._tell()
            return
        self._conditions.ends("blocked")
        await self._follow()
        for plugin, depth in self._queue.depths().items():
            high = depth >= HIGH * self._queue.limit
            if high and self._conditions.begins("high", plugin):
                found = {"plugin": plugin, "depth": depth, "limit": self._queue.limit, "record": self._seq}
                self._owed = Operational("isolator.queue.high", found, f"high {plugin} {self._seq}")
                await self._tell()
            elif depth < LOW * self._queue.limit:
                self._conditions.ends("high", plugin)
        await self._save()

    async def _follow(self) -> None:
        if self._follower is None:
            since = self._registry.hears_since if not self._begun else None
            last, begin = await asyncio.to_thread(_ends, self._trail, since)
            if not self._begun or self._seq > last:  # nobody heard of them before, or this is another trail
                self._begun, self._seq = True, begin
            self._follower = reader.Follower(self._trail, self._seq)
        while lines := await self._read(self._follower):
            for line in lines:
                if not any(mark in line for mark in _MARKS) or (record := parse(line)) is None:
                    continue
                event = None
                if record.type in _GIVEN_UP and record.event_id is not None:
                    event = self._queue.name_of(record.event_id)
                found = self._conditions.of_record(record, event)
                if found is not None:
                    self._owed = found  # its condition stands: an event that is not accepted is emitted again
                    await self._emit(found)
                    self._owed = None
            self._seq = self._follower.seq

    async def _read(self, follower: reader.Follower) -> list[bytes]:
        self._reading = asyncio.get_running_loop().run_in_executor(None, follower.available, 256)
        return await asyncio.shield(self._reading)

    async def _tell(self) -> None:
        """Emit the event that is owed; its condition is kept before."""
        assert self._owed is not None
        await self._save()
        await self._emit(self._owed)
        self._owed, self._conditions.changed = None, True
        await self._save()

    async def _emit(self, found: Operational) -> None:
        done: asyncio.Future[None] = asyncio.get_running_loop().create_future()

        def accepted(_: object, error: Exception | None) -> None:
            if not done.done():
                done.set_result(None) if error is None else done.set_exception(error)

        key = f"{OPERATIONAL}{found.key}"
        try:
            self._intake.emit(found.name, found.payload, accepted, by="isolator", dedupe_key=key)
        except UsageError as error:  # a record that is not as ours are; those behind it count
            _logger.warning("operational event: %s", error)
        else:
            await done

    async def _save(self) -> None:
        if self._seq == self._saved and not self._conditions.changed:
            return
        owed = dataclasses.asdict(self._owed) if self._owed is not None else None
        row = (self._seq, json.dumps({"standing": sorted(self._conditions.standing), "owed": owed}))
        self._conditions.changed = False
        await self._store.run(lambda db: db.execute("INSERT OR REPLACE INTO operational VALUES (1,?,?)", row))
        self._saved = row[0]

    def _close_file(self) -> None:
        if self._reading is not None and not self._reading.done():
            self._reading.add_done_callback(lambda _: self._close_file())  # never under a thread that reads it
            return
        follower, self._follower = self._follower, None
        if follower is not None:
            follower.close()


def _ends(trail: Path, since: str | None) -> tuple[int, int]:
    """Number of the newest record, 0 in an empty trail, and that of the one before the first from ``since`` on.

    That one may be far back: the trail could not be written, or the host was busy. ``MOST_BACK`` are looked through.
    """
    lines = islice(reader.backwards(trail), 1 if since is None else MOST_BACK)
    newest = [record for line in lines if (record := parse(line)) is not None]
    last = newest[0].seq if newest else 0
    return last, min((one.seq - 1 for one in newest if since is not None and one.time >= since), default=last)
