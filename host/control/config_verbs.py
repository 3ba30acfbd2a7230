"""Handlers of the ``config`` verbs."""

from __future__ import annotations

from typing import cast

from host.control import config_types
from host.control.endpoints import Caller, Verbs, serves
from host.lifecycle.lifecycle import PluginLifecycle
from host.plugins.registry import Registry
from host.plugins.secrets import ConfigStore
from host.queue.owed import Debts
from isolator.audit.schema import ConfigChanged
from isolator.errors import IsolatorError


class ConfigVerbs(Verbs):
    """Config of registered plugins, and the key that encrypts it."""

    def __init__(self, registry: Registry, config: ConfigStore, lifecycle: PluginLifecycle, debts: Debts) -> None:
        self._registry, self._config, self._lifecycle, self._debts = registry, config, lifecycle, debts

    @serves(config_types.ConfigList)
    async def list_items(self, request: config_types.ConfigList, _: Caller) -> config_types.ConfigItems:
        plugin = self._registry.need(request.name)
        return cast(config_types.ConfigItems, {"items": self._config.listing(plugin.name, plugin.manifest)})

    @serves(config_types.ConfigSet)
    async def set_values(self, request: config_types.ConfigSet, caller: Caller) -> config_types.ConfigChange:
        plugin = self._registry.need(request.name)
        if plugin.manifest is None:
            raise IsolatorError(f"plugin {plugin.name}", plugin.error or "its manifest cannot be read")
        keys = sorted(request.config)
        change = self._debts.of_plugin(plugin.name, lambda: ConfigChanged(names=keys, by=caller.by))
        with change:
            await self._config.set(plugin.name, plugin.manifest, request.config, beside=change.note)
        return {"restarted": await self._lifecycle.restart_for_config(plugin, keys)}

    @serves(config_types.ConfigUnset)
    async def unset_value(self, request: config_types.ConfigUnset, caller: Caller) -> config_types.ConfigChange:
        plugin = self._registry.need(request.name)
        change = self._debts.of_plugin(plugin.name, lambda: ConfigChanged(names=[request.key], by=caller.by))
        with change:
            await self._config.unset(plugin.name, request.key, beside=change.note)
        return {"restarted": await self._lifecycle.restart_for_config(plugin, [request.key])}

    @serves(config_types.ConfigRotateKey)
    async def rotate_key(self, _: config_types.ConfigRotateKey, caller: Caller) -> config_types.Reencrypted:
        change = self._debts.of_plugin(None, lambda count: ConfigChanged(names=[], rotated=count, by=caller.by))
        with change:
            return {"values": await self._config.rotate(change.note)}
