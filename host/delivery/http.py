"""Delivery in the mode ``http``: each event is a POST to the sidecar's server, on a connection of its own."""

from __future__ import annotations

import asyncio
import socket
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from host.channel.cloud_events import GONE, event_headers, outcome_of, sign
from host.channel.http import Headers, HttpExchange, HttpState, Response, write_request
from host.channel.reply import STREAM_MESSAGE, LostError, NotSentError, params_text
from host.delivery.modes import Mode, Parts
from host.delivery.outcome import judged
from host.plugins.manifest import Transport
from host.plugins.registry import Plugin
from host.queue.interface import Delivery
from isolator.audit.client import moment
from isolator.errors import IsolatorError
from isolator.ipc.body import Body, omitted
from isolator.ipc.messages import DisablePlugin
from isolator.ipc.succession import Departure, Descriptors
from isolator.ipc.tasks import Tasks

HEALTH_PATH = "/healthz"


class PostState(Body):
    """A request in flight, on its way to another host."""

    seq: int
    run: str
    exchange: HttpState


class HttpDeliveryState(Body):
    """The requests of a plugin on their way to another host."""

    posts: tuple[PostState, ...]
    pings: tuple[HttpState, ...] = omitted(default=())


@dataclass(eq=False)
class _Post:
    """A request whose answer is awaited."""

    plugin: Plugin
    delivery: Delivery
    run: str
    exchange: HttpExchange


class HttpDelivery(Mode):
    """Delivers events to one plugin in the mode ``http``."""

    State = HttpDeliveryState

    def __init__(self, parts: Parts) -> None:
        super().__init__(parts)
        self._posts: set[_Post] = set()
        self._pings: set[HttpExchange] = set()
        self._connecting = 0
        self._slot = asyncio.Event()
        self._tasks = Tasks()

    @property
    def busy(self) -> bool:
        return bool(self._posts)

    async def deliver(self, plugin: Plugin, hook: str, delivery: Delivery) -> None:
        assert delivery.event is not None and plugin.manifest is not None
        body = params_text(delivery.event, self.parts.catalogue.get(delivery.event.name), plugin.major).encode()
        if len(body) > STREAM_MESSAGE:
            self.parts.outcomes.give_up(delivery, "payload_too_large")
            return
        while len(self._posts) >= self.parts.outcomes.most_in_flight(plugin):
            self._slot.clear()
            await self._slot.wait()
        headers = self._headers(plugin, hook, delivery, body)
        data = write_request("POST", plugin.manifest.transport.path, headers, body)
        sock, run = await self._connect(plugin)
        try:
            self.parts.sidecar.begin_request(run)
        except NotSentError:
            sock.close()
            raise
        post = _Post(plugin, delivery, run, HttpExchange(sock, "POST", data, plugin.timeout))
        self._await(post)
        self.parts.outcomes.begin(delivery, run, data, post.exchange.send, post.exchange.give_up)
        self.parts.sidecar.status = "in_flight"

    async def ping(self, plugin: Plugin, timeout: float) -> None:
        sock, _ = await self._connect(plugin)
        ping = HttpExchange(sock, "GET", write_request("GET", HEALTH_PATH, []), timeout)
        ping.send()
        response = await self._pong(ping)
        if not 200 <= response.status < 300:
            raise LostError(f"{HEALTH_PATH} answered {response.status}")

    async def _pong(self, ping: HttpExchange) -> Response:
        """Wait for the answer to a ping; the connection is closed then. Raises LostError."""
        self._pings.add(ping)
        try:
            return await ping.reply
        finally:
            self._pings.discard(ping)
            ping.close()
            ping.sock.close()

    async def _connect(self, plugin: Plugin) -> tuple[socket.socket, str]:
        assert plugin.manifest is not None
        of_port = plugin.manifest.transport.port is not None
        self._connecting += 1
        try:
            sock, run = await self.parts.sidecar.connect(socket.AF_INET if of_port else socket.AF_UNIX)
        finally:
            self._connecting -= 1
        foreign = None if of_port else self.parts.sidecar.check_peer(sock, plugin, run)
        if foreign is not None:
            sock.close()
            raise NotSentError(foreign)
        return sock, run

    def _headers(self, plugin: Plugin, hook: str, delivery: Delivery, body: bytes) -> Headers:
        event = delivery.event
        assert event is not None and plugin.manifest is not None
        headers = event_headers(
            event, hook, self.parts.source, key=delivery.key or "", attempt=delivery.attempts + 1, epoch=delivery.epoch
        )
        transport: Transport = plugin.manifest.transport
        if transport.secret is not None:
            secret = self.parts.config.value(plugin.name, plugin.manifest, plugin.digest, transport.secret)
            if secret is None:
                why = f"{transport.secret}, which signs requests, is not set"
                remedy = f"isolator plugin config {plugin.name} set {transport.secret}=@FILE"
                raise IsolatorError(f"config of {plugin.name}", why, remedy)
            headers += sign(secret, event.id, int(time.time()), body)
        return headers

    def _await(self, post: _Post) -> None:
        self._posts.add(post)
        post.exchange.reply.add_done_callback(lambda _: self._answered(post))

    def _answered(self, post: _Post) -> None:
        self._posts.discard(post)
        self._slot.set()
        self.parts.sidecar.end_request()
        at, reply, broken = moment(), post.exchange.reply, False
        cancelled = reply.cancelled()
        post.exchange.close()
        post.exchange.sock.close()
        if cancelled:  # the worker ends
            return
        try:
            response = reply.result()
            outcome = judged(outcome_of, response)
            if response.status == GONE:
                self._tasks.run(f"pause of {post.plugin.name}", self._pause(post), expected=(IsolatorError,))
        except LostError as error:
            outcome, broken = error.outcome, error.crash
        sent_ns = post.exchange.sent_ns
        self.parts.outcomes.conclude(post.plugin, post.delivery, post.run, outcome, sent_ns, at, broken=broken)

    async def _pause(self, post: _Post) -> None:
        """Have a plugin that wants no more events stopped until an operator enables it; its events stay."""
        self.parts.sidecar.record_fault(post.run, "it answered 410, and is disabled until an operator enables it")
        await self.parts.supervisor.ask(DisablePlugin(name=post.plugin.name))

    def close(self) -> None:
        for post in list(self._posts):
            post.exchange.reply.cancel()
        self._tasks.cancel()

    # One host in the place of another

    @property
    def unsettled(self) -> bool:
        return self._connecting > 0

    @property
    def replied(self) -> bool:
        return any(post.exchange.reply.done() for post in self._posts)

    def pass_on(self, departure: Departure) -> HttpDeliveryState | None:
        posts = tuple(
            PostState(seq=post.delivery.seq, run=post.run, exchange=post.exchange.pass_on(departure))
            for post in self._posts
            if post.exchange.unanswered
        )
        pings = tuple(ping.pass_on(departure) for ping in self._pings if ping.unanswered)
        self.close()
        return HttpDeliveryState(posts=posts, pings=pings)

    @classmethod
    def in_flight(cls, state: Any) -> Sequence[int]:
        return [post.seq for post in state.posts]

    async def take_over(
        self, plugin: Plugin | None, deliveries: Mapping[int, Delivery], state: Any, descriptors: Descriptors
    ) -> None:
        for ping in state.pings:
            exchange = HttpExchange.taken_over(socket.socket(fileno=descriptors.take(ping.socket)), ping)
            self._tasks.run(f"ping of {self.parts.sidecar.name}", self._pong(exchange), expected=(LostError,))
        for one in state.posts:
            delivery = deliveries.get(one.seq)
            if plugin is not None and delivery is not None:
                sock = socket.socket(fileno=descriptors.take(one.exchange.socket))
                self.parts.sidecar.take_request()
                self._await(_Post(plugin, delivery, one.run, HttpExchange.taken_over(sock, one.exchange)))
