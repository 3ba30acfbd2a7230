"""Delivery in the mode ``http``: each event is a POST to the sidecar's server, on a connection of its own.

Events go out as CloudEvents 1.0 in binary mode: the payload is the body, the rest is headers (``ce-*``). A plugin whose
manifest names a secret also gets the headers of Standard Webhooks, by which its libraries know the sender.
"""

from __future__ import annotations

import asyncio
import base64
import binascii
import email.utils
import hashlib
import hmac
import re
import socket
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from host.channel.http import Headers, HttpExchange, HttpState, Response, request, write_request
from host.channel.reply import SHORTEST_PAUSE, STREAM_MESSAGE, LostError, NotSentError, Outcome, interpret, params_text
from host.delivery.modes import Mode, Parts
from host.plugins.manifest import Transport
from host.plugins.registry import Plugin
from host.queue.interface import Delivery
from host.wire.strict_json import WireError, parse_object
from isolator.errors import IsolatorError
from isolator.ipc.body import Body
from isolator.ipc.messages import DisablePlugin
from isolator.ipc.succession import Departure, Descriptors
from isolator.ipc.tasks import Tasks

DUPLICATE, GONE = 409, 410
RETRY = frozenset({408, 425, 429})
LONGEST_PAUSE = 600.0
"""Seconds of a ``Retry-After`` that are granted."""
HEALTH_PATH = "/healthz"
_TRACEPARENT = re.compile(r"[0-9a-f]{2}-[0-9a-f]{32}-[0-9a-f]{16}-[0-9a-f]{2}")
"""As W3C Trace Context has it."""


class PostState(Body):
    """A request in flight, on its way to another host."""

    seq: int
    run: str
    exchange: HttpState


class HttpDeliveryState(Body):
    """The requests of a plugin on their way to another host."""

    posts: tuple[PostState, ...]


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
        self._connecting = 0
        self._slot = asyncio.Event()
        self._tasks = Tasks()

    @property
    def busy(self) -> bool:
        return bool(self._posts)

    async def deliver(self, plugin: Plugin, hook: str, delivery: Delivery) -> None:
        assert delivery.event is not None and plugin.manifest is not None
        transport, limit = plugin.manifest.transport, plugin.manifest.delivery.concurrency
        body = params_text(delivery.event, self.parts.catalogue.get(delivery.event.name), plugin.major).encode()
        if len(body) > STREAM_MESSAGE:
            self.parts.outcomes.give_up(delivery, "payload_too_large")
            return
        most = min(limit, transport.max_in_flight)
        while len(self._posts) >= (1 if self.parts.outcomes.isolated_retries else most):
            self._slot.clear()
            await self._slot.wait()
        headers = self._headers(plugin, hook, delivery, body)
        data = write_request("POST", transport.path, headers, body)
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
        with sock:
            response = await request(sock, "GET", write_request("GET", HEALTH_PATH, []), timeout)
        if not 200 <= response.status < 300:
            raise LostError(f"{HEALTH_PATH} answered {response.status}")

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
        attributes = {
            "specversion": "1.0",
            "id": event.id,
            "source": self.parts.source,
            "type": hook,
            "time": event.time,
            "subject": (delivery.key or "").partition("=")[2],
            "attempt": str(delivery.attempts + 1),
            "traceparent": event.trace or "",
            "epoch": str(delivery.epoch) if delivery.epoch else "",
        }
        headers = [(f"ce-{name}", _escape(value)) for name, value in attributes.items() if value]
        headers.append(("content-type", "application/json"))
        if event.trace and _TRACEPARENT.fullmatch(event.trace):  # an emitter may name any text
            headers.append(("traceparent", event.trace))
        transport: Transport = plugin.manifest.transport
        if transport.secret is not None:
            secret = self.parts.config_value(plugin, transport.secret)
            if secret is None:
                raise IsolatorError(
                    f"config of {plugin.name}", f"{transport.secret}, which signs requests, is not set",
                    f"isolator plugin config {plugin.name} set {transport.secret}=VALUE",
                )  # fmt: skip
            headers += sign(secret, event.id, int(time.time()), body)
        return headers

    def _await(self, post: _Post) -> None:
        self._posts.add(post)
        post.exchange.reply.add_done_callback(lambda _: self._answered(post))

    def _answered(self, post: _Post) -> None:
        self._posts.discard(post)
        self._slot.set()
        self.parts.sidecar.end_request()
        reply, broken = post.exchange.reply, False
        cancelled = reply.cancelled()
        post.exchange.close()
        post.exchange.sock.close()
        if cancelled:  # the worker ends
            return
        try:
            outcome = outcome_of(reply.result())
            if reply.result().status == GONE:
                self._tasks.run(f"pause of {post.plugin.name}", self._pause(post), expected=(IsolatorError,))
        except LostError as error:
            outcome, broken = error.outcome, error.crash
        latency = (time.perf_counter_ns() - post.exchange.sent_ns) // 1000
        self.parts.outcomes.conclude(post.plugin, post.delivery, post.run, outcome, latency, broken=broken)

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
        self.close()
        return HttpDeliveryState(posts=posts)

    @classmethod
    def in_flight(cls, state: Any) -> Sequence[int]:
        return [post.seq for post in state.posts]

    async def take_over(
        self, plugin: Plugin | None, deliveries: Mapping[int, Delivery], state: Any, descriptors: Descriptors
    ) -> None:
        for one in state.posts:
            delivery = deliveries.get(one.seq)
            if plugin is not None and delivery is not None:
                sock = socket.socket(fileno=descriptors.take(one.exchange.socket))
                self.parts.sidecar.take_request()
                self._await(_Post(plugin, delivery, one.run, HttpExchange.taken_over(sock, one.exchange)))


def outcome_of(response: Response) -> Outcome:
    """The outcome that an answer means."""
    text, sha256 = response.body.decode("utf-8", "replace"), hashlib.sha256(response.body).hexdigest()
    result = _result(response)
    status, size = response.status, len(response.body)
    named = result.get("status") if result is not None else None
    _, word, message, _ = interpret({"result": result})
    detail = message or f"HTTP {status}"
    if 200 <= status < 300:
        return Outcome("ok", word if isinstance(named, str) else "ok", message, text, size, sha256)
    if status == DUPLICATE:
        return Outcome("ok", "duplicate", message, text, size, sha256)
    if status == GONE:
        return Outcome("busy", "gone", detail, text, size, sha256, SHORTEST_PAUSE)
    if status in RETRY or status >= 500:
        return Outcome("retry", str(status), detail, text, size, sha256, _pause(response.retry_after))
    return Outcome("rejected", str(status), detail, text, size, sha256)


def _result(response: Response) -> dict[str, Any] | None:
    if not response.whole or not response.body.lstrip().startswith(b"{"):
        return None
    try:
        return parse_object(response.body.strip())
    except WireError:
        return None


def _pause(retry_after: str | None) -> float | None:
    """Seconds of a ``Retry-After`` (RFC 9110: a number of them, or a date); None where it has neither."""
    if retry_after is None:
        return None
    if retry_after.isascii() and retry_after.isdigit():
        seconds = float(retry_after[:9])
    else:
        try:
            date = email.utils.parsedate_to_datetime(retry_after)
        except (ValueError, OverflowError):
            return None
        date = date if date.tzinfo is not None else date.replace(tzinfo=UTC)
        seconds = (date - datetime.now(UTC)).total_seconds()
    return min(max(seconds, SHORTEST_PAUSE), LONGEST_PAUSE)


def _escape(value: str) -> str:
    """An attribute as a header (CloudEvents, HTTP binding 3.1.3.2): what is not plainly printable, in percents."""
    plain = (c if 0x21 <= ord(c) <= 0x7E and c not in '"%' else None for c in value)
    return "".join(
        c if c is not None else "".join(f"%{byte:02X}" for byte in value[i].encode()) for i, c in enumerate(plain)
    )


def sign(secret: str, message: str, at: int, body: bytes) -> Headers:
    """The headers of Standard Webhooks; a secret is base64, mostly after ``whsec_``, or any other text as it is."""
    try:
        key = base64.b64decode(secret.removeprefix("whsec_"), validate=True)
    except (binascii.Error, ValueError):
        key = secret.encode()
    signature = hmac.new(key, f"{message}.{at}.".encode() + body, hashlib.sha256).digest()
    return [
        ("webhook-id", message),
        ("webhook-timestamp", str(at)),
        ("webhook-signature", f"v1,{base64.b64encode(signature).decode()}"),
    ]
