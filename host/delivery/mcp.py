"""MCP delivery: an event becomes the call of a tool, with arguments made of its payload (see ``host.mcp``).

The session is that of callers, too: both share its 16 requests in flight. A tool that reports an error has failed an
attempt; a question to a person, an unknown tool and arguments that it does not take are what no repetition mends.
"""

from __future__ import annotations

import asyncio
import hashlib
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from host.channel.reply import LostError, NotSentError, Outcome, build_params
from host.delivery.modes import Mode, Parts
from host.mcp import protocol, template
from host.mcp.session import Reply
from host.plugins.registry import Plugin
from host.queue.interface import Delivery
from isolator.ipc.body import Body
from isolator.ipc.succession import Departure, Descriptors


class AwaitedState(Body):
    """A request in flight, on its way to another host."""

    seq: int
    run: str
    sent_ns: int


class McpState(Body):
    """Requests in flight by id, on their way to another host; the session is handed on with the callers' calls."""

    requests: dict[str, AwaitedState]


@dataclass(eq=False)
class _Awaited:
    plugin: Plugin
    delivery: Delivery
    run: str
    number: str
    reply: Reply
    sent_ns: int = 0


class McpDelivery(Mode):
    """Delivers events to one plugin as calls of its tools."""

    State = McpState

    def __init__(self, parts: Parts) -> None:
        super().__init__(parts)
        self._replies: dict[Reply, _Awaited] = {}
        self._slot = asyncio.Event()

    @property
    def busy(self) -> bool:
        return bool(self._replies)

    async def deliver(self, plugin: Plugin, hook: str, delivery: Delivery) -> None:
        parts, event = self.parts, delivery.event
        assert event is not None
        spec = plugin.manifest
        if spec is None or hook not in spec.transport.calls:
            parts.outcomes.give_up(delivery, "its manifest has no call for this event")
            return
        payload = build_params(event, parts.catalogue.get(event.name), plugin.major)
        call = spec.transport.calls[hook]
        parts.sidecar.status = "starting" if parts.sidecar.run is None else "connecting"
        session = await parts.servers().session(plugin.name)
        most = min(spec.transport.max_in_flight, spec.delivery.concurrency)
        while len(self._replies) >= (1 if parts.outcomes.isolated_retries else most):
            self._slot.clear()
            await self._slot.wait()
        await session.slot(plugin.timeout)
        number = session.new_id()
        params = {"name": call.tool, "arguments": template.fill(call.arguments, payload)}
        request = protocol.request(session.era, number, "tools/call", params)
        if len(request) > protocol.MAX_LINE:
            parts.outcomes.give_up(delivery, "payload_too_large")
            return
        if not session.open:
            raise NotSentError(session.why or "the server is being stopped")
        parts.sidecar.begin_request(session.run)
        awaited = self._await(plugin, delivery, session.run, number)

        def send() -> None:
            awaited.sent_ns = time.perf_counter_ns()
            session.write(number, request, plugin.timeout, awaited.reply)

        parts.outcomes.begin(delivery, session.run, request, send)
        parts.sidecar.status = "in_flight"

    def _await(self, plugin: Plugin, delivery: Delivery, run: str, number: str) -> _Awaited:
        reply: Reply = asyncio.get_running_loop().create_future()
        reply.add_done_callback(self._replied)
        awaited = self._replies[reply] = _Awaited(plugin, delivery, run, number, reply)
        return awaited

    def _replied(self, reply: Reply) -> None:
        awaited = self._replies.pop(reply)
        self._slot.set()
        self.parts.sidecar.end_request()
        if reply.cancelled():  # the worker ends
            return
        broken = False
        try:
            outcome = _outcome(*reply.result())
        except (LostError, NotSentError) as error:
            outcome, broken = Outcome("unknown", detail=str(error)), isinstance(error, LostError) and error.crash
        latency = (time.perf_counter_ns() - awaited.sent_ns) // 1000
        self.parts.outcomes.conclude(awaited.plugin, awaited.delivery, awaited.run, outcome, latency, broken=broken)

    async def ping(self, plugin: Plugin, timeout: float) -> None:
        session = await self.parts.servers().session(plugin.name)
        method = "server/discover" if session.era == protocol.STATELESS else "ping"
        await session.ask(method, {}, timeout)

    def close(self) -> None:
        for reply in list(self._replies):
            reply.cancel()

    # One host in the place of another

    @property
    def replied(self) -> bool:
        return any(reply.done() for reply in self._replies)

    def pass_on(self, departure: Departure) -> McpState | None:
        requests = {
            one.number: AwaitedState(seq=one.delivery.seq, run=one.run, sent_ns=one.sent_ns)
            for one in self._replies.values()
        }
        for reply in list(self._replies):
            reply.cancel()
        return McpState(requests=requests) if requests else None

    @classmethod
    def in_flight(cls, state: McpState) -> Sequence[int]:
        return [one.seq for one in state.requests.values()]

    async def take_over(
        self, plugin: Plugin | None, deliveries: Mapping[int, Delivery], state: Any, descriptors: Descriptors
    ) -> None:
        for number, request in state.requests.items():
            delivery = deliveries.get(request.seq)
            if plugin is not None and delivery is not None:
                self.parts.sidecar.take_request()
                one = self._await(plugin, delivery, request.run, number)
                one.sent_ns = request.sent_ns
                self.parts.servers().awaited.setdefault(plugin.name, {})[number] = one.reply


def _outcome(answer: protocol.Answer, data: bytes) -> Outcome:
    """The outcome of an attempt."""
    judged = protocol.judge(answer)
    text, size, digest = data.decode("utf-8", "replace"), len(data), hashlib.sha256(data).hexdigest()
    if judged.verdict == "ok":
        return Outcome("ok", "ok", None, text, size, digest)
    if judged.verdict in ("input_required", "refused"):
        return Outcome("rejected", judged.verdict, judged.detail, text, size, digest)
    return Outcome("failed", judged.verdict, judged.detail, text, size, digest)
