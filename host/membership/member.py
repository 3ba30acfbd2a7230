"""This host as a member of its cluster: the node, the queue's follower, and those who have to hear of either.

It is made beside the queue, and begins before plugins are started: what one host of the cluster does, this one does
only with a lease.
"""

from __future__ import annotations

import asyncio
import json
import logging
import sqlite3
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from pydantic import TypeAdapter

from host.cluster import standing
from host.cluster.delivery.follower import QueueFollower
from host.cluster.delivery.queue import ClusterQueue
from host.cluster.delivery.unread import Loss
from host.cluster.entries import MAX_NUMBER, Entry
from host.cluster.entries import Plugin as Described
from host.cluster.fold import Applied, State
from host.cluster.joining import connect
from host.cluster.log import LogUnavailableError
from host.cluster.node import Node
from host.cluster.problems import Kind
from host.database.store import Store
from host.events import Catalogue
from host.fence.fences import Fences
from host.membership.types import ClusterTypes
from host.membership.values import ClusterKeyValue
from host.plugins.registry import Plugin, Registry
from host.queue.interface import Event, Subscriber
from isolator.audit.client import AuditClient
from isolator.audit.schema import ClusterProblem, EventLost
from isolator.errors import IsolatorError, UsageError
from isolator.ipc.messages import PluginState
from isolator.ipc.tasks import Tasks
from isolator.policy.cluster import Cluster

_log = logging.getLogger(__name__)
_UNABLE = frozenset({PluginState.PENDING, PluginState.REJECTED, PluginState.DISABLED, PluginState.FAILED})
"""States in which a plugin cannot be held here."""


_DESCRIBED: Final = TypeAdapter(Described)
_WISHES: Final = (
    "CREATE TABLE IF NOT EXISTS cluster_wishes (plugin TEXT PRIMARY KEY, entry TEXT NOT NULL) WITHOUT ROWID"
)
_SHOWN: Final = 5
ENDED: Final = "was removed from the cluster on another host, and does nothing here"
_REMEDY: Final = "isolator plugin remove {0}, or isolator cluster place {0} gives it to the cluster anew"
AGAIN: Final = 1.0
"""Seconds until the log is asked again for what a command has wished for."""


class Member:
    """This host in its cluster. ``folder`` is for copies of the fold."""

    def __init__(
        self,
        settings: Cluster,
        store: Store,
        queue: ClusterQueue,
        registry: Registry,
        catalogue: Catalogue,
        fences: Fences,
        audit: AuditClient,
        folder: Path,
    ) -> None:
        self._settings, self._store, self._folder = settings, store, folder
        self._registry, self._catalogue, self._fences, self._audit = registry, catalogue, fences, audit
        self._wished, self._tasks = asyncio.Event(), Tasks()
        store.make(_WISHES)
        self._lost: dict[str, str] = {}
        """By plugin, what it has lost since this process started."""
        self.node: Node | None = None
        self.types = ClusterTypes(store, catalogue, lambda: self._state, self._decide)
        self.follower = QueueFollower(queue, self._subscriptions, self._ready, fences, self._lost_events, self.types)
        self.values = ClusterKeyValue(store, self.follower, self._decide)

    def problems(self) -> Sequence[str]:
        """Problems of this host's part, a line each."""
        if self.node is None:
            return self.types.lines()
        ended = [f"plugin {name} {ENDED}; {_REMEDY.format(name)}" for name in self.follower.ended]
        return [*self.types.lines(), *ended, *self.node.problems.lines.values()]

    async def start(self) -> None:
        """Begin to follow the log: what the registry does not know by now would be passed over.

        No plugin that one host has is started before this host holds it.
        """
        node = self.node = Node(
            self._settings, connect(self._settings), self._store, self.follower, self._fences, self._folder,
            notice=self._notice,
        )  # fmt: skip
        self.follower.attach(node)
        await node.start()
        self.types.follow()
        self.follower.tell()
        wishes = self._store.rows("SELECT plugin FROM cluster_wishes")
        for plugin in self._registry:
            self.follower.serve(plugin.name, before=(plugin.name,) not in wishes)
        self._tasks.keep("wishes for the cluster", self._fulfil)
        self._tasks.run("event types for the cluster", self.types.share())

    async def close(self) -> None:
        """End this host's part; its leases run out, or its successor goes on with them."""
        self._tasks.cancel()
        self.follower.close()
        if self.node is not None:
            await self.node.close()

    def serve(self, plugin: str) -> None:
        """Take note of a plugin that this host has, or that has changed."""
        if self.node is None:
            return
        found, known = self._registry.get(plugin), self.node.state.plugins.get(plugin)
        holds = self.follower.epoch(plugin) is not None
        if holds and found is not None and known is not None and found.digest != known.plugin.digest:
            # Its holder has another version now: it was updated, or the new one failed.
            self._tasks.run(f"version of {plugin}", self.registered(found, new=False))
        self.follower.serve(plugin)

    def forget(self, plugin: str) -> None:
        """Take note of a plugin that this host has no more."""
        if self.node is not None:
            self.follower.forget(plugin)
            self.follower.look()

    async def registered(self, plugin: Plugin, *, new: bool) -> None:
        """Have the cluster use the version of a plugin that this host has; a command changed it here. Safe on disk.

        ``new``: also of a plugin that the cluster does not know; one host has that.
        """
        known = self._state.plugins.get(plugin.name)
        if known is not None and known.plugin.digest != plugin.digest:
            one = known.plugin
            await self._wish(
                Described(one.name, plugin.digest, one.placement, one.shards, one.labels, hooks=plugin.wanted)
            )
        elif known is None and new:
            await self._wish(Described(plugin.name, plugin.digest, hooks=plugin.wanted))

    async def removed(self, name: str) -> None:
        """End a plugin in the cluster if no other host has it; a command removed it here. Safe on disk."""
        if name in self._state.plugins:
            await self.end(name)

    def check_alone(self, name: str) -> None:
        """Raise UsageError for a plugin that another living host has, too, or that is none of the cluster."""
        others = self._others(name)
        if name not in self._state.plugins:
            raise UsageError(f"plugin {name}", "is none of the cluster", "see 'isolator cluster status'")
        if others:
            why = f"{', '.join(others)} {'has' if len(others) == 1 else 'have'} it, too"
            raise UsageError(f"plugin {name}", why, "remove it there: the cluster forgets it with its last host")

    async def end(self, name: str) -> None:
        """End a plugin in the cluster, as soon as the log says that no living host has it. Safe on disk."""
        await self._wish(Described(name, self._state.plugins[name].plugin.digest, removed=True))

    def _others(self, name: str) -> list[str]:
        """The other living hosts that have a plugin."""
        node = self.node
        return sorted(
            host for host, member in self._state.members.items()
            if node is not None and host != node.host and name in member.beat.ready and not node.is_silent(host)
        )  # fmt: skip

    def plugin(self, name: str) -> dict[str, Any] | None:
        """The plugin as ``cluster.status`` shows it; None if the cluster does not know it."""
        if self.node is None or name not in self.node.state.plugins:
            return None
        return standing.plugin(self.node, name)

    def holders(self, name: str) -> Sequence[str]:
        """The other hosts that hold a plugin of which this one holds nothing; none if this one may act on it."""
        if self.node is None or self.follower.holds(name):
            return ()
        held = self._state.leases.items()
        return sorted({lease.holder for shard, lease in held if shard[0] == name and lease.holder != self.node.host})

    async def _wish(self, entry: Described) -> None:
        """Have an entry written, however long the log does not answer; a later one of the plugin replaces it."""
        row = (entry.name, _DESCRIBED.dump_json(entry).decode())
        await self._store.run(lambda db: db.execute("INSERT OR REPLACE INTO cluster_wishes VALUES (?,?)", row))
        self._wished.set()

    async def _fulfil(self) -> None:
        """Write what commands have wished for, one after the other."""
        while True:
            row = self._store.row("SELECT plugin, entry FROM cluster_wishes")
            if row is None:
                self._wished.clear()
                await self._wished.wait()
                continue
            try:
                entry = _DESCRIBED.validate_json(row[1])
                if not entry.removed or await self._has_ended(entry.name):
                    await self._decide(entry)
            except LogUnavailableError:
                await asyncio.sleep(AGAIN)
                continue
            await self._store.run(_forget(row))

    async def _has_ended(self, name: str) -> bool:
        """Whether no living host has a plugin, and this one has said so; raises LogUnavailableError.

        Without the log nobody seems alive; and of hosts that lose it at once, the last one to say so ends it.
        """
        if self.node is None:
            raise LogUnavailableError("this host is being started")
        await self.node.say()
        return self._registry.get(name) is None and not self._others(name)

    @property
    def _state(self) -> State:
        return self.node.state if self.node is not None else State()

    async def _decide(self, entry: Entry) -> Applied:
        if self.node is None:
            raise LogUnavailableError("this host is being started")
        return await self.node.decide(entry)

    def _notice(self, kind: Kind, line: str | None) -> None:
        self._audit.record(ClusterProblem(kind=kind, why=line))

    def _lost_events(self, losses: Sequence[Loss]) -> None:
        """Record what plugins will never get, and say so until the daemon is started again."""
        for one in losses:
            sender, series, first, last = one.range
            end = last if last < MAX_NUMBER else None
            record = EventLost(sender=sender, series=series, first=first, last=end, why=one.why)
            self._audit.record(record, plugin=one.plugin)
        for plugin in dict.fromkeys(one.plugin for one in losses):
            mine = [one for one in losses if one.plugin == plugin]
            more = f" and {len(mine) - _SHOWN} more" if len(mine) > _SHOWN else ""
            line = f"events for plugin {plugin} are lost ({', '.join(str(one.range) for one in mine[:_SHOWN])}{more}): "
            line += f"{mine[0].why}; the trail has the numbers (event.lost)"
            _log.error("%s", line)
            self._lost[plugin] = line
        if self.node is not None:
            self.node.problems.begin("events_lost", "; ".join(self._lost.values()))

    def _ready(self) -> Sequence[str]:
        plugins = self._state.plugins
        return [
            one.name for one in self._registry
            if one.state not in _UNABLE and one.name in plugins and plugins[one.name].plugin.digest == one.digest
        ]  # fmt: skip

    def _subscriptions(self, event: Event) -> Mapping[str, Subscriber]:
        """The subscribers of an event, which another host may have emitted: it is validated here once more."""
        try:
            checked = self._catalogue.validate(event.name, json.loads(event.payload))
        except (IsolatorError, ValueError) as error:
            _log.warning("%s of another host is delivered to nobody here: %s", event.id, error)
            return {}
        found = self._registry.subscribers(checked.type, checked.fields)
        return {one.plugin: one for one in found if not self.follower.has_ended(one.plugin)}


def _forget(row: tuple[str, str]) -> Callable[[sqlite3.Connection], object]:
    return lambda db: db.execute("DELETE FROM cluster_wishes WHERE plugin=? AND entry=?", row)
