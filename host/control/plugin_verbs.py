"""Handlers of the verbs that show plugins and run them; those that register and change them: ``registration_verbs``."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, cast

from host.control.alarms import Alarms
from host.control.config_verbs import config_items
from host.control.server import AnyEndpoint, Caller, Endpoint
from host.control.verbs import (
    Explanation,
    ListedPlugin,
    ListedPlugins,
    LogLines,
    Nothing,
    PluginExplain,
    PluginList,
    PluginLogs,
    PluginRestart,
    PluginShow,
    PluginStart,
    PluginStop,
    ShownPlugin,
    StartedRun,
)
from host.delivery.dispatch import Dispatcher
from host.plugins.logs import STDERR_TAIL, UNREAD_LOG, Logs, bounded
from host.plugins.registry import Registry
from host.plugins.secrets import ConfigStore
from host.queue.sqlite import SqliteQueue
from host.supervisor_link import SupervisorLink
from isolator.errors import IsolatorError


class PluginVerbs:
    """Plugins as they are: listed, explained, started, stopped."""

    def __init__(
        self,
        link: SupervisorLink,
        registry: Registry,
        config: ConfigStore,
        queue: SqliteQueue,
        dispatcher: Dispatcher,
        logs: Logs,
        alarms: Alarms,
    ) -> None:
        self._link, self._registry, self._config, self._queue = link, registry, config, queue
        self._dispatcher, self._logs, self._alarms = dispatcher, logs, alarms

    def endpoints(self) -> list[AnyEndpoint]:
        """The verbs with their handlers."""
        return [
            Endpoint(PluginList, self.list_all),
            Endpoint(PluginShow, self.show),
            Endpoint(PluginExplain, self.explain),
            Endpoint(PluginLogs, self.logs),
            Endpoint(PluginStart, self.start),
            Endpoint(PluginStop, self.stop),
            Endpoint(PluginRestart, self.restart),
        ]

    async def list_all(self, _: PluginList, __: Caller) -> ListedPlugins:
        return {"plugins": [self._listed(entry) for entry in await self._entries()], "alarms": self._alarms.lines()}

    async def show(self, request: PluginShow, _: Caller) -> ShownPlugin:
        plugin = self._registry.need(request.name)
        entry = next((e for e in await self._entries() if e.get("name") == plugin.name), plugin.raw)
        manifest, log = plugin.manifest, self._logs.of(plugin.name)
        return {
            **self._listed(entry),
            "effective": plugin.raw.get("effective"),
            "manifest": plugin.raw.get("manifest"),
            "mode": plugin.mode,
            "hooks": sorted(plugin.hooks.values()),
            "config": config_items(self._config, plugin.name, manifest),
            "missing": self._config.missing(plugin.name, manifest) if manifest is not None else [],
            "stderr": [text for _, text in log.stderr_tail][-STDERR_TAIL:],
            "held_by": self._queue.consumer(plugin.name).held_by,
            "log_bytes_dropped": log.dropped,
        }

    async def explain(self, request: PluginExplain, _: Caller) -> Explanation:
        return cast(Explanation, (await self._link.explain(self._registry.need(request.name).name)).to_json())

    async def logs(self, request: PluginLogs, caller: Caller) -> LogLines:
        log = self._logs.of(self._registry.need(request.name).name)
        lines = log.read(request.lines)
        if request.follow:
            caller.follows = True
            caller.narrow(UNREAD_LOG)
            caller.on_close.append(log.follow(bounded(caller.drained, caller.notify)))
        return {"lines": [json.loads(entry) for entry in lines], "dropped": log.dropped}

    async def start(self, request: PluginStart, _: Caller) -> StartedRun:
        run = await self._link.ensure_run(self._registry.need(request.name).name, "operator")
        return {"run": run.run, "pid": run.pid}

    async def stop(self, request: PluginStop, _: Caller) -> Nothing:
        await self._link.stop_run(self._registry.need(request.name).name, "operator")
        return {}

    async def restart(self, request: PluginRestart, _: Caller) -> StartedRun:
        run = await self._link.restart_run(self._registry.need(request.name).name, "restart")
        return {"run": run.run, "pid": run.pid}

    async def _entries(self) -> list[dict[str, Any]]:
        """The supervisor's entries with live figures, or the last known ones while it does not answer."""
        try:
            return [entry.to_json() for entry in await self._link.entries()]
        except IsolatorError:
            return [plugin.raw for plugin in self._registry]

    def _listed(self, entry: Mapping[str, Any]) -> ListedPlugin:
        name = str(entry.get("name"))
        plugin = self._registry.get(name)
        shown = {key: value for key, value in entry.items() if key not in ("manifest", "effective")}
        error = entry.get("error") or (plugin.error if plugin is not None else None)
        if error and shown.get("state") == "pending":
            shown["state"] = "rejected"  # the parts of its manifest that only this process reads are wrong
        shown["error"] = error
        effective = plugin.effective.resources if plugin is not None and plugin.effective is not None else None
        shown["caps"] = effective and {"memory": effective.memory, "cpu": effective.cpu, "tasks": effective.tasks}
        shown["queue"] = self._queue.consumer(name).depth if plugin is not None else 0
        return cast(ListedPlugin, shown | self._dispatcher.status(name))
