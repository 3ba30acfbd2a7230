"""The workers by plugin: what one of them does is in ``worker``.

Workers share nothing but the event loop: a plugin that hangs, floods or crashes costs its own queue time and nobody
else's.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from typing import Any

from host.delivery.worker import Shared, Worker
from host.plugins.registry import Plugin


class Dispatcher:
    """The workers by plugin."""

    def __init__(self, shared: Shared) -> None:
        self.shared = shared
        self.workers: dict[str, Worker] = {}

    def plugin_changed(self, plugin: Plugin) -> None:
        """Make sure the plugin has a worker, and let it look again."""
        worker = self.workers.get(plugin.name)
        if worker is None:
            worker = self.workers[plugin.name] = Worker(self.shared, plugin.name)
        if plugin.run is not None and plugin.state == "running":
            worker.run_started(plugin.run)
        worker.news()

    def plugin_news(self, name: str) -> None:
        """Something changed that may let a held worker go on."""
        if name in self.workers:
            self.workers[name].news()

    def tell(self, name: str, method: str, params: Mapping[str, Any]) -> None:
        """See ``Worker.tell``."""
        if name in self.workers:
            self.workers[name].tell(method, params)

    async def take_leave(self, name: str, run: str, reason: str) -> None:
        """See ``Worker.take_leave``."""
        if name in self.workers:
            await self.workers[name].take_leave(run, reason)

    async def plugin_removed(self, name: str) -> None:
        """Stop its worker."""
        worker = self.workers.pop(name, None)
        if worker is not None:
            await worker.close()

    def run_started(self, name: str, run: str) -> None:
        """See ``Worker.run_started``."""
        if name in self.workers:
            self.workers[name].run_started(run)

    def run_ended(self, name: str, run: str, *, expected: bool) -> None:
        """See ``Worker.run_ended``."""
        if name in self.workers:
            self.workers[name].run_ended(run, expected=expected)

    def status(self, name: str) -> dict[str, Any]:
        """What the worker is doing, for listings."""
        worker = self.workers.get(name)
        return {"worker": worker.status if worker else None, "holding": worker.holding if worker else None}

    async def close(self) -> None:
        """Stop every worker."""
        workers, self.workers = list(self.workers.values()), {}
        await asyncio.gather(*(worker.close() for worker in workers))
