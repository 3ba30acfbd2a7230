"""Health and idleness of sidecars: one task per plugin that asks for either.

Stream plugins are pinged every 30 s; three misses in a row restart the sidecar. One-shot plugins are pinged only when
their manifest asks for it (a script that ignores ``method`` would act on a ping as on an event), never while a request
is in flight, and any JSON object is a pong. A plugin is never declared dead because *this* process slept: a round in
which the clock moved much further than the round's wait is void, and so is one in which the plugin was frozen.

A plugin with an idle time is stopped when it had nothing to do for that long; the next event starts it again.
"""

from __future__ import annotations

import asyncio
import logging
import time

from host.channel.reply import LostError, NotSentError
from host.delivery.worker import Worker
from host.plugins.registry import Plugin, Registry
from host.wire.strict_json import WireError
from isolator.audit.client import AuditClient
from isolator.audit.schema import PluginHealth
from isolator.base.structs import struct_class
from isolator.errors import IsolatorError
from isolator.ipc.channel import Channel
from isolator.ipc.messages import RestartRun, StopRun
from isolator.ipc.tasks import Tasks
from isolator.linux.boottime import boottime

_log = logging.getLogger(__name__)


@struct_class(frozen=True)
class Pinged:
    """The newest ping of a plugin that ended while the run lived: at ``at`` (Unix time)."""

    run: str | None
    at: float
    ok: bool
    latency_us: int
    misses: int
    detail: str | None


OVERSLEPT = 1.0
"""Seconds by which a round may be late before its result is void."""


class Watch:
    """Health and idleness of one plugin."""

    def __init__(self, worker: Worker, registry: Registry, supervisor: Channel, audit: AuditClient) -> None:
        self._worker, self._registry, self._supervisor, self._audit = worker, registry, supervisor, audit
        self._misses = 0
        self.last: Pinged | None = None
        self._loop = asyncio.get_running_loop()
        self._tasks = Tasks()
        self._tasks.run(f"watch over {worker.name}", self._watch())

    @staticmethod
    def wanted(plugin: Plugin) -> bool:
        """Whether the plugin's manifest makes a watch necessary."""
        spec = plugin.manifest
        return spec is not None and (pings(plugin) or spec.activation.idle is not None)

    async def close(self) -> None:
        """Stop watching."""
        await self._tasks.close()

    async def _watch(self) -> None:
        while True:
            plugin = self._registry.get(self._worker.name)
            spec = plugin.manifest if plugin is not None else None
            if plugin is None or spec is None:
                return
            idle = spec.activation.idle
            wait = min(spec.health.interval if pings(plugin) else 3600.0, idle if idle is not None else 3600.0)
            before = self._loop.time()
            await asyncio.sleep(wait)
            if self._loop.time() - before > wait + OVERSLEPT:
                self._misses = 0
                continue
            try:
                if idle is not None and self._worker.run is not None and self._idle_for() >= idle:
                    await self._supervisor.ask(StopRun(name=plugin.name, reason="idle"))
                elif pings(plugin) and self._worker.run is not None:
                    await self._ping(plugin)
            except IsolatorError:
                pass  # the supervisor's reason, which shows with the plugin
            except Exception:  # one round's; the next one is due all the same
                _log.exception("plugin %s: no ping", plugin.name)

    def _idle_for(self) -> float:
        return 0.0 if not self._worker.idle else self._loop.time() - self._worker.last_used

    async def _ping(self, plugin: Plugin) -> None:
        assert plugin.manifest is not None
        health, run = plugin.manifest.health, self._worker.run
        before, began, at = self._loop.time(), time.perf_counter_ns(), boottime()
        why, pinged = None, True
        try:
            pinged = await self._worker.ping(plugin, health.timeout)
        except (LostError, NotSentError, WireError) as error:
            why = str(error)
        if self._worker.run != run or self._loop.time() - before > health.timeout + OVERSLEPT:
            return
        if self._worker.fence.closed_since(at):  # it could not answer
            self._misses = 0
            return
        latency = (time.perf_counter_ns() - began) // 1000
        if pinged:
            self.last = Pinged(run, time.time(), why is None, latency, 0 if why is None else self._misses + 1, why)
        if why is None:
            if self._misses:
                self._audit.record(PluginHealth(ok=True, latency_us=latency, misses=0), plugin=plugin.name, run=run)
            self._misses = 0
            return
        self._misses += 1
        missed = PluginHealth(ok=False, latency_us=latency, misses=self._misses, detail=why)
        self._audit.record(missed, plugin=plugin.name, run=run)
        if self._misses >= health.misses:
            self._misses = 0
            why = f"{health.misses} pings were missed"
            await self._supervisor.ask(RestartRun(name=plugin.name, reason=why))


def pings(plugin: Plugin) -> bool:
    """Whether this plugin is pinged: as its manifest has it, by default only in stream mode."""
    if plugin.manifest is None:
        return False
    wanted = plugin.manifest.health.ping
    return plugin.mode == "stream" if wanted is None else wanted


class Watches:
    """The watches by plugin."""

    def __init__(self, registry: Registry, supervisor: Channel, audit: AuditClient) -> None:
        self._registry, self._supervisor, self._audit = registry, supervisor, audit
        self._watches: dict[str, tuple[object, Watch]] = {}

    def last(self, name: str) -> Pinged | None:
        """The newest ping of a plugin since its watch began; None before the first, and of one that is not pinged."""
        current = self._watches.get(name)
        return current[1].last if current is not None else None

    async def update(self, plugin: Plugin, worker: Worker) -> None:
        """Start, replace or end the watch of a plugin whose entry changed."""
        spec = plugin.manifest
        key = (spec.health, spec.activation, plugin.mode) if spec is not None and Watch.wanted(plugin) else None
        current = self._watches.get(plugin.name)
        if current is not None and current[0] == key:
            return
        await self.forget(plugin.name)
        if key is not None:
            self._watches[plugin.name] = (key, Watch(worker, self._registry, self._supervisor, self._audit))

    async def forget(self, name: str) -> None:
        """End the watch of a plugin."""
        watch = self._watches.pop(name, None)
        if watch is not None:
            await watch[1].close()

    async def close(self) -> None:
        """End every watch."""
        for name in list(self._watches):
            await self.forget(name)
