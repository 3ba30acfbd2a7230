"""Registry: the supervisor's plugin entries, parsed, and the subscribers of each event.

The supervisor is the source of truth. The host keeps one row per name so that, after a time when it was not
running, it can distinguish a plugin it knows from a new one of the same name: config and queue of a removed plugin must
never reach another that takes its name.
"""

from __future__ import annotations

import json
import sqlite3
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

from host.database.store import Store
from host.events import OPERATIONAL, Catalogue, EventType, from_schema
from host.plugins import manifest as manifests
from host.plugins.manifest import DeliverySpec, Manifest
from host.queue.interface import Subscriber
from isolator.audit.client import utc_now
from isolator.errors import IsolatorError, NotFoundError, nearest
from isolator.ipc.messages import PluginEntry, PluginTurned
from isolator.policy.filters import passes
from isolator.policy.model import EffectivePolicy
from isolator.policy.names import OLDER_HOOKS


@dataclass(frozen=True)
class Plugin:
    """Plugin entry of the supervisor, parsed; ``raw`` is the entry itself."""

    name: str
    version: str
    digest: str
    state: str
    error: str | None
    uid: int | None
    run: str | None
    pid: int | None
    effective: EffectivePolicy | None
    manifest: Manifest | None
    raw: dict[str, Any] = field(repr=False)
    hooks: Mapping[str, str] = field(default_factory=dict)
    """Canonical event name → the spelling that the plugin subscribed with."""
    problem: str | None = None
    """Why its manifest cannot be read here."""

    @property
    def versions(self) -> set[str]:
        """Digests of the version in use and of the one that waits for approval."""
        waiting = self.raw.get("pending")
        return {self.digest, *([str(waiting["digest"])] if waiting else [])}

    @property
    def wanted(self) -> tuple[str, ...]:
        """Canonical names of the events that it asks for, whatever it is granted here."""
        asked = self.manifest.core.hooks if self.manifest is not None else ()
        return tuple(sorted({*self.hooks, *(OLDER_HOOKS.get(hook, hook) for hook in asked)}))

    @cached_property
    def mode(self) -> str:
        return self.manifest.transport.mode if self.manifest is not None else "oneshot"

    @cached_property
    def major(self) -> int:
        """Major of the plugin's ``api_version``."""
        return int(self.manifest.core.api_version.partition(".")[0]) if self.manifest is not None else 1

    def sees(self, payload: Mapping[str, Any]) -> bool:
        """Whether the filters of its grant and its manifest let it have an event with this payload."""
        wanted = self.manifest.delivery.filters if self.manifest is not None else ()
        granted = self.effective.filters if self.effective is not None else ()
        return passes((*granted, *wanted), payload)

    @cached_property
    def filtered(self) -> bool:
        """Whether it has a filter at all."""
        manifest, effective = self.manifest, self.effective
        return bool((effective and effective.filters) or (manifest and manifest.delivery.filters))

    @cached_property
    def timeout(self) -> float:
        return self.effective.delivery_timeout if self.effective is not None else 10.0

    @cached_property
    def attempts(self) -> int:
        return self.effective.delivery_attempts if self.effective is not None else 12

    @cached_property
    def most_in_flight(self) -> int:
        """Requests that may be unanswered at a time, in a mode that has several."""
        spec = self.manifest
        return min(spec.transport.max_in_flight, spec.delivery.concurrency) if spec is not None else 1


class Registry:
    """Plugins of this daemon by name."""

    def __init__(self, catalogue: Catalogue, store: Store) -> None:
        self._catalogue = catalogue
        self._store = store
        self._plugins: dict[str, Plugin] = {}
        rows = store.rows("SELECT name, digest, version FROM plugins")
        self._rows = {name: (digest, version) for name, digest, version in rows if isinstance(name, str)}
        """Digest and version in each plugin's row, by name."""
        self._subscribers: dict[str, list[str]] = {}
        """Names of the plugins by event."""
        self.hears_since: str | None = None
        """When plugins began to receive operational events, in the form of the trail; None: none receives any."""

    def __iter__(self) -> Iterator[Plugin]:
        return iter(list(self._plugins.values()))

    def get(self, name: str) -> Plugin | None:
        """Find a plugin by name."""
        return self._plugins.get(name)

    def need(self, name: str) -> Plugin:
        """Find a plugin by name; raises NotFoundError."""
        plugin = self._plugins.get(name)
        if plugin is None:
            near = nearest(name, self._plugins)
            remedy = f"did you mean {near}?" if near else "see 'isolator plugin list'"
            raise NotFoundError(f"plugin {name}", "is not registered", remedy)
        return plugin

    def put(self, entry: PluginEntry) -> Plugin:
        """Add or replace a plugin, from an entry of the supervisor's."""
        plugin, before = self._parse(entry), self._plugins.get(entry.name)
        self._plugins[plugin.name] = plugin
        if before is None:
            self._subscribe(plugin)
        elif (before.hooks, "found" in before.raw) != (plugin.hooks, "found" in plugin.raw):
            self._subscribe_all()
        if self._rows.get(plugin.name) == (plugin.digest, plugin.version):
            return plugin
        self._rows[plugin.name] = plugin.digest, plugin.version
        row = (plugin.name, plugin.digest, plugin.version, time.time())
        self._store.submit(
            lambda db: db.execute(
                "INSERT INTO plugins VALUES (?,?,?,?) ON CONFLICT(name) DO UPDATE SET"
                " digest=excluded.digest, version=excluded.version",
                row,
            )
        )
        return plugin

    def remove(self, name: str) -> None:
        """Remove a plugin: from now on no event is addressed to it. The name stays known until ``erase``."""
        self._plugins.pop(name, None)
        self._subscribe_all()

    def erase(self, name: str) -> None:
        """Erase the row of a removed plugin: nothing is left that its namesake must not get."""
        self._rows.pop(name, None)
        self._store.submit(lambda db: db.execute("DELETE FROM plugins WHERE name=?", (name,)))

    def note_run(self, name: str, *, run: str | None, pid: int | None, state: str) -> None:
        """Note that a sidecar has started or ended."""
        plugin = self._plugins.get(name)
        if plugin is not None and (plugin.run, plugin.pid, plugin.state) != (run, pid, state):
            raw = {**plugin.raw, "run": run, "pid": pid, "state": state}
            self._plugins[name] = replace(plugin, run=run, pid=pid, state=state, raw=raw)

    def turn(self, turned: PluginTurned) -> Plugin | None:
        """Take over a plugin's state; None if it is not registered."""
        plugin = self._plugins.get(turned.name)
        if plugin is not None:
            rest = {key: value for key, value in plugin.raw.items() if key != "lease"}
            plugin = self._plugins[turned.name] = replace(
                plugin, run=turned.run, pid=turned.pid, state=turned.state, error=turned.error or plugin.problem,
                raw=rest | turned.to_json(),
            )  # fmt: skip
        return plugin

    def known(self) -> set[str]:
        """Return the names that have a row, registered at present or not."""
        return set(self._rows)

    def subscribers(self, event_type: EventType, payload: Mapping[str, Any]) -> list[Subscriber]:
        """Find the plugins that get this event, each with the key that orders it there."""
        plugins = (self._plugins[name] for name in self._subscribers.get(event_type.name, ()))
        return [found for plugin in plugins if (found := self.subscriber(plugin, event_type, payload)) is not None]

    @staticmethod
    def subscriber(plugin: Plugin, event_type: EventType, payload: Mapping[str, Any]) -> Subscriber | None:
        """Return one plugin as a subscriber of this event; None if it does not get it."""
        if event_type.name not in plugin.hooks or "found" in plugin.raw:
            return None
        if event_type.name.startswith(OPERATIONAL) and payload.get("plugin") == plugin.name:
            return None  # nobody is notified of itself
        if plugin.filtered and not plugin.sees(payload):
            return None
        delivery = plugin.manifest.delivery if plugin.manifest is not None else DeliverySpec()
        return Subscriber(plugin.name, delivery.order_key(event_type.order_by, payload))

    def subscribed(self, event: str) -> list[str]:
        """Names of the plugins that receive an event, filters aside."""
        return sorted(self._subscribers.get(event, ()))

    def _subscribe_all(self) -> None:
        self._subscribers = {}
        self._subscribe(*self._plugins.values())

    def _subscribe(self, *plugins: Plugin) -> None:
        for plugin in plugins:
            # A plugin that was found in a folder has been granted nothing yet. A registered one keeps its subscription,
            # also while its policy is of no use: its events wait for it.
            if "found" in plugin.raw:
                continue
            for event in plugin.hooks:
                self._subscribers.setdefault(event, []).append(plugin.name)
        if not any(name.startswith(OPERATIONAL) for name in self._subscribers):
            self.hears_since = None
        elif self.hears_since is None:
            self.hears_since = utc_now()

    def _parse(self, entry: PluginEntry) -> Plugin:
        raw, before = entry.to_json(), self._plugins.get(entry.name)
        same = before is not None and all(before.raw.get(key) == raw[key] for key in ("manifest", "effective"))
        if before is not None and same:
            # Most changes are of the state alone, and they come in bursts.
            effective, manifest, problem = before.effective, before.manifest, before.problem
        else:
            effective = EffectivePolicy.model_validate(entry.effective) if entry.effective else None
            manifest, problem = _manifest_of(entry)
        # Without an effective policy all that the plugin asks for waits until it is known what is granted.
        wanted = effective.hooks if effective is not None else manifest.core.hooks if manifest is not None else ()
        hooks = {self._catalogue.canonical(hook): hook for hook in wanted}
        return Plugin(
            name=entry.name,
            version=entry.version,
            digest=entry.digest,
            state=entry.state,
            error=entry.error or problem,
            uid=entry.uid,
            run=entry.run,
            pid=entry.pid,
            effective=effective,
            manifest=manifest,
            raw=raw,
            hooks=hooks,
            problem=problem,
        )


def _manifest_of(entry: PluginEntry) -> tuple[Manifest | None, str | None]:
    """Parse the entry's manifest: (manifest, None) or (None, why it cannot be read)."""
    if not entry.manifest:
        return None, None
    try:
        return manifests.from_data(entry.manifest), None
    except IsolatorError as error:
        return None, str(error)


def load_event_types(store: Store) -> tuple[list[EventType], list[str]]:
    """Load the platform's registered events, and the names of those whose rows are damaged."""

    def query(db: sqlite3.Connection) -> list[tuple[Any, ...]]:
        return db.execute("SELECT name, schema, order_by, version FROM event_types").fetchall()

    found, damaged = [], []
    for name, schema, order_by, version in store.read(query):
        try:
            if not isinstance(name, str) or not isinstance(version, int) or not isinstance(order_by, str | None):
                raise ValueError("no event type")
            found.append(from_schema(name, json.loads(schema), order_by, version, stored=True))
        except (IsolatorError, ValueError, TypeError, AttributeError, RecursionError):
            damaged.append(str(name))
    return found, damaged
