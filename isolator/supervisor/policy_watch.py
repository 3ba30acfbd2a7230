"""Policy files that are edited while the daemon runs, and host.toml.

A plugin's file that changes is read again. The same effective policy: nothing happens. Another one: the plugin is
restarted with it. Nonsense, or no file at all: the last good one stays in force, and the error is shown. ``host.toml``
is read at the start only: what it sets (uids, ceilings, the trail) holds for everything that runs already.
"""

from __future__ import annotations

import asyncio
from pathlib import Path

from isolator.audit.schema import ConfigChanged, PluginRejected
from isolator.linux.folder_watch import FolderWatch
from isolator.registration.proposals import Loaded
from isolator.supervisor.lifecycle import Plugin
from isolator.supervisor.plugins import PluginTable


class PolicyWatch:
    """Watches the policy files of one daemon from its making until ``close``."""

    def __init__(self, registrations: PluginTable) -> None:
        self._all = registrations
        self._daemon, self._registrar = registrations.daemon, registrations.registrar
        self._folder = self._daemon.paths.policies
        self._host_file = Path(self._daemon.config.source or self._daemon.paths.host_toml)
        self._watch = FolderWatch(self._changed)
        self._watch.set([str(self._folder), str(self._host_file.parent)])

    def close(self) -> None:
        """Stop watching."""
        self._watch.close()

    def _changed(self, seen: set[str]) -> None:
        if str(self._host_file) in seen:
            self._all.log(f"{self._host_file} has changed; it takes effect when the daemon is started again")
        plugins = self._all.plugins
        if f"{self._folder}/" in seen:
            names = set(plugins)
        else:
            names = {name for name in plugins if str(self._registrar.policy_file(name)) in seen}
        for name in names:
            self._all.own(self._policy_changed(name))

    async def _policy_changed(self, name: str) -> None:
        async with self._all.lock(name):
            plugin = self._all.plugins.get(name)
            if plugin is None:
                return
            loaded = await asyncio.to_thread(self._registrar.read, plugin.registration)
            if loaded.proposal is None:
                self._keep_last_policy(plugin, loaded)
                return
            old, new = plugin.effective, loaded.proposal.effective
            if old == new:
                if plugin.notice:
                    plugin.notice = ""
                    self._daemon.changed(plugin)
                return
            running = plugin.wanted
            await plugin.stop("its policy changed")
            plugin.take(loaded)
            changed = ConfigChanged(
                names=["policy"], file=str(self._registrar.policy_file(name)),
                old_policy_sha256=old.digest() if old else None, policy_sha256=new.digest(),
            )  # fmt: skip
            self._daemon.audit.record(changed, plugin=name)
            if running:
                plugin.begin("its policy changed")
            self._daemon.changed(plugin)

    def _keep_last_policy(self, plugin: Plugin, loaded: Loaded) -> None:
        if loaded.error in (plugin.error, plugin.notice):
            return
        if plugin.effective is None:
            plugin.error = loaded.error
        else:
            plugin.notice = f"{loaded.error}; the last good policy stays in force"
        self._all.log(f"plugin {plugin.name}: {plugin.notice or plugin.error}")
        rejected = PluginRejected(
            what="policy", reason=loaded.error, file=str(self._registrar.policy_file(plugin.name)),
            policy_sha256=plugin.effective.digest() if plugin.effective else None,
        )  # fmt: skip
        self._daemon.audit.record(rejected, plugin=plugin.name)
        self._daemon.changed(plugin)
