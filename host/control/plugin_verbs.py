"""Handlers of the verbs that show plugins and run them; those that register and change them: ``registration_verbs``."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import Any, cast

from host.control import plugin_types
from host.control.alarms import Alarms
from host.control.elsewhere import Elsewhere
from host.control.endpoints import Caller, Verbs, serves
from host.control.platform_types import PluginHealth, PluginHealthEntry, PluginsHealth
from host.control.terms import Nothing
from host.delivery.dispatch import Dispatcher
from host.delivery.health import Pinged, Watches
from host.lifecycle.supervisor_link import SupervisorLink
from host.plugins.logs import STDERR_TAIL, UNREAD_LOG, Logs, PluginLog, bounded
from host.plugins.registry import Registry
from host.plugins.secrets import ConfigStore
from host.queue.sqlite import SqliteQueue
from isolator.errors import IsolatorError, NotFoundError
from isolator.ipc import messages

_SERVING = ("stopped", "starting", "running", "stopping")
"""States in which a plugin gets its events; a stopped one is started by the next."""


class PluginVerbs(Verbs):
    """Plugins as they are: listed, explained, started, stopped."""

    def __init__(
        self,
        link: SupervisorLink,
        registry: Registry,
        config: ConfigStore,
        queue: SqliteQueue,
        dispatcher: Dispatcher,
        watches: Watches,
        logs: Logs,
        alarms: Alarms,
        in_cluster: Callable[[str], dict[str, Any] | None] = lambda _: None,
        elsewhere: Elsewhere | None = None,
    ) -> None:
        self._link, self._registry, self._config, self._queue = link, registry, config, queue
        self._dispatcher, self._watches, self._logs, self._alarms = dispatcher, watches, logs, alarms
        self._in_cluster, self._elsewhere = in_cluster, elsewhere or Elsewhere()
        self._following: set[tuple[Caller, PluginLog]] = set()

    @serves(plugin_types.PluginList)
    async def list_all(self, _: plugin_types.PluginList, __: Caller) -> plugin_types.ListedPlugins:
        return {"plugins": [self._listed(entry) for entry in await self._entries()], "alarms": self._alarms.lines()}

    @serves(plugin_types.PluginShow)
    async def show(self, request: plugin_types.PluginShow, _: Caller) -> plugin_types.ShownPlugin:
        of_cluster = self._in_cluster(request.name)
        if of_cluster is not None and self._registry.get(request.name) is None:
            raise NotFoundError(f"plugin {request.name}", _elsewhere(of_cluster), "see 'isolator cluster status'")
        plugin = self._registry.need(request.name)
        entry = next((e for e in await self._entries() if e.get("name") == plugin.name), plugin.raw)
        manifest, log = plugin.manifest, self._logs.of(plugin.name)
        shown: dict[str, Any] = {
            **self._listed(entry),
            "effective": plugin.raw.get("effective"),
            "manifest": plugin.raw.get("manifest"),
            "hooks": sorted(plugin.hooks.values()),
            "config": self._config.listing(plugin.name, manifest),
            "stderr": [text for _, text in log.stderr_tail][-STDERR_TAIL:],
            "held_by": self._queue.consumer(plugin.name).held_by,
            "log_bytes_dropped": log.dropped,
        }
        if of_cluster is not None:
            shown["cluster"] = of_cluster
        return cast(plugin_types.ShownPlugin, shown)

    @serves(PluginHealth)
    async def health(self, request: PluginHealth, _: Caller) -> PluginsHealth:
        name = self._registry.need(request.name).name if request.name else None
        entries = [entry for entry in await self._entries() if name is None or entry.get("name") == name]
        return {"plugins": [self._health(self._listed(entry)) for entry in entries]}

    def _health(self, listed: plugin_types.ListedPlugin) -> PluginHealthEntry:
        name = listed["name"]
        pinged = self._watches.last(name)
        if pinged is not None and pinged.run != listed["run"]:
            pinged = None  # that run is over
        why = _trouble(listed, pinged)
        shown = {key: value for key, value in listed.items() if key in PluginHealthEntry.__annotations__}
        ping = {key: value for key, value in vars(pinged).items() if key != "run"} if pinged is not None else None
        held_by = self._queue.consumer(name).held_by if self._registry.get(name) is not None else None
        return cast(PluginHealthEntry, {**shown, "healthy": why is None, "why": why, "held_by": held_by, "ping": ping})

    @serves(plugin_types.PluginExplain)
    async def explain(self, request: plugin_types.PluginExplain, _: Caller) -> plugin_types.Explanation:
        found = await self._link.ask(messages.ExplainPolicy(name=self._registry.need(request.name).name))
        return cast(plugin_types.Explanation, found.to_json())

    @serves(plugin_types.PluginLogs)
    async def logs(self, request: plugin_types.PluginLogs, caller: Caller) -> plugin_types.LogLines:
        log = self._logs.of(self._registry.need(request.name).name)
        lines = log.read(request.lines)
        if request.follow:
            self._follow(log, caller)
        return {"lines": [{**json.loads(entry), "plugin": log.name} for entry in lines], "dropped": log.dropped}

    def _follow(self, log: PluginLog, caller: Caller) -> None:
        """Send a caller the lines to come, each once, however often it asks for them."""
        key = caller, log
        if key in self._following:
            return
        caller.narrow(UNREAD_LOG)
        unfollow = log.follow(bounded(log.name, caller.drained, caller.notify))

        def end() -> None:
            self._following.discard(key)
            unfollow()

        self._following.add(key)
        caller.keep(end)

    @serves(plugin_types.PluginStart)
    async def start(self, request: plugin_types.PluginStart, _: Caller) -> plugin_types.StartedRun:
        run = await self._link.ask(messages.EnsureRun(name=self._startable(request.name), reason="operator"))
        return {"run": run.run, "pid": run.pid}

    @serves(plugin_types.PluginStop)
    async def stop(self, request: plugin_types.PluginStop, _: Caller) -> Nothing:
        plugin = self._registry.need(request.name)
        if plugin.run is None:
            self._elsewhere.check(plugin.name, "nothing of it runs here")
        await self._link.ask(messages.StopRun(name=plugin.name, reason="operator"))
        return {}

    @serves(plugin_types.PluginRestart)
    async def restart(self, request: plugin_types.PluginRestart, _: Caller) -> plugin_types.StartedRun:
        run = await self._link.ask(messages.RestartRun(name=self._startable(request.name)))
        return {"run": run.run, "pid": run.pid}

    @serves(plugin_types.PluginPause)
    async def pause(self, request: plugin_types.PluginPause, caller: Caller) -> plugin_types.PauseChange:
        name = self._registry.need(request.name).name
        changed = await self._dispatcher.pause(name, caller.by)
        return {"paused": True, "changed": changed, "holders": [*self._elsewhere.holders(name)]}

    @serves(plugin_types.PluginResume)
    async def resume(self, request: plugin_types.PluginResume, caller: Caller) -> plugin_types.PauseChange:
        name = self._registry.need(request.name).name
        changed = await self._dispatcher.resume(name, caller.by) is not None
        return {"paused": False, "changed": changed, "holders": [*self._elsewhere.holders(name)]}

    def _startable(self, name: str) -> str:
        """The plugin's name; raises IsolatorError where a start would only show that its config lacks a value."""
        plugin = self._registry.need(name)
        self._elsewhere.check(plugin.name, "it runs there alone")
        self._config.check_whole(plugin.name, plugin.manifest, plugin.digest)
        return plugin.name

    async def _entries(self) -> list[dict[str, Any]]:
        """The supervisor's entries with live figures, or the last known ones while it does not answer."""
        try:
            return [entry.to_json() for entry in (await self._link.ask(messages.ListPlugins())).plugins]
        except IsolatorError:
            return [plugin.raw for plugin in self._registry]

    def _listed(self, entry: Mapping[str, Any]) -> plugin_types.ListedPlugin:
        name = str(entry.get("name"))
        plugin = self._registry.get(name)
        shown = {key: value for key, value in entry.items() if key not in ("manifest", "effective")}
        error = entry.get("error") or (plugin.error if plugin is not None else None)
        if error and shown.get("state") == "pending":
            shown["state"] = "rejected"  # the parts of its manifest that only this process reads are wrong
        shown["error"] = error
        shown["mode"] = plugin.mode if plugin is not None else "oneshot"
        effective = plugin.effective.resources if plugin is not None and plugin.effective is not None else None
        shown["caps"] = effective and {"memory": effective.memory, "cpu": effective.cpu, "tasks": effective.tasks}
        shown["queue"] = self._queue.consumer(name).depth if plugin is not None else 0
        manifest = plugin.manifest if plugin is not None else None
        shown["missing"] = self._config.missing(name, manifest, plugin.digest) if plugin and manifest else []
        return cast(plugin_types.ListedPlugin, shown | self._dispatcher.status(name))


def _trouble(listed: plugin_types.ListedPlugin, pinged: Pinged | None) -> str | None:
    """The first thing that keeps a plugin from doing its work, in one line; None if nothing is known."""
    state, last = listed["state"], listed["last"]
    if state not in _SERVING:
        return f"it is {state}" + (f": {listed['error']}" if listed["error"] else "")
    if pinged is not None and not pinged.ok:
        return f"{pinged.misses} of its last pings {'was' if pinged.misses == 1 else 'were'} missed: {pinged.detail}"
    if listed["failing_since"] is not None:
        return "its attempts fail" + (f": {last['detail'] or last['status'] or last['outcome']}" if last else "")
    if listed["paused"] is not None:
        return f"paused by {listed['paused']['by']}"
    return f"its events wait: {listed['holding']}" if listed["holding"] else listed["error"]


def _elsewhere(plugin: Mapping[str, Any]) -> str:
    """Where a plugin of the cluster is that is not on this host."""
    if plugin["problem"]:
        return f"is not on this host: {plugin['problem']}"
    holders = sorted({shard["host"] for shard in plugin["shards"] if shard["host"]})
    return (
        f"is not on this host; {', '.join(holders)} {'holds' if len(holders) == 1 else 'hold'} it"
        if holders
        else ("is not on this host, and is one of the cluster")
    )
