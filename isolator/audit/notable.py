"""Lines for the journal: what an operator should see of plugins without asking, each with its priority.

The trail has all of it and more; these lines only point there. Crashes, failures, quarantines and pending approvals are
shown each, a denial the first time that a plugin meets one of its kind. Nobody fills the journal with them: a plugin
has a share, and beyond it one line says where the rest is.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

from isolator.audit import schema
from isolator.audit.failures import failure
from isolator.audit.record import Incoming
from isolator.base.pacing import TokenBucket

BURST, RATE = 20.0, 20.0 / 3600
"""Lines of one plugin at once, and a second."""
PLUGINS, KINDS = 4096, 16_384
"""Plugins with a share, and kinds of denials that are remembered; beyond that all are forgotten and begin anew."""

_Data = dict[str, Any]
_EVENTS: dict[str, tuple[int, Callable[[_Data], str]]] = {
    schema.PluginCrashed.TYPE: (logging.WARNING, lambda d: f"ended: {d.get('reason') or d.get('cause')}"),
    schema.PluginFailed.TYPE: (logging.ERROR, lambda d: f"failed: {d.get('reason')}; isolator plugin start"),
    schema.PluginQuarantined.TYPE: (logging.ERROR, lambda d: f"is not started again by itself: {d.get('reason')}"),
    schema.PluginRejected.TYPE: (logging.ERROR, lambda d: f"refused: {d.get('reason')}"),
    schema.PluginPending.TYPE: (logging.WARNING, lambda d: f"{d.get('version')} waits; isolator plugin approve"),
    schema.EventQuarantined.TYPE: (logging.ERROR, lambda d: f"event set aside: {d.get('reason')}; isolator event dead"),
    schema.EventDead.TYPE: (logging.WARNING, lambda d: f"event given up: {d.get('reason')}; isolator event dead"),
}
_DENIALS: dict[str, tuple[str, str]] = {
    schema.NetDenied.TYPE: ("connection", "rule"),
    schema.NetQuery.TYPE: ("lookup", "rule"),
    schema.SyscallDenied.TYPE: ("system call", "call"),
    schema.FsDenied.TYPE: ("file", "path"),
    schema.ApiCalled.TYPE: ("host API", "method"),
}
_NOTED = frozenset({*_EVENTS, *_DENIALS, schema.NetConnect.TYPE})
_REFUSED = frozenset({"denied", "withheld", "limited", "unknown"})


class Notable:
    """Writes the lines of one daemon to ``log``."""

    def __init__(self, log: logging.Logger) -> None:
        self._log = log
        self._shares: dict[str, TokenBucket] = {}
        self._silent: set[str] = set()
        self._seen: set[tuple[str, str, str]] = set()

    def note(self, record: Incoming) -> None:
        """Write the line of a record, if it has one."""
        if record.plugin is None or record.type not in _NOTED:
            return
        if (found := _EVENTS.get(record.type)) is not None:
            level, text = found
            self._write(level, record.plugin, text(record.data))
        elif (why := failure(record.type, record.data)) is not None:
            value = str(record.data.get("error") or record.data.get("rule"))[:200]
            place = str(record.data.get("name") or record.data.get("address"))[:260]
            self._first(record.plugin, record.type, value, f"first connection or lookup that failed ({place}): {why}")
        elif record.type in _DENIALS and record.data.get("verdict", "denied") in _REFUSED:
            what, key = _DENIALS[record.type]
            value = str(record.data.get(key))[:200]
            self._first(record.plugin, record.type, value, f"first refused {what} ({value})")

    def _first(self, plugin: str, kind: str, value: str, text: str) -> None:
        """Write ``text`` the first time that a plugin meets this ``value`` of a kind."""
        if len(self._seen) >= KINDS:
            self._seen.clear()
        if (plugin, kind, value) in self._seen:
            return
        self._seen.add((plugin, kind, value))
        self._write(logging.INFO, plugin, f"{text}; isolator plugin denials")

    def _write(self, level: int, plugin: str, text: str) -> None:
        if plugin not in self._shares and len(self._shares) >= PLUGINS:
            self._shares.clear()
        share = self._shares.setdefault(plugin, TokenBucket(RATE, BURST))
        if share.try_take():
            self._silent.discard(plugin)
            self._log.log(level, "plugin %s: %s", plugin, text)
        elif plugin not in self._silent:
            self._silent.add(plugin)
            self._log.warning("plugin %s: further lines only in the trail: isolator audit query --plugin", plugin)
