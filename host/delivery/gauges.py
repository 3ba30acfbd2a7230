"""Present values for the metrics: lengths of queues, states and limits of plugins."""

from __future__ import annotations

import asyncio
from typing import Any

from host.delivery.dispatch import Dispatcher
from host.plugins.registry import Plugin, Registry
from host.queue.sqlite import SqliteQueue
from isolator.audit.client import AuditClient
from isolator.ipc.tasks import essential

PLUGINS_AT_ONCE = 256
"""Plugins in one message to the metrics."""
QUEUE_BEAT = 2.0
"""Seconds between two comparisons of the queues' lengths with those that the metrics have."""


class Gauges:
    """The queues' lengths and the plugins' states and limits, sent to the metrics whenever they have changed."""

    def __init__(self, queue: SqliteQueue, registry: Registry, dispatcher: Dispatcher, audit: AuditClient) -> None:
        self._queue, self._registry, self._dispatcher, self._audit = queue, registry, dispatcher, audit
        self._sent: dict[str, int] | None = None
        self._plugins: dict[str, tuple[Plugin, bool, float | None]] = {}
        """The sources of what was sent: each entry, whether it is paused, when its oldest event was accepted."""
        self._seen: tuple[list[Plugin], frozenset[str], dict[str, float]] | None = None
        """The same of all plugins, as it was read last."""
        self._task = essential(self._run(), "gauges")

    def repeat(self) -> None:
        """Send them once more though they are the same: there is a new audit process."""
        self._sent, self._plugins, self._seen = None, {}, None

    def close(self) -> None:
        """Send them no more."""
        self._task.cancel()

    async def _run(self) -> None:
        while True:
            depths = self._queue.depths()
            if depths != self._sent:
                self._audit.gauges(queue=depths)
                self._sent = depths
            self._send_plugins()
            await asyncio.sleep(QUEUE_BEAT)

    def _send_plugins(self) -> None:
        seen = entries, paused, oldest = list(self._registry), self._dispatcher.all_paused(), self._queue.oldest()
        if seen == self._seen:
            return
        self._seen = seen
        found = {one.name: (one, one.name in paused, oldest.get(one.name)) for one in entries}
        changed: dict[str, Any] = {name: _of(*one) for name, one in found.items() if self._plugins.get(name) != one}
        changed |= dict.fromkeys(self._plugins.keys() - found.keys())
        names = list(changed)
        for begin in range(0, len(names), PLUGINS_AT_ONCE):
            self._audit.gauges(plugins={name: changed[name] for name in names[begin : begin + PLUGINS_AT_ONCE]})
        self._plugins = found


def _of(plugin: Plugin, paused: bool, oldest: float | None) -> dict[str, Any]:
    found: dict[str, Any] = {"state": plugin.state, "paused": paused}
    if oldest is not None:
        found["oldest"] = round(oldest, 3)
    if plugin.effective is not None:
        caps = plugin.effective.resources
        found |= {"memory": caps.memory, "cpu": caps.cpu / 1000, "tasks": caps.tasks, "open_files": caps.nofile}
    return found
