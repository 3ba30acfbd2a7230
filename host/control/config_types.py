"""Verbs and answers about plugins' config."""

from __future__ import annotations

from dataclasses import field
from typing import TypedDict

from host.control.parameters import Request
from host.control.plugin_types import ConfigItem
from host.control.terms import Config, Name


class ConfigItems(TypedDict):
    items: list[ConfigItem]


class ConfigChange(TypedDict):
    restarted: bool


class Reencrypted(TypedDict):
    values: int


class ConfigList(Request, verb="config.list", role="viewer", result=ConfigItems):
    """List a plugin's config: keys, types and values, but never the value of a secret."""

    name: Name


class ConfigSet(Request, verb="config.set", role="operator", recorded=True, result=ConfigChange):
    """Set values of a plugin's config, and restart the plugin if it runs."""

    name: Name
    config: Config = field(default_factory=dict, repr=False)


class ConfigUnset(Request, verb="config.unset", role="operator", recorded=True, result=ConfigChange):
    """Forget a value of a plugin's config, and restart the plugin if it runs."""

    name: Name
    key: Name


class ConfigRotateKey(Request, verb="config.rotate_key", role="operator", recorded=True, result=Reencrypted):
    """Encrypt every plugin's config with a new key."""
