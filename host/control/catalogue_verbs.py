"""Handlers of the verbs for event types: listed, registered, unregistered."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import TYPE_CHECKING

from host.control.endpoints import Caller, Verbs, serves
from host.control.platform_types import EventRegister, EventTypeList, EventTypes, EventUnregister, RegisteredEvent
from host.control.terms import Nothing
from host.database.store import Store
from host.events import BUILT_IN, Catalogue, EventType, from_schema
from host.plugins.registry import Registry
from host.queue import rows
from isolator.errors import UsageError

if TYPE_CHECKING:
    from host.membership.types import ClusterTypes


class CatalogueVerbs(Verbs):
    """Event types of the daemon and of the platform.

    Whoever relies on a type of the platform's is asked before it changes: plugins that subscribe to it were written for
    what its payloads were, and those that are written for the new type also get the events that wait.
    """

    def __init__(
        self, catalogue: Catalogue, registry: Registry, store: Store, shared: ClusterTypes | None = None
    ) -> None:
        self._catalogue, self._registry, self._store, self._shared = catalogue, registry, store, shared

    @serves(EventTypes)
    async def types(self, _: EventTypes, __: Caller) -> EventTypeList:
        return {
            "types": [
                {"name": t.name, "version": t.version, "order_by": t.order_by, "filled": t.filled, "schema": t.schema()}
                for t in self._catalogue
            ]
        }

    @serves(EventRegister)
    async def register(self, request: EventRegister, caller: Caller) -> RegisteredEvent:
        made = from_schema(request.name, request.schema, request.order_by, request.version)
        self._catalogue.check(made)
        before = self._catalogue.get(made.name)
        surprises = before is not None and not request.breaking and self._refuse_surprises(before, made)
        schema = json.dumps(request.schema)
        if self._shared is not None:
            await self._shared.register(made, schema, caller.by, unread=surprises)
        else:
            row = (made.name, schema, made.order_by, made.version, caller.by)
            self._catalogue.register(made)
            await self._store.run(lambda db: db.execute("INSERT OR REPLACE INTO event_types VALUES (?,?,?,?,?)", row))
        return {"name": made.name, "version": made.version}

    @serves(EventUnregister)
    async def unregister(self, request: EventUnregister, caller: Caller) -> Nothing:
        name = self._catalogue.need(request.name).name
        readers, waiting = self._readers(name), self._waiting(name)
        if readers:
            remedy = "update or remove them first, or go on serving it"
            raise UsageError(f"event {name}", f"{_named(readers)} to it", remedy)
        if waiting:
            raise UsageError(f"event {name}", f"{waiting} deliveries of it wait", "see 'isolator event list'")
        if self._shared is not None and self._catalogue.need(name) not in BUILT_IN:
            await self._shared.unregister(name, caller.by)
            return {}
        self._catalogue.unregister(name)
        await self._store.run(lambda db: db.execute("DELETE FROM event_types WHERE name=?", (name,)))
        return {}

    def _readers(self, name: str) -> list[str]:
        elsewhere = self._shared.readers(name) if self._shared is not None else ()
        return sorted({*self._registry.subscribed(name), *elsewhere})

    def _waiting(self, name: str) -> int:
        here = self._store.read(lambda db: rows.waiting(db, name))
        return max(here, self._shared.waiting(name)) if self._shared is not None else here

    def _refuse_surprises(self, before: EventType, made: EventType) -> bool:
        """Return whether the new type would surprise somebody; raise UsageError if somebody relies on the old one."""
        surprise, readers = before.surprise(made), self._readers(made.name)
        remedy = "register it under another name, or with 'breaking' if no plugin minds"
        if surprise and readers:
            raise UsageError(f"event {made.name}", f"{surprise}, and {_named(readers)} to it as it is", remedy)
        lack = made.lacks(before)
        waiting = self._waiting(made.name) if lack else 0
        if waiting:
            why = f"{lack} in the {waiting} deliveries that wait, which were accepted before"
            raise UsageError(f"event {made.name}", why, f"wait until they are delivered; {remedy}")
        return surprise is not None


def _named(plugins: Sequence[str]) -> str:
    more = f" and {len(plugins) - 3} more" if len(plugins) > 3 else ""
    return f"{', '.join(plugins[:3])}{more} {'subscribes' if len(plugins) == 1 else 'subscribe'}"
