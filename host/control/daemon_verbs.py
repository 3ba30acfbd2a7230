"""Handlers of ``status`` and ``ledger``."""

from __future__ import annotations

import os
from typing import cast

from host.control.alarms import Alarms
from host.control.server import AnyEndpoint, Caller, Endpoint
from host.control.verbs import Controls, DaemonStatus, Ledger, Status
from host.database import Store
from host.plugins.registry import Registry
from host.queue.sqlite import SqliteQueue
from host.supervisor_link import SupervisorLink
from isolator import __version__
from isolator.audit.client import AuditClient


class DaemonVerbs:
    """The daemon as a whole."""

    def __init__(
        self,
        link: SupervisorLink,
        registry: Registry,
        queue: SqliteQueue,
        audit: AuditClient,
        store: Store,
        alarms: Alarms,
    ) -> None:
        self._link, self._registry, self._queue = link, registry, queue
        self._audit, self._store, self._alarms = audit, store, alarms

    def endpoints(self) -> list[AnyEndpoint]:
        """The verbs with their handlers."""
        return [Endpoint(Status, self.status), Endpoint(Ledger, self.ledger)]

    async def status(self, _: Status, __: Caller) -> DaemonStatus:
        return {
            "version": __version__,
            "pid": os.getpid(),
            "plugins": sum(1 for _ in self._registry),
            "queue": self._queue.depths(),
            "alarms": self._alarms.lines(),
            "audit_blocked": self._audit.blocked,
            "database_blocked": self._store.blocked,
            "records_pending": self._audit.sent - self._audit.acked,
        }

    async def ledger(self, _: Ledger, __: Caller) -> Controls:
        return cast(Controls, (await self._link.ledger()).to_json())
