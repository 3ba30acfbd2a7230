"""One-shot delivery: an event at a time, each over a connection of its own (see ``host.channel.oneshot``)."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import time

from host.channel.oneshot import Exchange, exchange
from host.channel.reply import LostError, NotSentError, oneshot_request, read_reply
from host.delivery.outcome import Outcomes
from host.delivery.sidecar import SidecarLink
from host.events import Catalogue
from host.plugins.registry import Plugin
from host.queue.interface import Delivery
from host.wire.strict_json import line, parse_object
from isolator.errors import IsolatorError

_PING = line({"jsonrpc": "2.0", "method": "ping", "params": {}, "id": 1})


class OneshotDelivery:
    """Delivers events to one plugin in one-shot mode."""

    def __init__(self, sidecar: SidecarLink, outcomes: Outcomes, catalogue: Catalogue) -> None:
        self._sidecar, self._outcomes, self._catalogue = sidecar, outcomes, catalogue
        self._turn = asyncio.Lock()
        """Held while a request is on its way: the plugin serves one connection at a time."""
        self._prepared: asyncio.Task[tuple[socket.socket, str]] | None = None

    @property
    def busy(self) -> bool:
        """Whether a request is on its way."""
        return self._turn.locked()

    async def deliver(self, plugin: Plugin, hook: str, delivery: Delivery) -> None:
        """Try a delivery and conclude it; raises NotSentError or IsolatorError when nothing could be sent."""
        async with self._turn:
            await self._deliver(plugin, hook, delivery)

    async def _deliver(self, plugin: Plugin, hook: str, delivery: Delivery) -> None:
        assert delivery.event is not None
        request = oneshot_request(
            delivery.event,
            hook,
            self._catalogue.get(delivery.event.name),
            attempt=delivery.attempts + 1,
            timeout=plugin.timeout,
            major=plugin.major,
            meta=plugin.manifest is None or plugin.manifest.transport.meta == "fit",
        )
        if request is None:
            self._outcomes.give_up(delivery, "payload_too_large")
            return
        sock, run = await self._connection()
        with sock:
            foreign = self._sidecar.check_peer(sock, plugin, run)
            if foreign is not None:
                self._outcomes.refuse(plugin, delivery, foreign)
                return
            self._sidecar.begin_request(run)
            exchange = Exchange(sock, request, plugin.timeout)
            self._outcomes.begin(delivery, run, request, exchange.send)
            self._sidecar.status = "in_flight"
            broken = False
            try:
                outcome = read_reply(await exchange.reply)
            except LostError as error:
                outcome, broken = error.outcome, error.crash
            finally:
                exchange.close()
                self._sidecar.end_request()
            latency = (time.perf_counter_ns() - exchange.sent_ns) // 1000
        self._outcomes.conclude(plugin, delivery, run, outcome, latency, broken=broken)

    async def ping(self, timeout: float) -> None:
        """Send ``ping``; any JSON object is a pong. Raises LostError, NotSentError, WireError, IsolatorError."""
        async with self._turn:
            sock, _ = await self._connection()
            with sock:
                reply = await exchange(sock, _PING, timeout)
        parse_object(reply)

    def prepare(self) -> bool:
        """Connect for an event that is being synced; returns whether it can be sent as soon as that is done.

        Only to a run that was reached before, so that a start or a hang is never waited for here. A connection must
        not be closed unused, since simple scripts die of that; if the event is not accepted after all, the next
        one goes over it.
        """
        if self._turn.locked() or not self._sidecar.reached:
            return False
        if self._prepared is None:
            self._prepared = asyncio.get_running_loop().create_task(self._sidecar.connect())
        return True

    def drop_prepared(self) -> None:
        """Close the prepared connection: its run has ended."""
        prepared, self._prepared = self._prepared, None
        if prepared is not None and not prepared.cancel() and prepared.exception() is None:
            prepared.result()[0].close()

    async def _connection(self) -> tuple[socket.socket, str]:
        """The prepared connection and its run if they are of use, else new ones."""
        prepared, self._prepared = self._prepared, None
        if prepared is not None:
            with contextlib.suppress(IsolatorError, NotSentError):
                sock, run = await prepared
                if run == self._sidecar.run:
                    return sock, run
                sock.close()
        return await self._sidecar.connect()
