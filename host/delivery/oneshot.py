"""One-shot delivery: an event at a time, each over a connection of its own (see ``host.channel.oneshot``)."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import AsyncIterator
from dataclasses import dataclass

from host.channel.oneshot import Exchange, ExchangeState
from host.channel.reply import LostError, NotSentError, oneshot_request, read_reply
from host.delivery.outcome import Outcomes, judged
from host.delivery.sidecar import RENEWED, SidecarLink
from host.events import Catalogue
from host.plugins.registry import Plugin
from host.queue.interface import Delivery
from host.wire.strict_json import line, parse_object
from isolator.audit.client import moment
from isolator.errors import IsolatorError
from isolator.ipc.body import Body, omitted
from isolator.ipc.succession import Departure, Descriptors

_PING = line({"jsonrpc": "2.0", "method": "ping", "params": {}, "id": 1})


class RequestState(Body):
    """A request in flight, on its way to another host."""

    seq: int
    run: str
    exchange: ExchangeState


class OneshotState(Body):
    """One-shot delivery on its way to another host."""

    request: RequestState | None
    prepared: int
    """a connection that was made and not used; -1: none"""
    prepared_run: str
    ping: ExchangeState | None = omitted(default=None)


@dataclass(frozen=True)
class _Request:
    """A request on its way to the plugin."""

    plugin: Plugin
    delivery: Delivery
    run: str
    exchange: Exchange


class OneshotDelivery:
    """Delivers events to one plugin in one-shot mode."""

    def __init__(self, sidecar: SidecarLink, outcomes: Outcomes, catalogue: Catalogue) -> None:
        self._sidecar, self._outcomes, self._catalogue = sidecar, outcomes, catalogue
        self._free = asyncio.Event()
        """Clear while a request is on its way or begun: the plugin serves one connection at a time."""
        self._free.set()
        self._prepared: asyncio.Future[tuple[socket.socket, str]] | None = None
        self._current: _Request | None = None
        """The event's request on its way."""
        self._ping: Exchange | None = None
        """The ping on its way."""
        self._connecting = False

    @property
    def busy(self) -> bool:
        """Whether a request is on its way."""
        return not self._free.is_set()

    async def deliver(self, plugin: Plugin, hook: str, delivery: Delivery) -> None:
        """Try a delivery and conclude it; raises NotSentError or IsolatorError when nothing could be sent."""
        async with self._turn():
            request = self._request(plugin, hook, delivery)
            if request is None:
                self._outcomes.give_up(delivery, "payload_too_large")
            else:
                self._begin(plugin, delivery, request, *await self._connection())
        await self.answered()

    def deliver_now(self, plugin: Plugin, hook: str, delivery: Delivery) -> bool:
        """Begin an attempt, which concludes by itself, if that takes no wait; returns whether it took none."""
        if self.busy or (self._prepared is not None and self._made is None):
            return False
        request = self._request(plugin, hook, delivery)
        if request is None:
            self._outcomes.give_up(delivery, "payload_too_large")
            return True
        made, self._prepared = self._made, None
        if made is not None and self._sidecar.is_over(made[1]):
            made[0].close()
            made = None
        made = made or self._sidecar.connect_at_once()
        if made is not None:
            self._begin(plugin, delivery, request, *made)
        return made is not None

    def _request(self, plugin: Plugin, hook: str, delivery: Delivery) -> bytes | None:
        """The line of a request; None: it would be too long."""
        assert delivery.event is not None
        return oneshot_request(
            delivery.event,
            hook,
            self._catalogue.get(delivery.event.name),
            attempt=delivery.attempts + 1,
            timeout=plugin.timeout,
            major=plugin.major,
            meta=plugin.manifest is None or plugin.manifest.transport.meta == "fit",
            epoch=delivery.epoch,
        )

    def _begin(self, plugin: Plugin, delivery: Delivery, request: bytes, sock: socket.socket, run: str) -> None:
        """Begin an attempt over a new connection, if that is the plugin's; raises NotSentError."""
        foreign = self._sidecar.check_peer(sock, plugin, run)
        if foreign is not None:
            sock.close()
            self._outcomes.refuse(plugin, delivery, foreign)
            return
        try:
            self._sidecar.begin_request(run, 1)
        except NotSentError:
            self._keep(sock, run)  # until the pause is over, or whatever else it is
            raise
        exchange = Exchange(sock, request, plugin.timeout)
        self._outcomes.begin(delivery, run, request, exchange.send, exchange.give_up, exchange.listen)
        self._await(_Request(plugin, delivery, run, exchange))

    def _await(self, request: _Request) -> None:
        """Conclude an attempt once the reply to its request is there, or known not to come."""
        self._free.clear()
        self._current = request
        self._sidecar.status = "in_flight"
        request.exchange.reply.add_done_callback(self._replied)

    def _replied(self, reply: asyncio.Future[bytes]) -> None:
        request = self._let_go()
        if request is None or reply.cancelled():
            return
        at, broken = moment(), False
        try:
            text = reply.result()
            outcome = judged(read_reply, text)
        except LostError as error:
            outcome, broken = error.outcome, error.crash
        sent_ns = request.exchange.sent_ns
        self._outcomes.conclude(request.plugin, request.delivery, request.run, outcome, sent_ns, at, broken=broken)

    def _let_go(self) -> _Request | None:
        """Await the reply to the request that is on its way no more; its connection is closed or kept. Returns it."""
        request, self._current = self._current, None
        if request is not None:
            exchange = request.exchange
            exchange.reply.remove_done_callback(self._replied)
            exchange.close()
            if exchange.unused:
                self._keep(exchange.sock, request.run)
            else:
                exchange.sock.close()
            self._sidecar.end_request()
            if self._sidecar.status == "in_flight":
                self._sidecar.status = "idle"
            self._free.set()
        return request

    async def answered(self) -> None:
        """Return once no request is on its way."""
        await self._free.wait()

    @contextlib.asynccontextmanager
    async def _turn(self) -> AsyncIterator[None]:
        """Wait for the plugin, and keep others from it until the end, or until what is on its way then is answered."""
        while self.busy:
            await self.answered()
        self._free.clear()
        try:
            yield
        finally:
            if self._current is None:
                self._free.set()

    async def ping(self, timeout: float) -> None:
        """Send ``ping``; any JSON object is a pong. Raises LostError, NotSentError, WireError, IsolatorError."""
        async with self._turn():
            sock, _ = await self._connection()
            ping = Exchange(sock, _PING, timeout)
            ping.send()
            ping.listen()
            reply = await self._pong(ping)
        parse_object(reply)

    async def _pong(self, ping: Exchange) -> bytes:
        """Wait for the reply to a ping; the connection is closed then. Raises LostError."""
        self._ping = ping
        try:
            return await ping.reply
        finally:
            self._ping = None
            ping.close()
            ping.sock.close()

    def prepare(self, *, alone: bool = False) -> bool:
        """Connect for an event that is being synced; returns whether it can be sent as soon as that is done.

        For a delivery that is ``alone`` only ``deliver_now`` does so, behind the answer to the event's emitter: the
        kernel's worker that syncs waits for this process, and for the plugin that is woken. Of several no one is to
        wait for the connections of all the others.

        Only to a run that was reached before, so that a start or a hang is never waited for here. A connection must
        not be closed unused, since simple scripts die of that; if the event is not accepted after all, the next
        one goes over it.
        """
        if self.busy or not self._sidecar.reached:
            return False
        if self._prepared is None:
            loop = asyncio.get_running_loop()
            if self._sidecar.connects_at_once:
                if not alone:
                    loop.call_soon(self._connect_ahead)  # when the sync is under way
            else:
                self._prepared = loop.create_task(self._sidecar.connect())
        return True

    def _connect_ahead(self) -> None:
        """Connect for an event that is being synced, if that takes no wait; if it fails, it is tried again later."""
        if self._prepared is None and not self.busy and self._sidecar.accepts():
            made = self._sidecar.connect_at_once()
            if made is not None:
                self._keep(*made)

    def run_ended(self, run: str) -> None:
        """Close the prepared connection if it is one to this run."""
        if self._made is not None and self._made[1] == run:
            self._drop()

    def close(self) -> None:
        """Await no more replies; close the prepared connection, or have none made."""
        self._let_go()
        self._drop()

    def _drop(self) -> None:
        if self._made is not None:
            self._made[0].close()
        elif self._prepared is not None:
            self._prepared.cancel()
        self._prepared = None

    async def _connection(self) -> tuple[socket.socket, str]:
        """The prepared connection and its run if they are of use, else new ones."""
        self._connecting = True
        try:
            sock, run = await self._connect()
        finally:
            self._connecting = False
        if self._sidecar.leaving:
            self._keep(sock, run)  # for the successor of this process
            raise NotSentError(RENEWED)
        return sock, run

    def _keep(self, sock: socket.socket, run: str) -> None:
        """Have the next request go over a connection that was made and not used: simple plugins die of its end."""
        self._prepared = asyncio.get_running_loop().create_future()
        self._prepared.set_result((sock, run))

    async def _connect(self) -> tuple[socket.socket, str]:
        prepared, self._prepared = self._prepared, None
        if prepared is not None:
            with contextlib.suppress(IsolatorError, NotSentError):
                try:
                    sock, run = await prepared
                except asyncio.CancelledError:
                    if not prepared.cancelled():  # it came at that very moment
                        self._prepared = prepared
                    raise
                if not self._sidecar.is_over(run):
                    return sock, run
                sock.close()
        return await self._sidecar.connect()

    # One host in the place of another

    @property
    def connecting(self) -> bool:
        """Whether a connect is under way."""
        return self._connecting or (self._prepared is not None and not self._prepared.done())

    @property
    def replied(self) -> bool:
        """Whether a reply is there that is not concluded yet."""
        return self._current is not None and self._current.exchange.reply.done()

    def pass_on(self, departure: Departure) -> OneshotState:
        """Hand on the request or ping that is in flight, and the connection that was made and not written to."""
        current, request, ping = self._current, None, None
        if current is not None and not current.exchange.sent_ns:
            self._keep(current.exchange.sock.dup(), current.run)  # counting it takes longer than the host waits
        elif current is not None and current.exchange.unanswered:
            exchange = current.exchange.pass_on(departure)
            request = RequestState(seq=current.delivery.seq, run=current.run, exchange=exchange)
        if self._ping is not None and self._ping.unanswered:
            ping = self._ping.pass_on(departure)
        prepared, run = self._made or (None, "")
        number = departure.add(prepared.detach()) if prepared is not None else -1
        self._prepared = None
        self._let_go()
        return OneshotState(request=request, prepared=number, prepared_run=run, ping=ping)

    @property
    def _made(self) -> tuple[socket.socket, str] | None:
        """The prepared connection and its run, once it is there."""
        made = self._prepared
        return made.result() if made and made.done() and not made.cancelled() and made.exception() is None else None

    def began(self, delivery: Delivery) -> bool:
        """Whether an attempt of this delivery is under way, sent or about to be."""
        return self._current is not None and self._current.delivery is delivery

    def take_over(
        self, plugin: Plugin | None, delivery: Delivery | None, state: OneshotState, descriptors: Descriptors
    ) -> None:
        """Take over what another host had, the request in flight, which is of ``delivery``; ``go_on`` is to follow."""
        if state.prepared >= 0:
            prepared = socket.socket(fileno=descriptors.take(state.prepared))
            self._keep(prepared, state.prepared_run)
        if state.ping is not None:
            self._ping = Exchange.taken_over(socket.socket(fileno=descriptors.take(state.ping.socket)), state.ping)
        if state.request is not None and plugin is not None and delivery is not None:
            sock = socket.socket(fileno=descriptors.take(state.request.exchange.socket))
            self._sidecar.take_request(1)
            exchange = Exchange.taken_over(sock, state.request.exchange)
            self._await(_Request(plugin, delivery, state.request.run, exchange))

    async def go_on(self) -> None:
        """Wait for the reply to what another host has sent; that to a request concludes it."""
        if self._ping is not None:
            async with self._turn():
                with contextlib.suppress(LostError):  # a watch counts its own pings
                    await self._pong(self._ping)
        await self.answered()
