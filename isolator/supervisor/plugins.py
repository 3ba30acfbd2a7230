"""Table of the daemon's plugins; one thing at a time happens to each.

Whoever starts, stops, adds, exchanges or removes a plugin holds its lock; an event that wants it meanwhile waits.
Versions are exchanged in ``updates.py``; ``policy_watch.py`` follows edited policy files.
"""

from __future__ import annotations

import asyncio
import logging
from collections import defaultdict
from collections.abc import Coroutine
from dataclasses import replace
from typing import Any, TypeVar

from isolator.audit.schema import PluginPending, PluginRejected
from isolator.errors import DeniedError, IsolatorError, NeedsApprovalError, NotFoundError, UnavailableError
from isolator.ipc.messages import (
    PendingVersion,
    PluginEntry,
    PluginState,
    PluginTurned,
    RegisteredEntry,
    StartInvocation,
)
from isolator.layers.ledger import EVERY_LAYER
from isolator.registration.discovery import Discovery, Found
from isolator.registration.proposals import Loaded
from isolator.registration.registrar import Registrar
from isolator.registration.store import Registration
from isolator.supervisor.fences import FROZEN, LEASE_LOST
from isolator.supervisor.invocations import Invocation
from isolator.supervisor.lifecycle.plugin import Plugin
from isolator.supervisor.run import Run, RunContext
from isolator.volume.volume import Volume

T = TypeVar("T")
logger = logging.getLogger(__name__)


class PluginTable:
    """Every plugin by name, and the folders in which others are found."""

    def __init__(self, context: RunContext, registrar: Registrar, plugin_dirs: tuple[str, ...]) -> None:
        self.plugins: dict[str, Plugin] = {}
        self.registrar = registrar
        self.discovery = Discovery(plugin_dirs, registrar.reader, self._sources, self._discovered)
        self._context = context
        context.fences.plugins, context.fences.lose = self.plugins, self._lose
        self._locks: defaultdict[str, asyncio.Lock] = defaultdict(asyncio.Lock)
        self._tasks: set[asyncio.Task[Any]] = set()
        self._given_up: set[asyncio.Task[Any]] = set()
        self._closing = False
        self._stopping: set[str] = set()
        """Plugins that are being stopped, and that nobody starts again for it."""
        self._pending: dict[str, tuple[str, str, PendingVersion | None]] = {}

    def load(self) -> None:
        """Read every registered plugin; a broken one is kept as ``rejected``, an unreadable one is left out."""
        self.registrar.read_ahead()
        for name in self.registrar.names():
            try:
                plugin = self.add(self.registrar.load(name))
            except IsolatorError as error:
                logger.error("plugin %s is left out: %s", name, error)
                continue
            if plugin.error:
                logger.error("plugin %s is rejected: %s", name, plugin.error)

    def expect_starts(self, *, others: bool = False) -> None:
        """Make a cage ahead, and the broker, unless nobody can start one: then they would only take memory.

        ``others``: users may.
        """
        if self.plugins or others:
            self._context.broker.need()
            self._context.runtime.pool.begin(EVERY_LAYER)

    async def close(self) -> None:
        """Let nothing begin any more, end what is in progress, and stop every plugin."""
        self._closing = True
        self.discovery.close()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        async with asyncio.TaskGroup() as group:
            for plugin in self.plugins.values():
                group.create_task(plugin.stop("the daemon stops"))
        for name in self.plugins:
            await asyncio.to_thread(self.volume(name).close)

    def lock(self, name: str) -> asyncio.Lock:
        """The lock under which something happens to the plugin of that name."""
        return self._locks[name]

    def own(self, work: Coroutine[Any, Any, T], *, to_the_end: bool = True) -> asyncio.Task[T]:
        """Start work that ends with the daemon at the latest; ``to_the_end``: a reload waits for it."""
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        if not to_the_end:
            self._given_up.add(task)
            task.add_done_callback(self._given_up.discard)
        return task

    @property
    def under_way(self) -> list[str]:
        """Changes under way that are not to be broken off, in words."""
        changes = len(self._tasks - self._given_up)
        return [
            *filter(None, (plugin.under_way for plugin in self.plugins.values())),
            *([f"{changes} change{'s' if changes > 1 else ''} of plugins"] if changes else []),
            *(["a look through plugin_dirs"] if self.discovery.scanning else []),
        ]

    def volume(self, name: str) -> Volume:
        """The persistent state of the plugin of that name."""
        return Volume(self._context.paths.state, name, self._context.runtime.journal)

    # --- entries ---------------------------------------------------------------------------------------------

    def add(self, loaded: Loaded) -> Plugin:
        """Add a registered plugin, or put it in the place of one that was found."""
        plugin = self.plugins[loaded.registration.name] = Plugin(self._context, loaded, self.announce)
        self.discovery.found.pop(plugin.name, None)
        return plugin

    def drop(self, name: str) -> None:
        """Drop a plugin that is registered no more, and tell the host, which may have come back meanwhile."""
        del self.plugins[name]
        self._context.fences.forget(name)
        self._context.host.plugin_removed(name)

    def find(self, name: str) -> Plugin:
        """The registered plugin of that name; raises IsolatorError with the reason why there is none."""
        plugin = self.plugins.get(name)
        if plugin is not None:
            return plugin
        found = self.discovery.found.get(name)
        if found is None:
            raise NotFoundError(f"plugin {name}", "no such plugin", "see 'isolator plugin list'")
        if found.error:
            raise DeniedError(f"plugin {name}", found.error, f"correct it in {found.folder}")
        why = f"was found in {found.folder} and not yet approved"
        raise NeedsApprovalError(f"plugin {name}", why, f"isolator plugin approve {name}")

    def announce(self, plugin: Plugin) -> None:
        """Tell the host of a plugin's new state, and of the rest of its entry where that is new, too.

        The rest is most of it. A host from before this process's exec knows entries alone.
        """
        host, told = self._context.host, plugin.told
        same = told is not None and told[0] is plugin.registration and told[1] is plugin.effective
        if same and not host.process.outdated:
            host.plugin_turned(PluginTurned(**self._state(plugin)))
        else:
            host.plugin_changed(self.entry(plugin))
            plugin.told = plugin.registration, plugin.effective

    def entries(self, *, whole: bool = True) -> list[PluginEntry]:
        """Every plugin, registered or found, as the host and the command line see it; ``whole`` as for ``entry``."""
        found = [one.entry() for one in self.discovery.found.values()]
        if not whole:
            found = [replace(one, manifest=None) for one in found]
        return [*(self.entry(one, whole=whole) for one in self.plugins.values()), *found]

    def entry(self, plugin: Plugin, *, whole: bool = True) -> RegisteredEntry:
        """One registered plugin as the host and the command line see it; ``whole``: with its policy and manifest."""
        registration, effective = plugin.registration, plugin.effective
        return RegisteredEntry(
            **self._state(plugin),
            version=plugin.version,
            digest=registration.digest,
            uid=registration.uid,
            effective=effective.model_dump(mode="json") if effective and whole else None,
            effective_digest=effective.digest() if effective else None,
            manifest=plugin.manifest if whole else None,
            binary=registration.release.binary_path or None,
            previous=tuple(release.digest for release in registration.previous),
            pending=self.pending(registration),
            source=registration.source.path or registration.source.binary,
            source_files=registration.source.files,
            source_packaged=registration.release.kind == "package",
            signer=registration.release.signer,
        )

    def _state(self, plugin: Plugin) -> dict[str, Any]:
        """The fields of ``PluginTurned``, of a plugin's entry too."""
        run, lease = plugin.run, self._context.fences.notice(plugin.name)
        frozen = lease if lease == FROZEN else ""
        return {
            "name": plugin.name,
            "state": plugin.state,
            "error": "; ".join(filter(None, (frozen, plugin.error, plugin.notice, plugin.outdated, plugin.lacking))),
            "run": run.id if run else None,
            "pid": run.cage.pid if run and plugin.state == PluginState.RUNNING else None,
            "started_at": run.started_at if run else None,
            "ready": run.socket_there.is_set() if run else False,
            "restarts": plugin.restarts,
            "on_trial": plugin.on_trial,
            "lease": lease,
        }

    def pending(self, registration: Registration) -> PendingVersion | None:
        """The version that waits for approval; compared once with each version in use, as entries are sent often."""
        if registration.pending is None:
            return None
        key = (registration.digest, registration.pending.digest)
        known = self._pending.get(registration.name)
        if known is None or known[:2] != key:
            known = self._pending[registration.name] = (*key, self.registrar.waiting(registration))
        return known[2]

    # --- runs ------------------------------------------------------------------------------------------------

    async def ensure(self, name: str, reason: str) -> Run:
        """Start a plugin unless it runs, and wait until it does."""
        while True:
            self.find(name)
            async with self.lock(name):
                if self._closing:
                    raise UnavailableError("daemon", "it is stopping", "start it again")
                plugin = self.find(name)
                plugin.start(reason)
            # Outside the lock: a start may take a while and a back-off longer, and both can be stopped.
            try:
                return await plugin.wait_running()
            except UnavailableError:
                # Who stops it for another policy or version holds the lock until it has that.
                exchanged = self.lock(name).locked() and name not in self._stopping
                if plugin.state != PluginState.STOPPED or not exchanged:
                    raise

    async def begin_invocation(self, request: StartInvocation, stdin: int) -> Invocation:
        """Begin an invocation, with its standard input, which stays the caller's; raises IsolatorError."""
        self.find(request.name)
        async with self.lock(request.name):
            if self._closing:
                raise UnavailableError("daemon", "it is stopping", "start it again")
            return self.find(request.name).begin_invocation(request, stdin)

    async def end_invocations(self, cause: str) -> None:
        """Kill every invocation of every plugin; returns when nothing of them is left."""
        await asyncio.gather(*(plugin.invocations.end(cause) for plugin in self.plugins.values()))

    async def stop(self, name: str, reason: str) -> None:
        """Stop a plugin's run; a start that somebody waits for comes to nothing."""
        self.find(name)
        async with self.lock(name):
            plugin = self.find(name)
            self._stopping.add(name)
            try:
                await plugin.stop(reason)
            finally:
                self._stopping.discard(name)

    async def restart(self, name: str, reason: str) -> Run:
        """Stop and start a plugin, and wait until it runs."""
        self.find(name)
        async with self.lock(name):
            plugin = self.find(name)
            plugin.check_allowed()
            await plugin.stop(reason)
            plugin.start("operator")
        return await plugin.wait_running()

    def _lose(self, name: str) -> None:
        self.own(self.stop(name, LEASE_LOST))

    # --- discovery -------------------------------------------------------------------------------------------

    def _sources(self) -> dict[str, str]:
        return {name: plugin.registration.source.path for name, plugin in self.plugins.items()}

    def _discovered(self, changed: dict[str, Found], gone: list[str]) -> None:
        for name, found in changed.items():
            if found.error:
                logger.warning("%s is rejected: %s", found.folder, found.error)
                self._context.audit.record(PluginRejected(folder=found.folder, reason=found.error), plugin=name)
            else:
                logger.info("plugin %s was found in %s and waits for approval", name, found.folder)
                self._context.audit.record(PluginPending(folder=found.folder, version=found.version), plugin=name)
            self._context.host.plugin_changed(found.entry())
        for name in gone:
            self._context.host.plugin_removed(name)
