"""MCP delivery: an event becomes the call of a tool, with arguments made of its payload (see ``host.mcp``).

The session is that of callers, too: both share its 16 requests in flight. A tool that reports an error has failed an
attempt; a question to a person, an unknown tool and arguments that it does not take are what no repetition mends.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from typing import Any

from host.channel.reply import LostError, NotSentError, build_params
from host.delivery.modes import Mode, Parts
from host.delivery.requests import PendingRequest, Requests, RequestState
from host.mcp.event_calls import call_of, outcome_of
from host.mcp.session import Reply
from host.plugins.registry import Plugin
from host.queue.interface import Delivery
from host.wire import mcp as protocol
from isolator.ipc.body import Body
from isolator.ipc.succession import Departure, Descriptors


class McpState(Body):
    """Requests in flight by id, on their way to another host; the session is handed on with the callers' calls."""

    requests: dict[str, RequestState]


class McpDelivery(Mode):
    """Delivers events to one plugin as calls of its tools."""

    State = McpState

    def __init__(self, parts: Parts) -> None:
        super().__init__(parts)
        self._requests = Requests[tuple[protocol.Answer, bytes]](parts.sidecar, parts.outcomes, outcome_of)
        self._replies: set[Reply] = set()
        """Replies of the requests that were written and are not concluded."""

    @property
    def busy(self) -> bool:
        return bool(self._requests)

    async def deliver(self, plugin: Plugin, hook: str, delivery: Delivery) -> None:
        parts, event = self.parts, delivery.event
        assert event is not None
        spec = plugin.manifest
        if spec is None or hook not in spec.transport.calls:
            parts.outcomes.give_up(delivery, "its manifest has no call for this event")
            return
        payload = build_params(event, parts.catalogue.get(event.name), plugin.major)
        parts.sidecar.status = "starting" if parts.sidecar.run is None else "connecting"
        session = await parts.servers().session(plugin.name)
        await self._requests.slot(plugin)
        await session.slot(plugin.timeout)
        number = session.new_id()
        request = protocol.request(session.era, number, "tools/call", call_of(spec.transport.calls[hook], payload))
        if len(request) > protocol.MAX_LINE:
            parts.outcomes.give_up(delivery, "payload_too_large")
            return
        if not session.open:
            raise NotSentError(session.why or "the server is being stopped")
        self._requests.send(
            plugin, delivery, session.run, number, request,
            lambda number, request, timeout, one: session.write(number, request, timeout, self._reply(one)),
        )  # fmt: skip

    def _reply(self, one: PendingRequest[tuple[protocol.Answer, bytes]]) -> Reply:
        """The reply to a request, which concludes it in the turn after it is there."""
        reply: Reply = asyncio.get_running_loop().create_future()
        self._replies.add(reply)

        def conclude(_: Reply) -> None:
            self._replies.discard(reply)
            if reply.cancelled():
                return
            try:
                answer = reply.result()
            except (LostError, NotSentError) as error:
                one.set_exception(error)
            else:
                one.set_result(answer)

        reply.add_done_callback(conclude)
        return reply

    async def ping(self, plugin: Plugin, timeout: float) -> None:
        session = await self.parts.servers().session(plugin.name)
        method = "server/discover" if session.era == protocol.STATELESS else "ping"
        await session.ask(method, {}, timeout)

    def close(self) -> None:
        self._requests.cancel()
        self._cancel_replies()

    def _cancel_replies(self) -> None:
        for reply in list(self._replies):
            reply.cancel()

    # One host in the place of another

    @property
    def replied(self) -> bool:
        return any(reply.done() for reply in self._replies)

    def pass_on(self, departure: Departure) -> McpState | None:
        requests = self._requests.pass_on()
        self._cancel_replies()
        return McpState(requests=requests) if requests else None

    @classmethod
    def in_flight(cls, state: McpState) -> Sequence[int]:
        return [one.seq for one in state.requests.values()]

    async def take_over(
        self, plugin: Plugin | None, deliveries: Mapping[int, Delivery], state: Any, descriptors: Descriptors
    ) -> None:
        for one in self._requests.take_over(plugin, deliveries, state.requests):
            self.parts.servers().awaited[one.number] = self._reply(one)
