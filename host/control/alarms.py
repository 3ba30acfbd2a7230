"""Conditions that keep the daemon from its work until a person mends them."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable

from host.database.store import Store
from host.queue.beside_trail import Compared
from isolator.audit.client import AuditClient
from isolator.audit.schema import DatabaseDamaged
from isolator.policy.host import without_trail

_logger = logging.getLogger(__name__)


class Alarms:
    """The daemon's alarms; ``disk_full``: ``[audit] disk_full`` of host.toml."""

    def __init__(self, audit: AuditClient, store: Store, disk_full: str) -> None:
        self._audit, self._store, self._disk_full = audit, store, disk_full
        self.supervisor: tuple[str, ...] = ()
        """Alarms of the supervisor's: processes that hang or do not come up."""
        self.cluster: Callable[[], Iterable[str]] = tuple
        """Returns the problems of this host with its cluster, where it has one."""
        self._noted: list[str] = []

    def note(self, line: str) -> None:
        """Add an alarm that stands as long as this process."""
        self._noted.append(line)

    def note_missing(self, found: Compared) -> None:
        """Add an alarm if the database lacks accepted events that are on the trail."""
        if not found.missing:
            return
        why = f"{found.missing} accepted events are on the trail and not in {self._store.path}, up to {found.last}"
        remedy = "it was damaged or restored from before; have the platform emit them again"
        _logger.critical("ALARM: %s; %s", why, remedy)
        self._audit.record(DatabaseDamaged(why=remedy.partition(";")[0], missing=found.missing, last=found.last))
        self.note(f"{why}; {remedy}")

    def lines(self) -> list[str]:
        """The alarms at this moment, one line each."""
        found = [*self._noted, *self.supervisor, *self.cluster()]
        if self._audit.blocked is not None:
            found.append(f"{self._audit.blocked}; {without_trail(self._disk_full)}")
        if self._audit.alarm is not None:
            found.append(self._audit.alarm)
        if self._store.blocked is not None:
            found.append(f"the database cannot be written: {self._store.blocked}; nothing is accepted or dispatched")
        return found
