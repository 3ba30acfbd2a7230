"""From the queue to the sidecars: one worker per plugin.

A worker takes a delivery, makes sure the sidecar runs (``run.ensure``; the first event starts it), asks the supervisor
for a connected socket (``run.connect``), checks who is at the other end, hands the ``event.dispatched`` record to the
audit *before* the request is written (so that whatever the plugin then does can be given its cause), sends, waits for
the reply, records the outcome. Workers share nothing but the event loop: a plugin that hangs, floods or crashes costs
its own queue time and nobody else's.

Until the request is written nothing counts as an attempt: a sidecar that is not running, still starting or refusing
connections holds its worker, with growing pauses, and any news of the plugin ends the pause. Once it is written,
silence is ``unknown``: an attempt that failed and is repeated. An event in whose attempt the plugin crashed twice is
quarantined, and the plugin goes on with the next.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import socket
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

from host.channel import LostError, NotSentError, Outcome, oneshot_request, read_reply
from host.channel.oneshot import exchange
from host.events import Catalogue
from host.queue import Consumer, Delivery, Result, State
from host.queue.sqlite import SqliteQueue, backoff
from host.registry import Plugin, Registry
from host.secrets import Redactor
from host.wire import peer_of
from isolator.audit.client import AuditClient
from isolator.errors import IsolatorError
from isolator.ipc import Message

CONNECT_DEADLINE = 10.0
"""Seconds for the sidecar's socket to appear and accept."""
HOLD_FIRST, HOLD_LONGEST = 0.25, 30.0
CRASHES_TO_QUARANTINE = 2
STORED_REPLY = 4096
CRASH_WINDOW = 5.0
"""Seconds within which a death of the sidecar is blamed on the attempt whose connection broke."""


class Caller(Protocol):
    """The part of ``isolator.ipc.Channel`` that dispatch needs."""

    async def call(self, op: str, /, *, timeout: float | None = None, **fields: Any) -> Message:
        """Ask the supervisor."""


@dataclass
class Shared:
    """What every worker uses."""

    supervisor: Caller
    queue: SqliteQueue
    registry: Registry
    catalogue: Catalogue
    audit: AuditClient
    redactor: Callable[[str], Redactor]
    halt_without_audit: bool = True

    def _halted(self) -> bool:
        return self.halt_without_audit and self.audit.blocked is not None

    async def may_dispatch(self) -> None:
        """Return once the trail and the database can be written; nothing is sent before."""
        while self._halted() or self.queue.store.blocked is not None:
            if self._halted():
                await self.audit.writable()
            else:
                await self.queue.store.unblocked.wait()


class Worker:
    """Delivers one plugin's events, one at a time."""

    def __init__(self, shared: Shared, name: str) -> None:
        self.name = name
        self.status = "idle"
        self.holding: str | None = None
        """Why nothing is being sent at the moment, else None."""
        self._shared = shared
        self._consumer: Consumer = shared.queue.consumer(name)
        self._news = asyncio.Event()
        self._run: str | None = None
        self._busy: Delivery | None = None
        self._died: set[str] = set()
        self._suspect: tuple[str, Delivery, float] | None = None
        self._pause = HOLD_FIRST
        self._task = asyncio.get_running_loop().create_task(self._work(), name=f"dispatch {name}")

    def news(self) -> None:
        """Something changed about the plugin: look again."""
        self._pause = HOLD_FIRST
        self._news.set()

    def run_started(self, run: str) -> None:
        """The supervisor started a sidecar."""
        self._run = run
        self.news()

    def run_ended(self, run: str, *, expected: bool) -> None:
        """The sidecar is gone; when nobody wanted that, the event it was working on may be to blame."""
        if self._run == run:
            self._run = None
        if not expected:
            if self._busy is not None:
                self._died.add(run)
            elif self._suspect is not None and self._suspect[0] == run:
                _, delivery, at = self._suspect
                if asyncio.get_running_loop().time() - at < CRASH_WINDOW:
                    self._blame(delivery)
            self._suspect = None
        self.news()

    async def close(self) -> None:
        """Stop; what is in flight counts as an attempt with an unknown outcome at the next start."""
        self._task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await self._task

    async def _work(self) -> None:
        while True:
            self.status = "idle"
            delivery = await self._consumer.take()
            await self._shared.may_dispatch()
            try:
                await self._deliver(delivery)
                self._pause = HOLD_FIRST
                self.holding = None
            except NotSentError as error:
                self._consumer.release(delivery)
                await self._hold(str(error))
            except IsolatorError as error:
                self._consumer.release(delivery)
                await self._hold(str(error))

    async def _hold(self, why: str) -> None:
        self.status, self.holding = "holding", why
        self._news.clear()
        pause, self._pause = self._pause, min(self._pause * 2, HOLD_LONGEST)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(pause):
                await self._news.wait()

    async def _deliver(self, delivery: Delivery) -> None:
        plugin = self._shared.registry.get(self.name)
        event = delivery.event
        assert event is not None
        hook = plugin.hooks.get(event.name) if plugin is not None else None
        if plugin is None or hook is None:
            self._give_up(delivery, "dead", "the plugin no longer receives this event")
            return
        request = oneshot_request(
            event,
            hook,
            self._shared.catalogue.get(event.name),
            attempt=delivery.attempts + 1,
            timeout=plugin.timeout,
            major=plugin.major,
            meta=plugin.manifest is None or plugin.manifest.transport.meta == "fit",
        )
        if request is None:
            self._give_up(delivery, "dead", "payload_too_large")
            return
        sock, run = await self._connect(plugin)
        try:
            if self._foreign(sock, plugin, run, delivery):
                return
            self._record_dispatch(delivery, run, request)
            self._consumer.sent(delivery)
            self._busy, self.status = delivery, "in_flight"
            began = time.perf_counter_ns()
            try:
                outcome = read_reply(await exchange(sock, request, plugin.timeout))
                broken = False
            except LostError as error:
                outcome, broken = Outcome("unknown", detail=str(error)), error.crash
            latency = (time.perf_counter_ns() - began) // 1000
        finally:
            self._busy = None
            sock.close()
        self._conclude(plugin, delivery, run, outcome, latency, broken=broken)

    async def _connect(self, plugin: Plugin) -> tuple[socket.socket, str]:
        self.status = "starting" if self._run is None else "connecting"
        if self._run is None:
            answer = await self._shared.supervisor.call("run.ensure", name=self.name, reason="event")
            self._run = str(answer.fields["run"])
            answer.close()
        run = self._run
        try:
            answer = await self._shared.supervisor.call(
                "run.connect", name=self.name, run=run, deadline=CONNECT_DEADLINE, timeout=CONNECT_DEADLINE + 5
            )
        except IsolatorError:
            # The run may have ended meanwhile: ask again what runs.
            self._run = None
            raise
        if len(answer.fds) != 1:
            answer.close()
            raise NotSentError("the supervisor sent no connection")
        sock = socket.socket(fileno=answer.fds.pop())
        sock.setblocking(False)
        return sock, run

    def _foreign(self, sock: socket.socket, plugin: Plugin, run: str, delivery: Delivery) -> bool:
        """Whether somebody else than the plugin serves the socket; then nothing is sent and the trail says so.

        A plugin owns its socket's directory and may put a hard link to another's socket there, or pass its name
        on; the kernel says who called listen().
        """
        uid = peer_of(sock)[1]
        if plugin.uid is None or uid == plugin.uid:
            return False
        detail = f"its socket is served by uid {uid} instead of {plugin.uid}; nothing was sent"
        self._shared.audit.record("plugin.health", plugin=self.name, run=run, ok=False, detail=detail)
        delivery.attempts += 1
        self._retry_or_bury(plugin, delivery, Result("retry", "foreign_peer", detail), None)
        return True

    def _record_dispatch(self, delivery: Delivery, run: str, request: bytes) -> None:
        assert delivery.event is not None
        self._shared.audit.record(
            "event.dispatched",
            plugin=self.name,
            run=run,
            event_id=delivery.event.id,
            delivery_id=delivery.id,
            urgent=True,
            attempt=delivery.attempts + 1,
            queued_us=int((asyncio.get_running_loop().time() - delivery.ready_at) * 1e6) if delivery.ready_at else None,
            request_bytes=len(request),
            request_sha256=hashlib.sha256(request).hexdigest(),
        )

    def _conclude(
        self, plugin: Plugin, delivery: Delivery, run: str, outcome: Outcome, latency: int, *, broken: bool
    ) -> None:
        assert delivery.event is not None
        redact = self._shared.redactor(self.name)
        reply = redact(outcome.text)[:STORED_REPLY] if outcome.text else None
        detail = redact(outcome.detail) if outcome.detail else None
        self._shared.audit.record(
            "event.response",
            plugin=self.name,
            run=run,
            event_id=delivery.event.id,
            delivery_id=delivery.id,
            attempt=delivery.attempts,
            outcome=outcome.kind,
            status=outcome.status,
            detail=detail,
            latency_us=latency,
            response_bytes=outcome.size,
            response_sha256=outcome.sha256,
            response=reply,
        )
        if outcome.kind in ("ok", "skipped"):
            state: State = "ok" if outcome.kind == "ok" else "skipped"
            self._consumer.done(delivery, Result(state, outcome.status, detail, reply, latency))
            return
        if outcome.kind == "rejected":
            self._give_up(delivery, "dead", detail or "rejected by the plugin", outcome.status, reply, latency)
            return
        result = Result("retry", outcome.status or outcome.kind, detail, reply, latency)
        if outcome.kind == "busy":
            delivery.attempts -= 1
            self._consumer.again(delivery, result, delay=outcome.retry_after or 1.0)
            return
        self._retry_or_bury(plugin, delivery, result, outcome.retry_after)
        if run in self._died:
            self._blame(delivery)
        elif broken:
            self._suspect = (run, delivery, asyncio.get_running_loop().time())
        self._died.clear()

    def _retry_or_bury(self, plugin: Plugin, delivery: Delivery, result: Result, wait: float | None) -> None:
        if delivery.attempts >= plugin.attempts:
            why = f"{delivery.attempts} attempts failed; the last: {result.detail or result.status}"
            self._give_up(delivery, "dead", why, result.status, result.reply, result.latency_us)
        else:
            delay = wait if wait is not None else backoff(delivery.attempts)
            self._consumer.again(delivery, result, delay=delay)

    def _give_up(
        self,
        delivery: Delivery,
        state: State,
        why: str,
        status: str | None = None,
        reply: str | None = None,
        latency: int | None = None,
    ) -> None:
        self._consumer.done(delivery, Result(state, status, why, reply, latency))
        self._record_end("event.dead", delivery, why)

    def _blame(self, delivery: Delivery) -> None:
        consumer = self._shared.queue.consumer(self.name)
        consumer.note_crash(delivery)
        if delivery.crashes >= CRASHES_TO_QUARANTINE:
            why = f"the plugin crashed {delivery.crashes} times while handling it"
            if consumer.cancel(delivery.seq, Result("quarantined", detail=why)) is not None:
                self._record_end("event.quarantined", delivery, why)

    def _record_end(self, record: str, delivery: Delivery, why: str) -> None:
        self._shared.audit.record(
            record,
            plugin=self.name,
            event_id=delivery.event.id if delivery.event is not None else None,
            delivery_id=delivery.id if delivery.event is not None else None,
            reason=why,
            attempts=delivery.attempts,
        )


class Dispatcher:
    """The workers by plugin."""

    def __init__(self, shared: Shared) -> None:
        self.shared = shared
        self._workers: dict[str, Worker] = {}

    def plugin_changed(self, plugin: Plugin) -> None:
        """Make sure the plugin has a worker, and let it look again."""
        worker = self._workers.get(plugin.name)
        if worker is None:
            worker = self._workers[plugin.name] = Worker(self.shared, plugin.name)
        if plugin.run is not None:
            worker.run_started(plugin.run)
        worker.news()

    def plugin_news(self, name: str) -> None:
        """Something changed that may let a held worker go on."""
        if name in self._workers:
            self._workers[name].news()

    async def plugin_removed(self, name: str) -> None:
        """Stop its worker."""
        worker = self._workers.pop(name, None)
        if worker is not None:
            await worker.close()

    def run_started(self, name: str, run: str) -> None:
        """See ``Worker.run_started``."""
        if name in self._workers:
            self._workers[name].run_started(run)

    def run_ended(self, name: str, run: str, *, expected: bool) -> None:
        """See ``Worker.run_ended``."""
        if name in self._workers:
            self._workers[name].run_ended(run, expected=expected)

    def status(self, name: str) -> dict[str, Any]:
        """What the worker is doing, for listings."""
        worker = self._workers.get(name)
        return {"worker": worker.status if worker else None, "holding": worker.holding if worker else None}

    async def close(self) -> None:
        """Stop every worker."""
        workers, self._workers = list(self._workers.values()), {}
        await asyncio.gather(*(worker.close() for worker in workers))
