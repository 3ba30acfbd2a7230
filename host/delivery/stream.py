"""Stream delivery: many events in flight over the one connection to a run (see ``host.channel.stream``).

As many requests are in flight as plugin and manifest allow, of different keys. After a crash with several in flight
each of their events is retried alone, until the one that the plugin dies of is known (``Outcomes``).
"""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import Any

from host.channel.reply import STREAM_MESSAGE, LostError, NotSentError, Outcome, meta_of, params_text, read_reply
from host.channel.stream import CPU_A_SECOND, CPU_AT_ONCE, Greeting, Reply, StreamConnection, open_stream
from host.delivery.outcome import Outcomes
from host.delivery.sidecar import SidecarLink
from host.events import Catalogue
from host.plugins.registry import Plugin
from host.queue.interface import Delivery
from isolator.pacing import TokenBucket

HostApiCall = Callable[[str, str, str, Any], Awaitable[dict[str, Any]]]
"""Answers a call of a stream plugin to the host API: (plugin, run, method, params) → its reply's fields."""


@dataclass(frozen=True)
class _Session:
    run: str
    connection: StreamConnection
    greeting: Greeting

    @property
    def is_open(self) -> bool:
        return not self.connection.closed.is_set()

    def can(self, capability: str) -> bool:
        """Whether the plugin can still be sent a message that it declared in its greeting."""
        return self.is_open and capability in self.greeting.capabilities


class StreamDelivery:
    """Delivers events to one plugin in stream mode."""

    def __init__(
        self,
        sidecar: SidecarLink,
        outcomes: Outcomes,
        catalogue: Catalogue,
        api: HostApiCall,
        redact: Callable[[str], str],
    ) -> None:
        self._sidecar, self._outcomes, self._catalogue, self._api = sidecar, outcomes, catalogue, api
        self._redact = redact
        self._session: _Session | None = None
        self._replies: set[Reply] = set()
        """Replies that are awaited, each from before its request is sent."""
        self._slot = asyncio.Event()
        self._cpu = TokenBucket(CPU_A_SECOND, CPU_AT_ONCE)

    @property
    def busy(self) -> bool:
        """Whether a request is unanswered."""
        return bool(self._replies)

    @property
    def ready(self) -> bool:
        """Whether the present run has been greeted, so that a request can be sent at once."""
        session = self._session
        return session is not None and session.run == self._sidecar.run and session.is_open

    async def deliver(self, plugin: Plugin, hook: str, delivery: Delivery) -> None:
        """Send a delivery, which concludes by itself; raises NotSentError or IsolatorError when nothing can be sent."""
        assert delivery.event is not None
        session = await self._connected(plugin)
        if hook not in session.greeting.handles:
            self._outcomes.give_up(delivery, "the plugin said in host.hello that it does not handle this event")
            return
        event_type = self._catalogue.get(delivery.event.name)
        meta = meta_of(delivery.event, delivery.attempts + 1, plugin.timeout)
        params = params_text(delivery.event, event_type, plugin.major, meta)
        number = os.urandom(8).hex()
        request = f'{{"jsonrpc":"2.0","method":"{hook}","params":{params},"id":"{number}"}}\n'.encode()
        if len(request) > STREAM_MESSAGE:
            self._outcomes.give_up(delivery, "payload_too_large")
            return
        await self._free_slot(plugin)
        await session.connection.writable(plugin.timeout)
        if not session.is_open:
            raise NotSentError(session.connection.why)
        self._send(plugin, delivery, session, number, request)

    def _send(self, plugin: Plugin, delivery: Delivery, session: _Session, number: str, request: bytes) -> None:
        sent_ns = 0

        def send() -> None:
            nonlocal sent_ns
            sent_ns = time.perf_counter_ns()
            session.connection.write(number, request, plugin.timeout, reply)

        def replied(reply: Reply) -> None:
            self._replies.discard(reply)
            self._slot.set()
            self._sidecar.end_request()
            if reply.cancelled():  # the worker ends
                return
            broken = False
            try:
                outcome = read_reply(reply.result()[1], expect=number)
            except (LostError, NotSentError) as error:
                outcome, broken = Outcome("unknown", detail=str(error)), isinstance(error, LostError) and error.crash
            latency = (time.perf_counter_ns() - sent_ns) // 1000
            self._outcomes.conclude(plugin, delivery, session.run, outcome, latency, broken=broken)

        self._sidecar.begin_request(session.run)
        reply: Reply = asyncio.get_running_loop().create_future()
        reply.add_done_callback(replied)
        self._replies.add(reply)
        self._outcomes.begin(delivery, session.run, request, send)
        self._sidecar.status = "in_flight"

    async def _free_slot(self, plugin: Plugin) -> None:
        """Wait until one more request may be in flight; during isolated retries, until none is."""
        spec = plugin.manifest
        most = min(spec.transport.max_in_flight, spec.delivery.concurrency) if spec is not None else 1
        while len(self._replies) >= (1 if self._outcomes.isolated_retries else most):
            self._slot.clear()
            await self._slot.wait()

    async def _connected(self, plugin: Plugin) -> _Session:
        """The session with the present run, opened and greeted if there is none."""
        if self._session is not None:
            if self.ready:
                return self._session
            self._session.connection.close()
            self._session = None
        sock, run = await self._sidecar.connect()
        foreign = self._sidecar.check_peer(sock, plugin, run)
        if foreign is not None:
            sock.close()
            raise NotSentError(foreign)

        async def call(method: str, params: Any) -> dict[str, Any]:
            return await self._api(plugin.name, run, method, params)

        def breach(why: str) -> None:
            self._sidecar.record_fault(run, f"protocol: {why}")

        connection = await open_stream(sock, call, breach, self._cpu, self._redact)
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
        self._session = _Session(run, connection, greeting)
        return self._session

    async def ping(self, timeout: float) -> None:
        """Send ``ping`` over an open, quiet stream; raises LostError, NotSentError.

        A stream that nobody has opened yet cannot be lost. A plugin that has a request to answer has that request's
        deadline, and may well be too busy for a ping.
        """
        session = self._session
        if session is not None and session.is_open and not session.connection.in_flight:
            await session.connection.request("ping", {}, timeout)

    def notify(self, method: str, params: Mapping[str, Any]) -> None:
        """Send a notification if the plugin declared that it takes this one."""
        if self._session is not None and self._session.can(method):
            self._session.connection.notify(method, params)

    async def shutdown(self, reason: str, seconds: float) -> None:
        """Ask a plugin that speaks ``shutdown`` to finish within ``seconds``; SIGTERM comes next in any case.

        Raises LostError, NotSentError.
        """
        if self._session is not None and self._session.can("shutdown"):
            params = {"reason": reason, "grace_ms": round(seconds * 1000)}
            await self._session.connection.request("shutdown", params, seconds)

    def close(self) -> None:
        """Await no more replies and close the connection."""
        for reply in self._replies:
            reply.cancel()
        if self._session is not None:
            self._session.connection.close()
