"""Handlers of the ``config`` verbs."""

from __future__ import annotations

from typing import cast

from host.control.config_types import (
    ConfigChange,
    ConfigItems,
    ConfigList,
    ConfigRotateKey,
    ConfigSet,
    ConfigUnset,
    Reencrypted,
)
from host.control.endpoints import Caller, Verbs, serves
from host.lifecycle.lifecycle import PluginLifecycle
from host.plugins.registry import Registry
from host.plugins.secrets import ConfigStore
from isolator.audit.client import AuditClient
from isolator.audit.schema import ConfigChanged
from isolator.errors import IsolatorError


class ConfigVerbs(Verbs):
    """Config of registered plugins, and the key that encrypts it."""

    def __init__(self, registry: Registry, config: ConfigStore, lifecycle: PluginLifecycle, audit: AuditClient) -> None:
        self._registry, self._config, self._lifecycle, self._audit = registry, config, lifecycle, audit

    @serves(ConfigList)
    async def list_items(self, request: ConfigList, _: Caller) -> ConfigItems:
        plugin = self._registry.need(request.name)
        return cast(ConfigItems, {"items": self._config.listing(plugin.name, plugin.manifest)})

    @serves(ConfigSet)
    async def set_values(self, request: ConfigSet, caller: Caller) -> ConfigChange:
        plugin = self._registry.need(request.name)
        if plugin.manifest is None:
            raise IsolatorError(f"plugin {plugin.name}", plugin.error or "its manifest cannot be read")
        await self._config.set(plugin.name, plugin.manifest, request.config)
        keys = sorted(request.config)
        self._audit.record(ConfigChanged(names=keys, by=caller.by), plugin=plugin.name)
        return {"restarted": await self._lifecycle.restart_for_config(plugin, keys)}

    @serves(ConfigUnset)
    async def unset_value(self, request: ConfigUnset, caller: Caller) -> ConfigChange:
        plugin = self._registry.need(request.name)
        await self._config.unset(plugin.name, request.key)
        self._audit.record(ConfigChanged(names=[request.key], by=caller.by), plugin=plugin.name)
        return {"restarted": await self._lifecycle.restart_for_config(plugin, [request.key])}

    @serves(ConfigRotateKey)
    async def rotate_key(self, _: ConfigRotateKey, caller: Caller) -> Reencrypted:
        count = await self._config.rotate()
        self._audit.record(ConfigChanged(names=[], rotated=count, by=caller.by))
        return {"values": count}
