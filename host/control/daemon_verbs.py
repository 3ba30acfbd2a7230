"""Handlers of the verbs that are about the daemon as a whole."""

from __future__ import annotations

import asyncio
import os
import re
import sqlite3
import time
from collections import Counter
from pathlib import Path
from typing import cast

from host.control import daemon_types
from host.control.alarms import Alarms
from host.control.endpoints import Caller, Verbs, serves
from host.control.verbs import NOTIFICATIONS, listing, result_keys
from host.database.store import Store
from host.delivery.dispatch import Dispatcher
from host.lifecycle.supervisor_link import SupervisorLink
from host.plugins.registry import Registry
from host.queue.sqlite import SqliteQueue
from isolator import __version__
from isolator.audit import files, reader
from isolator.audit.client import AuditClient
from isolator.audit.schema import BackupTaken
from isolator.errors import DeniedError, IsolatorError, NotFoundError, UnavailableError, UsageError, nearest
from isolator.ipc import messages
from isolator.ipc.channel import NO_OPERATION
from isolator.policy.request import API_MAJORS

_SNAPSHOT_ID = re.compile(r"[0-9a-f]{16}")
_SNAPSHOT_SECONDS = 120.0


class DaemonVerbs(Verbs):
    """The daemon as a whole."""

    def __init__(
        self,
        link: SupervisorLink,
        registry: Registry,
        queue: SqliteQueue,
        audit: AuditClient,
        store: Store,
        alarms: Alarms,
        dispatcher: Dispatcher,
        trail: Path,
    ) -> None:
        self._link, self._registry, self._queue = link, registry, queue
        self._audit, self._store, self._alarms = audit, store, alarms
        self._dispatcher, self._trail = dispatcher, trail
        self._started_at = time.time()

    @serves(daemon_types.Status)
    async def status(self, _: daemon_types.Status, __: Caller) -> daemon_types.DaemonStatus:
        plugins = list(self._registry)
        paused = [p.name for p in plugins if self._dispatcher.paused(p.name)]
        failing = [p.name for p in plugins if p.state != "disabled" and (p.error or self._dispatcher.fails(p.name))]
        services = await self._services()
        return {
            "version": __version__,
            "pid": os.getpid(),
            "started_at": next((one["since"] for one in services if "since" in one), self._started_at),
            "plugins": len(plugins),
            "states": dict(Counter(plugin.state for plugin in plugins)),
            "failing": sorted(failing),
            "waiting": sorted(p.name for p in plugins if p.raw.get("pending") or p.raw.get("found")),
            "paused": paused,
            "services": services,
            "trail": {
                "last": await asyncio.to_thread(_last_record, self._trail),
                "pending": self._audit.sent - self._audit.acked,
                "blocked": self._audit.blocked,
            },
            "queue": self._queue.depths(),
            "alarms": self._alarms.lines(),
            "audit_blocked": self._audit.blocked,
            "database_blocked": self._store.blocked,
            "records_pending": self._audit.sent - self._audit.acked,
        }

    async def _services(self) -> list[daemon_types.ServiceEntry]:
        try:
            services = (await self._link.ask(messages.ListServices())).services
            return [cast(daemon_types.ServiceEntry, entry.to_json()) for entry in services]
        except IsolatorError:
            return []

    @serves(daemon_types.Reload)
    async def reload(self, _: daemon_types.Reload, __: Caller) -> daemon_types.ReloadBegun:
        return {"generation": (await self._link.ask(messages.ReloadDaemon())).generation}

    @serves(daemon_types.DaemonGeneration)
    async def generation(self, _: daemon_types.DaemonGeneration, __: Caller) -> daemon_types.Reloaded:
        found = await self._link.ask(messages.GetGeneration())
        try:
            services = (await self._link.ask(messages.ListOutdated())).services
            outdated = {one.name: one.refused for one in services}
        except IsolatorError as error:
            if error.why != NO_OPERATION:
                raise
            outdated = {"host": ""}  # the supervisor is of the version before, and will exchange this process, too
        return cast(daemon_types.Reloaded, found.to_json() | {"outdated": outdated})

    @serves(daemon_types.DaemonSnapshot)
    async def snapshot(self, request: daemon_types.DaemonSnapshot, caller: Caller) -> daemon_types.SnapshotTaken:
        if caller.uid != 0:
            raise DeniedError("daemon.snapshot", f"uid {caller.uid} could not read the copy", "run it as root")
        if not _SNAPSHOT_ID.fullmatch(request.id):
            raise UsageError("daemon.snapshot", "id is not 16 hex digits", "use 'isolator backup'")
        place = self._store.path.with_name(f"snapshot-{request.id}.db")
        remove_snapshots(place.parent)
        try:
            async with asyncio.timeout(_SNAPSHOT_SECONDS):
                await self._store.copy(place, lambda: self._audit.record(BackupTaken(id=request.id, uid=caller.uid)))
                await self._audit.durable()
        except TimeoutError:
            why = "database or trail could not be written in time"
            raise UnavailableError("daemon.snapshot", why, "see 'isolator status'") from None
        except (sqlite3.Error, OSError) as error:
            why = f"the database was not copied: {error}"
            raise IsolatorError("daemon.snapshot", why, "is the disk full?") from None
        return {"file": place.name}

    @serves(daemon_types.ShowVersion)
    async def version(self, _: daemon_types.ShowVersion, __: Caller) -> daemon_types.Version:
        return {"isolator": __version__, "protocols": list(API_MAJORS)}

    @serves(daemon_types.ShowHelp)
    async def help(self, request: daemon_types.ShowHelp, _: Caller) -> daemon_types.Help:
        verbs = {verb: entry for verb, entry in listing().items() if request.verb in (None, verb)}
        if not verbs:
            near = nearest(str(request.verb), listing())
            raise NotFoundError(f"verb {request.verb}", "does not exist", f"did you mean {near}?" if near else "")
        return {"verbs": verbs, "notifications": {name: result_keys(keys) for name, keys in NOTIFICATIONS.items()}}

    @serves(daemon_types.Ledger)
    async def ledger(self, _: daemon_types.Ledger, __: Caller) -> daemon_types.Controls:
        return cast(daemon_types.Controls, (await self._link.ask(messages.GetLedger())).to_json())


def remove_snapshots(folder: Path) -> None:
    """Remove copies of the database that nobody has fetched."""
    for left in folder.glob("snapshot-*.db"):
        left.unlink(missing_ok=True)


def _last_record(trail: Path) -> int | None:
    """Number of the newest record, 0 in an empty trail; None while it cannot be read."""
    try:
        lines = reader.tail(trail, 1)
    except (OSError, IsolatorError):
        return None
    return files.seq_of(lines[-1]) if lines else 0
