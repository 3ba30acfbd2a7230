"""Dispatcher: a worker per plugin.

Workers share nothing but the event loop: a plugin that hangs, floods or crashes costs its own queue time alone.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import socket
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

from host.delivery.attempts import Attempts
from host.delivery.gate import DispatchGate
from host.delivery.modes import Parts
from host.delivery.oneshot import OneshotDelivery
from host.delivery.outcome import Outcomes
from host.delivery.pauses import Paused, Pauses
from host.delivery.runs import Runs
from host.delivery.sidecar import PAUSED, RENEWED, SidecarLink
from host.delivery.stream import HostApiCall, StreamDelivery
from host.delivery.worker import Worker, WorkerState
from host.events import Catalogue
from host.fence.fences import NO_LEASE, Fences
from host.plugins.logs import Logs
from host.plugins.registry import Plugin, Registry
from host.plugins.secrets import ConfigStore, Redactor
from host.queue.interface import Queue
from isolator.audit.client import AuditClient
from isolator.ipc.channel import Channel
from isolator.ipc.fence import Fence
from isolator.ipc.messages import Environment, InvocationBegun, InvocationEnded
from isolator.ipc.succession import Departure, Descriptors

if TYPE_CHECKING:
    from host.mcp.servers import Servers

SidecarLinks = Callable[[str, Runs, AuditClient, Fence], SidecarLink]
"""Makes the link to the sidecar of a plugin: (plugin, runs, audit, fence)."""


class Dispatcher:
    """The workers by plugin; ``redactor`` gives a plugin's, ``api`` answers calls of stream plugins to the host API.

    ``servers`` loads the room of MCP.
    """

    def __init__(
        self,
        *,
        supervisor: Channel,
        queue: Queue,
        attempts: Attempts,
        gate: DispatchGate,
        registry: Registry,
        catalogue: Catalogue,
        audit: AuditClient,
        redactor: Callable[[str], Redactor],
        api: HostApiCall,
        logs: Logs,
        source: str,
        config: ConfigStore,
        environment: Callable[[str], Environment | None],
        serve_invocation: Callable[[str, str, socket.socket], None],
        end_invocation: Callable[[str, str], None],
        pauses: Pauses,
        fences: Fences,
        servers: Callable[[], Servers],
        sidecars: SidecarLinks = SidecarLink,
    ) -> None:
        self.workers: dict[str, Worker] = {}
        self._supervisor, self._queue, self._attempts, self._gate = supervisor, queue, attempts, gate
        self._runs = Runs(supervisor)
        self._registry, self._catalogue, self._audit = registry, catalogue, audit
        self._redactor, self._api, self._pauses, self._servers = redactor, api, pauses, servers
        self._fences = fences
        self._logs, self._serve_invocation, self._end_invocation = logs, serve_invocation, end_invocation
        self._source, self._config, self._sidecars = source, config, sidecars
        self._environment = environment
        self._before: dict[str, WorkerState] = {}
        """Workers of the host whose place this one takes, by plugin, until there are workers here."""
        self._descriptors = Descriptors([])

    def _new_worker(self, name: str) -> Worker:
        consumer, fence = self._queue.consumer(name), self._fences.of(name)
        sidecar = self._sidecars(name, self._runs, self._audit, fence)
        outcomes = Outcomes(name, consumer, self._audit, self._redactor, self._attempts, fence)
        before = self._before.pop(name, None)
        return Worker(
            consumer,
            self._registry,
            self._gate,
            sidecar,
            outcomes,
            OneshotDelivery(sidecar, outcomes, self._catalogue),
            StreamDelivery(sidecar, outcomes, self._catalogue, self._api, self._redacted(name)),
            Parts(
                sidecar,
                outcomes,
                self._catalogue,
                self._supervisor,
                self._redacted(name),
                self._logs,
                self._source,
                self._config,
                self._environment,
                self._serve_invocation,
                self._end_invocation,
                self._servers,
            ),
            (before, self._descriptors) if before is not None else None,
        )

    def _redacted(self, name: str) -> Callable[[str], str]:
        def redact(text: str) -> str:
            return self._redactor(name)(text)  # a new one after each change of the plugin's config

        return redact

    def plugin_changed(self, plugin: Plugin) -> None:
        """Make sure the plugin has a worker, and wake it."""
        worker = self.workers.get(plugin.name)
        if worker is None:
            worker = self.workers[plugin.name] = self._new_worker(plugin.name)
            if self._pauses.of(plugin.name) is not None:
                worker.pause()
        if plugin.run is not None and plugin.state == "running":
            worker.run_started(plugin.run)
        worker.wake()

    async def pause(self, name: str, by: str) -> bool:
        """Pause a plugin's deliveries; returns when that is safe, and whether they were not paused before."""
        if name in self.workers:
            self.workers[name].pause()
        try:
            return await self._pauses.set(name, by)
        finally:
            if self._pauses.of(name) is None and name in self.workers:
                self.workers[name].resume()  # it could not be kept

    async def resume(self, name: str, by: str) -> Paused | None:
        """Resume a plugin's deliveries; returns the pause that is over, if there was one."""
        pause = await self._pauses.end(name, by)
        if name in self.workers:
            self.workers[name].resume()
        return pause

    def paused(self, name: str) -> bool:
        """Whether a plugin is paused."""
        return self._pauses.of(name) is not None

    def all_paused(self) -> frozenset[str]:
        """The names of the plugins that are paused."""
        return self._pauses.names()

    def wake(self, name: str) -> None:
        """Let a worker that holds back try again: its obstacle may be cleared."""
        if name in self.workers:
            self.workers[name].wake()

    def lost(self, name: str) -> None:
        """Count no attempt that was under way when the plugin was lost: another host repeats it."""
        if name in self.workers:
            self.workers[name].lost()

    def notify(self, name: str, method: str, params: Mapping[str, Any]) -> None:
        """See ``Worker.notify``."""
        if name in self.workers:
            self.workers[name].notify(method, params)

    async def drain(self, name: str, run: str, reason: str) -> None:
        """See ``Worker.drain``."""
        if name in self.workers:
            await self.workers[name].drain(run, reason)

    async def plugin_removed(self, name: str) -> None:
        """Stop the plugin's worker, and forget its pause."""
        worker = self.workers.pop(name, None)
        if worker is not None:
            await worker.close()
        await self._pauses.end(name, None)
        self._fences.forget(name)

    def run_started(self, name: str, run: str) -> None:
        """See ``Worker.run_started``."""
        if name in self.workers:
            self.workers[name].run_started(run)

    def run_ended(self, name: str, run: str, *, crashed: bool) -> None:
        """See ``Worker.run_ended``."""
        if name in self.workers:
            self.workers[name].run_ended(run, crashed=crashed)

    def invocation_begun(self, begun: InvocationBegun, fds: list[int]) -> None:
        """See ``Worker.invocation_begun``."""
        if begun.name in self.workers:
            self.workers[begun.name].invocation_begun(begun, fds)

    def invocation_ended(self, ended: InvocationEnded) -> None:
        """See ``Worker.invocation_ended``."""
        if ended.name in self.workers:
            self.workers[ended.name].invocation_ended(ended)

    @contextlib.contextmanager
    def in_use(self, name: str) -> Iterator[None]:
        """Count a plugin as busy, besides its queue."""
        worker = self.workers.get(name)
        if worker is None:
            yield
            return
        with worker.in_use():
            yield

    def status(self, name: str) -> dict[str, Any]:
        """Return the worker's present step, its obstacle and how its attempts went, for listings."""
        worker = self.workers.get(name)
        pause = self._pauses.of(name)
        paused = dataclasses.asdict(pause) if pause is not None else None
        if worker is None:
            nothing = {"last": None, "failing_since": None, "next_attempt": None, "latency_p99_us": None}
            return {"worker": None, "holding": None, "paused": paused, "attempts_ended": 0, **nothing}
        return {"worker": worker.status, "holding": worker.blocked_on, "paused": paused, **worker.health()}

    def fails(self, name: str) -> bool:
        """Whether a plugin's attempts fail, or its events are held back, but by a pause or for want of its lease."""
        shown = self.status(name)
        return shown["failing_since"] is not None or shown["holding"] not in (None, PAUSED, RENEWED, NO_LEASE)

    # One host in the place of another

    def hold(self) -> None:
        """Begin nothing from now on."""
        for worker in self.workers.values():
            worker.hold()

    @property
    def unsettled(self) -> bool:
        """Whether something is under way that cannot be handed on, and may soon be over."""
        return self._attempts.unsettled or any(worker.unsettled for worker in self.workers.values())

    @property
    def connecting(self) -> bool:
        """Whether a connect is under way."""
        return any(worker.connecting for worker in self.workers.values())

    @property
    def replied(self) -> bool:
        """Whether a reply is there that is not concluded yet; it will be in a turn of the event loop or two."""
        return any(worker.replied for worker in self.workers.values())

    def pass_on(self, departure: Departure) -> tuple[WorkerState, ...]:
        """Hand every worker to the successor of this process, with its requests in flight."""
        return tuple(worker.pass_on(departure) for worker in self.workers.values())

    def take_over(self, states: Iterable[WorkerState], descriptors: Descriptors) -> None:
        """Let the workers that will be made go on with those of another host."""
        self._before, self._descriptors = {state.plugin: state for state in states}, descriptors

    async def taken_over(self) -> None:
        """Return once all of them are there, and await the replies to the other host's requests."""
        for worker in self.workers.values():
            await worker.taken_over()
        self._before.clear()

    async def close(self) -> None:
        """Stop every worker."""
        workers, self.workers = list(self.workers.values()), {}
        await asyncio.gather(*(worker.close() for worker in workers))
