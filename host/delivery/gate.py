"""Gate of dispatch: nothing is sent while the trail or the database cannot be written, nor while it is held."""

from __future__ import annotations

import asyncio

from host.database.store import Store
from isolator.audit.client import AuditClient


class DispatchGate:
    """Open while trail and database can be written; without ``halt_without_audit`` the database alone decides."""

    def __init__(self, audit: AuditClient, store: Store, *, halt_without_audit: bool) -> None:
        self._audit, self._store = audit, store
        self._halt_without_audit = halt_without_audit
        self._free = asyncio.Event()
        self._free.set()

    def hold(self, work: asyncio.Task[None], seconds: float) -> None:
        """Stay closed until some work is done, for so many seconds at most."""
        self._free.clear()
        work.add_done_callback(lambda _: self._free.set())
        asyncio.get_running_loop().call_later(seconds, self._free.set)

    def is_open(self) -> bool:
        """Whether a request may be sent now."""
        halted = self._halt_without_audit and self._audit.blocked is not None
        return not halted and self._store.blocked is None and self._free.is_set()

    async def wait_open(self) -> None:
        """Return once ``is_open``."""
        while not self.is_open():
            await self._free.wait()
            if self._halt_without_audit:
                await self._audit.writable()
            await self._store.unblocked.wait()
