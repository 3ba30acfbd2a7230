"""Stream delivery: many events in flight over the one connection to a run (see ``host.channel.stream``).

As many requests are in flight as plugin and manifest allow, of different keys. After a crash with several in flight
each of their events is retried alone, until the one that the plugin dies of is known (``Outcomes``).
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from host.channel.reply import STREAM_MESSAGE, NotSentError, event_params, is_plain, judge_reply
from host.channel.stream import (
    Greeting,
    Read,
    Reply,
    StreamConnection,
    StreamState,
    event_request,
    open_stream,
)
from host.delivery.outcome import Outcomes
from host.delivery.requests import Requests, RequestState
from host.delivery.sidecar import SidecarLink
from host.events import Catalogue, random_hex
from host.plugins.registry import Plugin
from host.queue.interface import Delivery, Event
from host.wire.lines import CPU_A_SECOND, CPU_AT_ONCE
from isolator.base.pacing import TokenBucket
from isolator.ipc.body import Body, omitted
from isolator.ipc.succession import Departure, Descriptors
from isolator.ipc.tasks import Tasks

HostApiCall = Callable[[str, str, str, Any], Awaitable[dict[str, Any]]]
"""Answers a call of a stream plugin to the host API: (plugin, run, method, params) → its reply's fields."""


@dataclass(eq=False, slots=True)
class _Session:
    """The connection with one run."""

    run: str
    connection: StreamConnection
    greeted: asyncio.Future[Greeting]
    """Done once the plugin has answered ``host.hello``; fails with NotSentError."""
    hello: str = ""
    """The number of that request."""
    reply: asyncio.Future[Read] | None = None
    """The reply to it; None: another host had it."""

    def can(self, capability: str) -> bool:
        """Whether the plugin can still be sent a message that it declared in its greeting."""
        connection = self.connection
        return not connection.closed and connection.agreed is not None and capability in connection.agreed.capabilities


class SessionState(Body):
    """The connection to a run, on its way to another host."""

    run: str
    connection: StreamState
    protocol: str
    handles: tuple[str, ...]
    capabilities: tuple[str, ...]
    requests: dict[str, RequestState]
    """by number"""
    hello: str = omitted(default="")
    """the number of the unanswered `host.hello`, in place of a greeting"""


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
        self._requests = Requests[Read](sidecar, outcomes, lambda reply: judge_reply(*reply))
        self.connecting = False
        """A connection is being made, and not greeted yet."""
        self._tasks = Tasks()
        self._cpu = TokenBucket(CPU_A_SECOND, CPU_AT_ONCE)

    @property
    def busy(self) -> bool:
        """Whether a request is unanswered."""
        return bool(self._requests)

    @property
    def ready(self) -> bool:
        """Whether a run has been greeted that goes on, so that a request can be sent at once."""
        session = self._present()
        return session is not None and session.connection.agreed is not None

    def _present(self) -> _Session | None:
        """The session, if it is open and its run goes on."""
        session = self._session
        if session is None or session.connection.closed or self._sidecar.is_over(session.run):
            return None
        return session

    async def deliver(self, plugin: Plugin, hook: str, delivery: Delivery) -> None:
        """Send a delivery, which concludes by itself; raises NotSentError or IsolatorError when nothing can be sent."""
        while True:
            session = self._present() or await self._connect(plugin)
            await asyncio.shield(session.greeted)
            await self._requests.slot(plugin)
            await session.connection.writable(plugin.timeout)
            if session.connection.closed:
                raise NotSentError(session.connection.why)
            if self.deliver_now(plugin, hook, delivery):
                return

    def deliver_now(self, plugin: Plugin, hook: str, delivery: Delivery) -> bool:
        """As ``deliver``, if that takes no wait; returns whether it took none."""
        session, event = self._present(), delivery.event
        if session is None:
            return False
        connection = session.connection
        if connection.agreed is None:
            return False
        assert event is not None
        if hook not in connection.agreed.handles:
            self._outcomes.give_up(delivery, "the plugin said in host.hello that it does not handle this event")
            return True
        if not self._requests.has_room(plugin) or not connection.is_writable:
            return False
        number = random_hex()
        kind, attempt = self._catalogue.get(event.name), delivery.attempts + 1
        params = event_params(event, kind, plugin.major, attempt, plugin.timeout, delivery.epoch)
        request = event_request(hook, params, number)
        if len(request) > STREAM_MESSAGE:
            self._outcomes.give_up(delivery, "payload_too_large")
            return True
        self._requests.send(plugin, delivery, session.run, number, request, connection.write, connection.flush)
        return True

    def make_ahead(self, plugin: Plugin, event: Event) -> None:
        """Make what the requests of an event's first attempts have in common; ``deliver_now`` finds it again.

        What is translated for a plugin is not kept.
        """
        kind = self._catalogue.get(event.name)
        if is_plain(kind, plugin.major):
            event_params(event, kind, plugin.major, 1, plugin.timeout)

    async def _connect(self, plugin: Plugin) -> _Session:
        """Open a session with the present run in the place of the one before; its ``greeted`` is under way."""
        if self._session is not None:
            self._session.connection.close()
            self._session = None
        self.connecting = True
        try:
            self._session = await self._open(plugin)
        finally:
            self.connecting = False
        return self._session

    async def _open(self, plugin: Plugin) -> _Session:
        sock, run = await self._sidecar.connect(lasting=True)
        foreign = self._sidecar.check_peer(sock, plugin, run)
        if foreign is not None:
            sock.close()
            raise NotSentError(foreign)
        connection = await open_stream(sock, lambda: self._connection(run))
        if self._sidecar.leaving:
            self._hold(connection)
        spec, hooks = plugin.manifest, sorted(plugin.hooks.values())
        number, reply = connection.hello(
            plugin={"name": plugin.name, "version": plugin.version},
            hooks=hooks,
            limits={
                "max_message": STREAM_MESSAGE,
                "max_in_flight": spec.transport.max_in_flight if spec is not None else 1,
                "deadline_ms": round(plugin.timeout * 1000),
            },
        )
        return _Session(run, connection, self._greeted(connection, hooks, reply), number, reply)

    def _greeted(
        self, connection: StreamConnection, hooks: Iterable[str], reply: asyncio.Future[Read]
    ) -> asyncio.Future[Greeting]:  # fmt: skip
        name = f"greeting of {self._sidecar.name}"
        return self._tasks.run(name, connection.greeting(hooks, reply), expected=(NotSentError,))

    def _connection(self, run: str) -> StreamConnection:
        async def call(method: str, params: Any) -> dict[str, Any]:
            return await self._api(self._sidecar.name, run, method, params)

        def breach(why: str) -> None:
            self._sidecar.record_fault(run, f"protocol: {why}")

        return StreamConnection(call, breach, self._cpu, self._redact)

    # One host in the place of another

    def hold(self) -> None:
        """Read nothing of the connection from now on."""
        if self._session is not None:
            self._hold(self._session.connection)

    @staticmethod
    def _hold(connection: StreamConnection) -> None:
        connection.hold("leaving")

    @property
    def unsettled(self) -> bool:
        """Whether something is under way that cannot be handed on: a connect, or a call of the plugin's."""
        return self.connecting or (self._session is not None and self._session.connection.busy)

    @property
    def replied(self) -> bool:
        """Whether a greeting is there that is not read yet; a reply to an event is concluded as it is read."""
        session = self._session
        if session is None or session.reply is None or session.greeted.done():
            return False
        return session.reply.done()

    def pass_on(self, departure: Departure) -> SessionState | None:
        """Hand on the connection with every request that is in flight over it."""
        session = self._session
        if session is None or not session.connection.is_open:
            return None
        connection = session.connection.pass_on_all(departure)
        requests = self._requests.pass_on(connection.deadlines)
        agreed = session.connection.agreed
        greeting = agreed or Greeting("", frozenset(), frozenset())
        state = SessionState(
            run=session.run,
            connection=connection,
            protocol=greeting.protocol,
            handles=tuple(greeting.handles),
            capabilities=tuple(greeting.capabilities),
            requests=requests,
            hello="" if agreed is not None else session.hello,
        )
        self._tasks.cancel()
        return state

    async def take_over(
        self, plugin: Plugin | None, deliveries: Mapping[int, Delivery], state: SessionState, descriptors: Descriptors
    ) -> None:
        """Go on with the connection of another host, and with the requests of these deliveries, by event number."""
        requests = self._requests.take_over(plugin, deliveries, state.requests)
        awaited: dict[str, Reply] = {one.number: one for one in requests}
        connection = self._connection(state.run)
        loop = asyncio.get_running_loop()
        if state.hello:
            reply: asyncio.Future[Read] = loop.create_future()
            awaited[state.hello] = reply
            hooks = sorted(plugin.hooks.values()) if plugin is not None else ()
            greeted = self._greeted(connection, hooks, reply)
            self._session = _Session(state.run, connection, greeted, state.hello, reply)
        else:
            connection.agreed = Greeting(state.protocol, frozenset(state.handles), frozenset(state.capabilities))
            greeted = loop.create_future()
            greeted.set_result(connection.agreed)
            self._session = _Session(state.run, connection, greeted)
        await connection.take_over_all(state.connection, awaited, descriptors)

    async def ping(self, timeout: float) -> bool:
        """Send ``ping`` over an open, quiet stream, and return whether there is one; raises LostError, NotSentError.

        A stream that nobody has opened yet cannot be lost. A plugin that has a request to answer has that request's
        deadline, and may well be too busy for a ping.
        """
        session = self._session
        if session is None or session.connection.closed or session.connection.in_flight:
            return False
        await session.connection.request("ping", {}, timeout)
        return True

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
        self._requests.cancel()
        if self._session is not None:
            self._session.connection.close()
