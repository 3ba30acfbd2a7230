"""Follow policy files that are edited while the daemon runs, and host.toml.

A plugin's file that changes is read again. The same effective policy: nothing happens. Another one: the plugin is
restarted with it. Nonsense, or no file at all: the last good one stays in force, and the error is shown. ``host.toml``
is read at the start and at a reload: its settings (uids, ceilings, the trail) hold for everything that runs already.
"""

from __future__ import annotations

import asyncio
import logging
from pathlib import Path

from isolator.audit.schema import ConfigChanged, PluginRejected
from isolator.linux.folder_watch import FolderWatch
from isolator.policy.host import HostConfig
from isolator.registration.proposals import Loaded
from isolator.supervisor.lifecycle.plugin import Plugin
from isolator.supervisor.plugins import PluginTable
from isolator.supervisor.run import RunContext

logger = logging.getLogger(__name__)


class PolicyWatch:
    """Watches the policy files of one daemon from its making until ``close``."""

    def __init__(self, table: PluginTable, context: RunContext, config: HostConfig) -> None:
        self._table, self._registrar, self._audit = table, table.registrar, context.audit
        self._folder = context.paths.policies
        self._host_file = Path(config.source or context.paths.host_toml)
        self._watch = FolderWatch(self._changed)
        self._watch.set([str(self._folder), str(self._host_file.parent)])

    def close(self) -> None:
        """Stop watching."""
        self._watch.close()

    def look(self) -> None:
        """Read every policy file: nobody watched for a moment, and ``host.toml`` may have another ceiling."""
        self._changed({f"{self._folder}/"})

    def _changed(self, seen: set[str]) -> None:
        if str(self._host_file) in seen:
            logger.warning("%s has changed; it takes effect with 'isolator reload'", self._host_file)
        plugins = self._table.plugins
        if f"{self._folder}/" in seen:
            names = set(plugins)
        else:
            names = {name for name in plugins if str(self._registrar.policy_file(name)) in seen}
        for name in names:
            self._table.own(self._policy_changed(name))

    async def _policy_changed(self, name: str) -> None:
        async with self._table.lock(name):
            plugin = self._table.plugins.get(name)
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
                    self._table.announce(plugin)
                return
            running = plugin.wanted
            await plugin.stop("its policy changed")
            plugin.adopt(loaded)
            changed = ConfigChanged(
                names=["policy"], file=str(self._registrar.policy_file(name)),
                old_policy_sha256=old.digest() if old else None, policy_sha256=new.digest(),
            )  # fmt: skip
            self._audit.record(changed, plugin=name)
            if running and not plugin.fence.closed:
                plugin.start("its policy changed")
            self._table.announce(plugin)

    def _keep_last_policy(self, plugin: Plugin, loaded: Loaded) -> None:
        if loaded.error in (plugin.error, plugin.notice):
            return
        if plugin.effective is None:
            plugin.error = loaded.error
        else:
            plugin.notice = f"{loaded.error}; the last good policy stays in force"
        logger.error("plugin %s: %s", plugin.name, plugin.notice or plugin.error)
        rejected = PluginRejected(
            what="policy", reason=loaded.error, file=str(self._registrar.policy_file(plugin.name)),
            policy_sha256=plugin.effective.digest() if plugin.effective else None,
        )  # fmt: skip
        self._audit.record(rejected, plugin=plugin.name)
        self._table.announce(plugin)
