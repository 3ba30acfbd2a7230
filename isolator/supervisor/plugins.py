"""The plugins of one daemon: which there are, and that one thing happens to one plugin at a time.

Whoever starts, stops, adds, exchanges or removes a plugin holds its lock; an event that wants it meanwhile waits. What
the host asks runs to its end even if the host dies. What exactly can be asked of a registration is in
``registration_ops.py``; what follows from an edited policy file in ``policy_watch.py``.
"""

from __future__ import annotations

import asyncio
from collections import defaultdict
from collections.abc import Callable, Coroutine
from typing import Any, Protocol, TypeVar

from isolator.audit.schema import PluginPending, PluginRejected
from isolator.errors import DeniedError, IsolatorError, NeedsApprovalError, NotFoundError, UnavailableError
from isolator.ipc.channel import Handler, Message
from isolator.policy.host import HostConfig
from isolator.registration.discovery import Discovery, Found
from isolator.registration.registrar import Registrar
from isolator.registration.store import Registration
from isolator.supervisor.lifecycle import Plugin, Surroundings
from isolator.supervisor.run import Run
from isolator.volume.volume import Volume

T = TypeVar("T")


class Daemon(Surroundings, Protocol):
    """What the registrations need of the supervisor."""

    config: HostConfig

    def tell_host(self, op: str, /, **fields: Any) -> None: ...


class PluginTable:
    """Every plugin by name."""

    def __init__(self, daemon: Daemon, registrar: Registrar, log: Callable[[str], None]) -> None:
        self.plugins: dict[str, Plugin] = {}
        self.daemon, self.registrar, self.log = daemon, registrar, log
        self.discovery = Discovery(daemon.config.plugin_dirs, self._sources, self._discovered, log)
        self._locks: defaultdict[str, asyncio.Lock] = defaultdict(asyncio.Lock)
        self._tasks: set[asyncio.Task[Any]] = set()
        self._closing = False
        self._waiting: dict[str, tuple[str, str, dict[str, Any] | None]] = {}

    def handlers(self) -> dict[str, Handler]:
        """What the host may ask about runs."""
        return {
            "run.ensure": self._on_ensure,
            "run.connect": self._on_connect,
            "run.stop": self.to_the_end(self._on_stop),
            "run.restart": self.to_the_end(self._on_restart),
            "plugin.status": self._on_status,
        }

    def load(self) -> None:
        """Know every registered plugin; what is broken about one is shown with it."""
        for name in self.registrar.names():
            try:
                plugin = self.plugins[name] = Plugin(self.daemon, self.registrar.load(name))
            except IsolatorError as error:
                self.log(f"plugin {name} is left out: {error}")
                continue
            if plugin.error:
                self.log(f"plugin {name} is rejected: {plugin.error}")

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
            await asyncio.to_thread(Volume(self.daemon.paths.state, name, self.daemon.runtime.journal).close)

    def lock(self, name: str) -> asyncio.Lock:
        """What is held while something happens to the plugin of that name."""
        return self._locks[name]

    def find(self, name: str) -> Plugin:
        """The registered plugin of that name; raises what tells why there is none."""
        plugin = self.plugins.get(name)
        if plugin is not None:
            return plugin
        found = self.discovery.found.get(name)
        if found is None:
            raise NotFoundError(f"plugin {name}", "no such plugin", "see 'isolator plugin list'")
        if found.error:
            raise DeniedError(f"plugin {name}", found.error, f"correct it in {found.folder}")
        raise NeedsApprovalError(
            f"plugin {name}", f"was found in {found.folder} and not yet approved", f"isolator plugin approve {name}"
        )

    def entries(self) -> list[dict[str, Any]]:
        """Every plugin, registered or found, as the host and the command line see it."""
        return [*map(self.entry, self.plugins.values()), *(found.entry() for found in self.discovery.found.values())]

    def entry(self, plugin: Plugin) -> dict[str, Any]:
        """One registered plugin as the host and the command line see it."""
        run, registration, effective = plugin.run, plugin.registration, plugin.effective
        return {
            "name": plugin.name,
            "version": plugin.version,
            "digest": registration.digest,
            "state": plugin.state,
            "error": "; ".join(filter(None, (plugin.error, plugin.notice))),
            "run": run.id if run else None,
            "pid": run.cage.pid if run and plugin.state == "running" else None,
            "uid": registration.uid,
            "started_at": run.started_at if run else None,
            "restarts": plugin.restarts,
            "effective": effective.model_dump(mode="json") if effective else None,
            "effective_digest": effective.digest() if effective else None,
            "manifest": plugin.manifest,
            "binary": registration.release.binary_path or None,
            "previous": [release.digest for release in registration.previous],
            "pending": self.pending(registration),
            "on_trial": plugin.on_trial,
            "source": registration.source.path or registration.source.binary,
        }

    def pending(self, registration: Registration) -> dict[str, Any] | None:
        """What waits for approval; worked out once for each pair of versions, as entries are sent often."""
        if registration.pending is None:
            return None
        key = (registration.digest, registration.pending.digest)
        known = self._waiting.get(registration.name)
        if known is None or known[:2] != key:
            known = self._waiting[registration.name] = (*key, self.registrar.waiting(registration))
        return known[2]

    def to_the_end(
        self, handler: Callable[[Message], Coroutine[Any, Any, T]]
    ) -> Callable[[Message], Coroutine[Any, Any, T]]:
        """A handler that is not cancelled when the host, which asked, dies."""

        async def run(message: Message) -> T:
            return await asyncio.shield(self.own(handler(message)))

        return run

    def own(self, work: Coroutine[Any, Any, T]) -> asyncio.Task[T]:
        """Do something that ends with the daemon at the latest."""
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    # --- runs ------------------------------------------------------------------------------------------------

    async def _on_ensure(self, message: Message) -> dict[str, Any]:
        run = await self._ensure(name_in(message), str(message.fields.get("reason", "event")))
        return {"run": run.id, "pid": run.cage.pid}

    async def _ensure(self, name: str, reason: str) -> Run:
        self.find(name)
        async with self.lock(name):
            if self._closing:
                raise UnavailableError("daemon", "it is stopping", "start it again")
            plugin = self.find(name)
            plugin.begin(reason)
        # Outside the lock: a start may take a while and a back-off longer, and both can be stopped.
        return await plugin.up()

    async def _on_connect(self, message: Message) -> Message:
        plugin = self.find(name_in(message))
        connection = await plugin.connect(str(message.fields["run"]), float(message.fields.get("deadline", 10)))
        return Message({}, [connection.detach()])

    async def _on_stop(self, message: Message) -> dict[str, Any]:
        name = name_in(message)
        self.find(name)
        async with self.lock(name):
            await self.find(name).stop(str(message.fields.get("reason", "asked")))
        return {}

    async def _on_restart(self, message: Message) -> dict[str, Any]:
        name = name_in(message)
        self.find(name)
        async with self.lock(name):
            plugin = self.find(name)
            await plugin.stop(str(message.fields.get("reason", "restart")))
            plugin.begin("operator")
        run = await plugin.up()
        return {"run": run.id, "pid": run.cage.pid}

    async def _on_status(self, message: Message) -> dict[str, Any]:
        # Without what is large and what the host has from ``plugin.changed``: this is asked for every listing.
        large = ("manifest", "effective")
        return {"plugins": [{k: v for k, v in entry.items() if k not in large} for entry in self.entries()]}

    # --- what is found ---------------------------------------------------------------------------------------

    def _sources(self) -> dict[str, str]:
        return {name: plugin.registration.source.path for name, plugin in self.plugins.items()}

    def _discovered(self, changed: dict[str, Found], gone: list[str]) -> None:
        for name, found in changed.items():
            if found.error:
                self.log(f"{found.folder} is rejected: {found.error}")
                self.daemon.audit.record(PluginRejected(folder=found.folder, reason=found.error), plugin=name)
            else:
                self.log(f"plugin {name} was found in {found.folder} and waits for approval")
                self.daemon.audit.record(PluginPending(folder=found.folder, version=found.version), plugin=name)
            self.daemon.tell_host("plugin.changed", plugin=found.entry())
        for name in gone:
            self.daemon.tell_host("plugin.changed", removed=name)


def name_in(message: Message) -> str:
    """The plugin that a message is about."""
    return str(message.fields.get("name"))
