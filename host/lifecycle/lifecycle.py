"""Plugins that come, change and go: every part of the host that holds something of a plugin follows."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import sqlite3
from collections import Counter, defaultdict
from collections.abc import AsyncIterator, Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from host.database.store import Store
from host.delivery.dispatch import Dispatcher
from host.delivery.health import Watches
from host.host_api.api import HostApi
from host.intake.intake import AUDIT_AHEAD
from host.lifecycle.supervisor_link import SupervisorLink
from host.plugins.logs import Logs
from host.plugins.registry import Plugin, Registry
from host.plugins.secrets import ConfigStore
from host.queue import rows
from host.queue.owed import AT_ONCE, Change, Debts, Owed, owed
from host.queue.sqlite import SqliteQueue
from isolator.audit.client import AuditClient
from isolator.audit.schema import EventDead
from isolator.errors import IsolatorError, UsageError
from isolator.ipc import messages
from isolator.ipc.body import Body
from isolator.ipc.tasks import Tasks

if TYPE_CHECKING:
    from host.membership.member import Member

EAGER_STARTS = 4
"""Eager plugins that are started at once: plugins for which events wait come first."""
EAGER_PATIENCE = 2.0
"""Seconds after which one that is not up yet makes way for the next; it goes on starting."""


class StartState(Body):
    """A start that a host waits for, on its way to another."""

    plugin: str
    reason: str


def _erase(db: sqlite3.Connection, name: str) -> None:
    db.execute("DELETE FROM kv WHERE plugin=?", (name,))
    if db.execute("SELECT 1 FROM sqlite_master WHERE name='mcp_pins'").fetchone():
        db.execute("DELETE FROM mcp_pins WHERE plugin=?", (name,))


def _dead(name: str, ended: list[tuple[int, str, int]]) -> list[Owed]:
    """The records of a removed plugin's deliveries, which ended with it."""
    why = "the plugin was removed"
    return [owed(EventDead(reason=why, attempts=attempts), name, event_id) for _, event_id, attempts in ended]


@dataclass
class PluginLifecycle:
    """The parts of the host that know plugins, kept in step with the supervisor's table."""

    link: SupervisorLink
    audit: AuditClient
    store: Store
    registry: Registry
    config: ConfigStore
    queue: SqliteQueue
    debts: Debts
    logs: Logs
    api: HostApi
    dispatcher: Dispatcher
    watches: Watches
    member: Member | None = None
    """This host's part in a cluster, where it has one."""
    _starts: dict[asyncio.Task[None], tuple[str, str]] = field(default_factory=dict, init=False)
    """Starts under way, each with the plugin's name and the reason."""
    _eager: asyncio.Semaphore = field(default_factory=lambda: asyncio.Semaphore(EAGER_STARTS), init=False)
    _removals: dict[str, asyncio.Task[None]] = field(default_factory=dict, init=False)
    """Removals under way, by name."""
    _late: Counter[str] = field(default_factory=Counter, init=False)
    """Numbers of a plugin's changes that wait for the end of a removal, or are made, by plugin."""
    _queues: defaultdict[str, asyncio.Lock] = field(default_factory=lambda: defaultdict(asyncio.Lock), init=False)
    """Locks by plugin, for these to be made in the order in which they came."""
    _tasks: Tasks = field(default_factory=Tasks, init=False)

    async def adopt(self, entry: messages.PluginEntry) -> Plugin:
        """Take over one plugin entry of the supervisor's; not before a removed plugin of that name is forgotten."""
        self._late[entry.name] += 1
        async with self._behind(entry.name):
            plugin = self.registry.put(entry)
            self._follow(plugin)
        await self.watches.update(plugin, self.dispatcher.workers[plugin.name])
        return plugin

    def turn(self, turned: messages.PluginTurned) -> None:
        """Take over a plugin's new state; in the order of ``adopt``, which may wait."""
        if self._late[turned.name]:
            self._late[turned.name] += 1
            self._tasks.run(f"state of {turned.name}", self._turn_late(turned))
        elif (plugin := self.registry.turn(turned)) is not None:
            self._follow(plugin)

    async def _turn_late(self, turned: messages.PluginTurned) -> None:
        async with self._behind(turned.name):
            if (plugin := self.registry.turn(turned)) is not None:
                self._follow(plugin)

    @contextlib.asynccontextmanager
    async def _behind(self, name: str) -> AsyncIterator[None]:
        """Wait for the removal of a plugin of that name, behind those who wait for it; ``_late`` counts each."""
        try:
            async with self._queues[name]:
                while (removal := self._removals.get(name)) is not None:
                    await asyncio.wait([removal])
                yield
        finally:
            self._late -= Counter((name,))
            if not self._late[name]:
                del self._queues[name]

    def _follow(self, plugin: Plugin) -> None:
        if not plugin.raw.get("on_trial"):
            self.config.settle(plugin.name, plugin.digest)
        self.dispatcher.plugin_changed(plugin)
        if self.member is not None:
            self.member.serve(plugin.name)

    async def registered(self, plugin: Plugin, *, new: bool = False) -> None:
        """Tell the cluster, if there is one, of a plugin that a command has changed here."""
        if self.member is not None:
            await self.member.registered(plugin, new=new)

    async def removed(self, name: str) -> None:
        """Forget a plugin that a command has removed; if this host was the last to have it, so does the cluster."""
        ended = [self.member.removed(name)] if self.member is not None else []
        await asyncio.gather(self.forget(name), *ended)

    async def end_in_cluster(self, name: str) -> None:
        """Have the cluster end with a plugin; of one that this host has, the removal here does it (``removed``).

        Raises UsageError if another living host has it.
        """
        if self.member is None:
            raise UsageError("--cluster", "this host has no [cluster] in host.toml", "leave it out")
        self.member.check_alone(name)
        if self.registry.get(name) is None:
            await self.member.end(name)

    async def forget(self, name: str) -> None:
        """Forget a removed plugin wholly; safe to repeat. At once no event is accepted for it any more."""
        removal = self._removals.get(name)
        if removal is None:
            self.registry.remove(name)
            removal = self._removals[name] = asyncio.get_running_loop().create_task(
                self._forget(name), name=f"removal of {name}"
            )
            removal.add_done_callback(lambda _: self._removals.pop(name))
        await asyncio.shield(removal)

    async def _forget(self, name: str) -> None:
        await self.watches.forget(name)
        await self.dispatcher.plugin_removed(name)
        self.api.forget(name)
        if self.member is not None:
            self.member.forget(name)
        await self._end_deliveries(name)
        await self.queue.purge(name)
        await self.config.forget(name)
        await self.store.run(lambda db: _erase(db, name))
        self.logs.remove(name)
        self.registry.erase(name)

    async def _end_deliveries(self, name: str) -> None:
        """End what a removed plugin never had, and record that."""
        self.queue.drop(name)
        last: int | None = 0
        while last is not None:
            with Change(self.debts, functools.partial(_dead, name)) as change:

                def end(db: sqlite3.Connection, after: int = last, change: Change = change) -> int | None:
                    ended = rows.end_unfinished(db, name, after, AT_ONCE)
                    change.note(db, ended)
                    return ended[-1][0] if ended else None

                last = await self.store.run(end)
            if self.audit.unacknowledged > AUDIT_AHEAD:
                await self.audit.durable(within=AUDIT_AHEAD // 2, or_blocked=True)

    def start_if_eager(self, plugin: Plugin) -> None:
        """Start a plugin that does not wait for its first event, unless it runs or cannot; failures show with it."""
        manifest = plugin.manifest
        if manifest is None or manifest.activation.start != "eager" or plugin.state != "stopped":
            return
        if not self.config.missing(plugin.name, manifest, plugin.digest):
            self._begin(plugin.name, "eager")

    def may_act(self, name: str, anew: bool) -> None:
        """Go on with a plugin whose deadline was moved on after it had passed, or begin ``anew`` with one."""
        self.dispatcher.wake(name)
        plugin = self.registry.get(name)
        if anew and plugin is not None:
            self.start_if_eager(plugin)

    def _begin(self, name: str, reason: str) -> None:
        task = asyncio.get_running_loop().create_task(self._start(name, reason), name=f"start {name}")
        self._starts[task] = (name, reason)
        task.add_done_callback(self._starts.pop)

    async def _start(self, name: str, reason: str) -> None:
        async with self._eager if reason == "eager" else contextlib.nullcontext():
            start = asyncio.ensure_future(self.link.ask(messages.EnsureRun(name=name, reason=reason)))
            try:
                await asyncio.wait([start], timeout=EAGER_PATIENCE)
            except asyncio.CancelledError:
                start.cancel()
                raise
        with contextlib.suppress(IsolatorError):
            await start

    async def restart_for_config(self, plugin: Plugin, keys: list[str]) -> bool:
        """Let a plugin whose config has changed start again if it runs, or starts; returns whether it did."""
        current = self.registry.need(plugin.name)
        if current.state == "failed":
            # What failed may well have failed for want of it.
            await self.adopt((await self.link.ask(messages.EnablePlugin(name=plugin.name))).plugin)
        self.dispatcher.wake(plugin.name)
        if current.state == "backoff":
            self._begin(plugin.name, "operator")  # it need not wait for the end of its pause either
        if current.run is None and current.state != "starting":  # one that starts may have been given those of before
            self.start_if_eager(self.registry.need(plugin.name))
            return False
        if self.dispatcher.workers[plugin.name].fence.closed:
            # It is started with these when it may act.
            await self.link.ask(messages.StopRun(name=plugin.name, reason="config"))
            return False
        # Names only: the values come with the environment of the next start.
        self.dispatcher.notify(plugin.name, "config.changed", {"keys": keys})
        await self.link.ask(messages.RestartRun(name=plugin.name, reason="config"))
        return True

    # One host in the place of another

    @property
    def unsettled(self) -> bool:
        """Whether a plugin is being forgotten."""
        return bool(self._removals)

    def pass_on(self) -> tuple[StartState, ...]:
        """The starts that are under way, for the successor of this process."""
        return tuple(StartState(plugin=name, reason=reason) for name, reason in self._starts.values())

    def take_over(self, starts: Iterable[StartState]) -> None:
        """Go on with the starts of another host."""
        for start in starts:
            if self.registry.get(start.plugin) is not None:
                self._begin(start.plugin, start.reason)

    def drop_unsettled_values(self) -> None:
        """Forget config values of versions that failed while this process was not there to hear of it.

        Not at once: an update that an earlier process asked for may still be carried out.
        """
        for name, digest in self.config.unsettled():
            asyncio.get_running_loop().call_later(self.link.exchange_timeout, self._drop_if_unsettled, name, digest)

    def _drop_if_unsettled(self, name: str, digest: str) -> None:
        plugin = self.registry.get(name)
        if plugin is None or digest not in plugin.versions:
            self.config.drop_next(name, digest)

    def close(self) -> None:
        """Wait for no eager start any more; a removal that is under way is repeated when the name is used again."""
        for task in (*self._starts, *self._removals.values()):
            task.cancel()
        self._tasks.cancel()
