"""From the queue to one sidecar.

A worker takes a delivery, makes sure the sidecar runs (``run.ensure``; the first event starts it), asks the supervisor
for a connected socket (``run.connect``), checks who is at the other end, hands the ``event.dispatched`` record to the
audit *before* the request is written (so that whatever the plugin then does can be given its cause), sends, waits for
the reply, records the outcome. Workers share nothing but the event loop: a plugin that hangs, floods or crashes costs
its own queue time and nobody else's.

Until the request is written nothing counts as an attempt: a sidecar that is not running, still starting or refusing
connections holds its worker, with growing pauses, and any news of the plugin ends the pause. Once it is written,
silence is ``unknown``: an attempt that failed and is repeated. One-shot plugins have one request in flight; stream
plugins as many as they and their manifest allow, of different keys.

Before a sidecar is stopped, for whatever reason, the supervisor says so (``take_leave``): it is sent nothing more, has
a moment to answer what it was sent, and a stream plugin that speaks ``shutdown`` is asked to finish by itself.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import time
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from host.channel.oneshot import Exchange
from host.channel.reply import (
    STREAM_MESSAGE,
    LostError,
    NotSentError,
    Outcome,
    meta_of,
    oneshot_request,
    params_text,
    read_reply,
)
from host.channel.stream import Greeting, Reply, StreamConnection, open_stream
from host.delivery.attempts import Attempts
from host.delivery.outcome import Outcomes
from host.events import Catalogue
from host.plugins.registry import Plugin, Registry
from host.plugins.secrets import Redactor
from host.queue.interface import Delivery
from host.queue.sqlite import SqliteQueue
from host.wire.strict import peer_of
from isolator.audit.client import AuditClient
from isolator.audit.schema import PluginHealth
from isolator.errors import IsolatorError
from isolator.ipc.channel import Message

CONNECT_DEADLINE = 10.0
"""Seconds for the sidecar's socket to appear and accept."""
LEAVE_GRACE = 2.0
"""Seconds that a plugin which is to stop gets to answer what it was sent, and then ``shutdown``, before its SIGTERM."""
HOLD_FIRST, HOLD_LONGEST = 0.25, 30.0


class Caller(Protocol):
    """The part of ``isolator.ipc.channel.Channel`` that dispatch needs."""

    async def call(self, op: str, /, *, timeout: float | None = None, **fields: Any) -> Message:
        """Ask the supervisor."""


@dataclass
class Shared:
    """What every worker uses."""

    supervisor: Caller
    queue: SqliteQueue
    attempts: Attempts
    registry: Registry
    catalogue: Catalogue
    audit: AuditClient
    redactor: Callable[[str], Redactor]
    api: Callable[[str, str, str, Any], Awaitable[dict[str, Any]]]
    """Answers a call of a stream plugin to the host API: (plugin, run, method, params)."""
    halt_without_audit: bool = True

    def _halted(self) -> bool:
        return self.halt_without_audit and self.audit.blocked is not None

    @property
    def can_dispatch(self) -> bool:
        """Whether the trail and the database can be written; nothing is sent otherwise."""
        return not self._halted() and self.queue.store.blocked is None

    async def may_dispatch(self) -> None:
        """Return once ``can_dispatch``."""
        while not self.can_dispatch:
            if self._halted():
                await self.audit.writable()
            else:
                await self.queue.store.unblocked.wait()


class Worker:
    """Delivers one plugin's events."""

    def __init__(self, shared: Shared, name: str) -> None:
        self.name = name
        self.status = "idle"
        self.holding: str | None = None
        """Why nothing is being sent at the moment, else None."""
        self.turn = asyncio.Lock()
        """Held while a one-shot plugin is spoken to: it serves one connection at a time."""
        self.last_used = asyncio.get_running_loop().time()
        self.stream: tuple[str, StreamConnection, Greeting] | None = None
        self._shared = shared
        self._consumer = shared.queue.consumer(name)
        self._outcomes = Outcomes(name, self._consumer, shared.audit, shared.redactor, shared.attempts)
        self._consumer.on_soon = self._make_ready
        self._prepared: asyncio.Task[tuple[socket.socket, str]] | None = None
        self._reachable: str | None = None
        self._news = asyncio.Event()
        self._run: str | None = None
        self._leaving: str | None = None
        """The run that is being stopped: nothing more is sent to it."""
        self._unanswered = 0
        self._quiet = asyncio.Event()
        self._quiet.set()
        self._pause = HOLD_FIRST
        self._replies: set[Reply] = set()
        """Of a stream plugin's requests, from before they are sent."""
        self._slot = asyncio.Event()
        self._task = asyncio.get_running_loop().create_task(self._work(), name=f"dispatch {name}")

    @property
    def run(self) -> str | None:
        """The run that is spoken to, if any."""
        return self._run

    @property
    def busy(self) -> bool:
        """Whether a request is unanswered or a delivery waits."""
        return bool(self._replies) or self.turn.locked() or self._consumer.depth > 0

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
            self._drop_prepared()
        if not expected:
            self._outcomes.run_died(run)
        self.news()

    async def close(self) -> None:
        """Stop; what is in flight counts as an attempt with an unknown outcome at the next start."""
        self._task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await self._task
        for reply in self._replies:
            reply.cancel()
        self._drop_prepared()
        if self.stream is not None:
            self.stream[1].close()

    async def _work(self) -> None:
        while True:
            self.status = "idle"
            delivery = await self._consumer.take()
            await self._shared.may_dispatch()
            try:
                await self._deliver(delivery)
                self._pause = HOLD_FIRST
                self.holding = None
            except (NotSentError, IsolatorError) as error:
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
        self.last_used = asyncio.get_running_loop().time()
        hook = plugin.hooks.get(event.name) if plugin is not None else None
        if plugin is None or hook is None:
            self._outcomes.given_up(delivery, "the plugin no longer receives this event")
        elif plugin.mode == "stream":
            await self._deliver_stream(plugin, hook, delivery)
        else:
            async with self.turn:
                await self._deliver_oneshot(plugin, hook, delivery)

    # One-shot

    async def _deliver_oneshot(self, plugin: Plugin, hook: str, delivery: Delivery) -> None:
        assert delivery.event is not None
        request = oneshot_request(
            delivery.event,
            hook,
            self._shared.catalogue.get(delivery.event.name),
            attempt=delivery.attempts + 1,
            timeout=plugin.timeout,
            major=plugin.major,
            meta=plugin.manifest is None or plugin.manifest.transport.meta == "fit",
        )
        if request is None:
            self._outcomes.given_up(delivery, "payload_too_large")
            return
        sock, run = await self.connection(plugin)
        with sock:
            foreign = self._foreign(sock, plugin, run)
            if foreign is not None:
                self._outcomes.refused(plugin, delivery, foreign)
                return
            self._expect(run)
            exchange = Exchange(sock, request, plugin.timeout)
            self._outcomes.begin(delivery, run, request, exchange.send)
            self.status = "in_flight"
            broken = False
            try:
                outcome = read_reply(await exchange.reply)
            except LostError as error:
                outcome, broken = Outcome("unknown", detail=str(error)), error.crash
            finally:
                exchange.close()
                self._answered()
            latency = (time.perf_counter_ns() - exchange.sent_ns) // 1000
        self._outcomes.concluded(plugin, delivery, run, outcome, latency, broken=broken)

    async def connection(self, plugin: Plugin) -> tuple[socket.socket, str]:
        """A connection to speak on, and the run it leads to: the prepared one, else a new one."""
        prepared, self._prepared = self._prepared, None
        if prepared is not None:
            with contextlib.suppress(IsolatorError, NotSentError):
                sock, run = await prepared
                if run == self._run:
                    return sock, run
                sock.close()
        return await self._connect(plugin)

    def _make_ready(self) -> bool:
        """An event for this idle plugin is being synced: whether it can be sent at once then. Connect meanwhile.

        Only to a run that was reached before, so that a start or a hang is never waited for here. A connection must
        not be closed unused, since simple scripts die of that; if the event is not accepted after all, the next
        one goes over it.
        """
        plugin = self._shared.registry.get(self.name)
        if plugin is None or self._run in (None, self._leaving) or not self._shared.can_dispatch:
            return False
        if plugin.mode == "stream":
            return self.stream is not None and self.stream[0] == self._run and not self.stream[1].closed.is_set()
        if self.turn.locked() or self._run != self._reachable:
            return False
        if self._prepared is None:
            self._prepared = asyncio.get_running_loop().create_task(self._connect(plugin))
        return True

    def _drop_prepared(self) -> None:
        prepared, self._prepared = self._prepared, None
        if prepared is not None and not prepared.cancel() and prepared.exception() is None:
            prepared.result()[0].close()

    async def _connect(self, plugin: Plugin) -> tuple[socket.socket, str]:
        """A new connection to the sidecar, which is started if need be, and its run."""
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
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM, 0, answer.fds.pop())
        sock.setblocking(False)
        self._reachable = run
        return sock, run

    def _foreign(self, sock: socket.socket, plugin: Plugin, run: str) -> str | None:
        """Who else than the plugin serves the socket, if so; then nothing is sent and the trail says so.

        A plugin owns its socket's directory and may put a hard link to another's socket there, or pass its name
        on; the kernel says who called listen().
        """
        uid = peer_of(sock)[1]
        if plugin.uid is None or uid == plugin.uid:
            return None
        detail = f"its socket is served by uid {uid} instead of {plugin.uid}; nothing was sent"
        self._shared.audit.record(PluginHealth(ok=False, detail=detail), plugin=self.name, run=run)
        return detail

    # Stream

    async def _deliver_stream(self, plugin: Plugin, hook: str, delivery: Delivery) -> None:
        assert delivery.event is not None
        connection, run, greeting = await self._connected(plugin)
        if hook not in greeting.handles:
            self._outcomes.given_up(delivery, "the plugin said in host.hello that it does not handle this event")
            return
        event_type = self._shared.catalogue.get(delivery.event.name)
        meta = meta_of(delivery.event, delivery.attempts + 1, plugin.timeout)
        params = params_text(delivery.event, event_type, plugin.major, meta)
        number = os.urandom(8).hex()
        request = f'{{"jsonrpc":"2.0","method":"{hook}","params":{params},"id":"{number}"}}\n'.encode()
        if len(request) > STREAM_MESSAGE:
            self._outcomes.given_up(delivery, "payload_too_large")
            return
        await self._free_slot(plugin)
        await connection.read(plugin.timeout)
        if connection.closed.is_set():
            raise NotSentError(connection.why)
        self._send_stream(plugin, delivery, connection, run, number, request)

    def _send_stream(
        self, plugin: Plugin, delivery: Delivery, connection: StreamConnection, run: str, number: str, request: bytes
    ) -> None:
        sent_ns = 0

        def send() -> None:
            nonlocal sent_ns
            sent_ns = time.perf_counter_ns()
            connection.write(number, request, plugin.timeout, reply)

        def replied(reply: Reply) -> None:
            self._replies.discard(reply)
            self._slot.set()
            self._answered()
            if reply.cancelled():  # the worker ends
                return
            broken = False
            try:
                outcome = read_reply(reply.result()[1], expect=number)
            except (LostError, NotSentError) as error:
                outcome, broken = Outcome("unknown", detail=str(error)), isinstance(error, LostError) and error.crash
            latency = (time.perf_counter_ns() - sent_ns) // 1000
            self._outcomes.concluded(plugin, delivery, run, outcome, latency, broken=broken)

        self._expect(run)
        reply: Reply = asyncio.get_running_loop().create_future()
        reply.add_done_callback(replied)
        self._replies.add(reply)
        self._outcomes.begin(delivery, run, request, send)
        self.status = "in_flight"

    async def _free_slot(self, plugin: Plugin) -> None:
        """Wait until one more request may be in flight; a suspect of a crash waits until it is alone."""
        spec = plugin.manifest
        most = min(spec.transport.max_in_flight, spec.delivery.concurrency) if spec is not None else 1
        while len(self._replies) >= (1 if self._outcomes.careful else most):
            self._slot.clear()
            await self._slot.wait()

    async def _connected(self, plugin: Plugin) -> tuple[StreamConnection, str, Greeting]:
        """The stream to the present run, opened and greeted if there is none."""
        if self.stream is not None:
            run, connection, greeting = self.stream
            if run == self._run and not connection.closed.is_set():
                return connection, run, greeting
            connection.close()
            self.stream = None
        sock, run = await self._connect(plugin)
        foreign = self._foreign(sock, plugin, run)
        if foreign is not None:
            sock.close()
            raise NotSentError(foreign)

        def breach(why: str) -> None:
            self._shared.audit.record(PluginHealth(ok=False, detail=f"protocol: {why}"), plugin=self.name, run=run)

        async def call(method: str, params: Any) -> dict[str, Any]:
            return await self._shared.api(self.name, run, method, params)

        connection = await open_stream(sock, call, breach)
        spec = plugin.manifest
        greeting = await connection.hello(
            plugin={"name": plugin.name, "version": plugin.version},
            hooks=sorted(plugin.hooks.values()),
            limits={
                "max_message": STREAM_MESSAGE,
                "max_in_flight": spec.transport.max_in_flight if spec is not None else 1,
                "deadline_ms": round(plugin.timeout * 1000),
            },
        )
        self.stream = (run, connection, greeting)
        return connection, run, greeting

    # Leaving

    def _expect(self, run: str) -> None:
        """One more request, over when ``_answered`` is called; raises when the run is to end."""
        if run == self._leaving:
            raise NotSentError("the plugin is being stopped")
        self._unanswered += 1
        self._quiet.clear()

    def _answered(self) -> None:
        self._unanswered -= 1
        if not self._unanswered:
            self._quiet.set()

    async def take_leave(self, run: str, reason: str) -> None:
        """The run is about to be stopped; returns when it may be, after ``LEAVE_GRACE`` at the latest."""
        if run != self._run:
            return
        self._leaving = run
        with contextlib.suppress(TimeoutError, LostError, NotSentError):
            async with asyncio.timeout(LEAVE_GRACE):
                await self._quiet.wait()
                await self._say_shutdown(reason)

    def tell(self, method: str, params: Mapping[str, Any]) -> None:
        """Tell a stream plugin something that it said it wants to hear of."""
        if self.stream is not None and not self.stream[1].closed.is_set() and method in self.stream[2].capabilities:
            self.stream[1].notify(method, params)

    async def _say_shutdown(self, reason: str) -> None:
        """Ask a stream plugin that can do so to finish by itself; the supervisor's SIGTERM comes next in any case."""
        if self.stream is None or self.stream[1].closed.is_set() or "shutdown" not in self.stream[2].capabilities:
            return
        params = {"reason": reason, "grace_ms": round(LEAVE_GRACE * 1000)}
        await self.stream[1].request("shutdown", params, LEAVE_GRACE)
