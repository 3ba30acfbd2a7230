"""Inbound connections: a host port, granted by ``listen``, forwarded to a port on the cage's loopback.

The supervisor binds the host's listeners and hands them over with the cage's own sockets. The sockets of the other side
are made inside the cage's network, which the broker cannot enter: it asks the supervisor for a few at a time
(``cage.sockets``) and connects them itself. So nothing is routed into a cage, and the listener ends with the broker or
the run: while the plugin does not run, its port refuses.

The bytes of the far end are only carried, never read. The plugin sees connections from its own loopback.
"""

from __future__ import annotations

import asyncio
import errno
import socket
from collections import deque
from collections.abc import Awaitable, Callable, Iterable, Sequence
from functools import partial
from ipaddress import IPv4Address, IPv6Address

from isolator.broker.buffers import Buffers, keep_small
from isolator.broker.flow import Flow, FlowState, FlowTable
from isolator.broker.gate.gate import Gate, GateState
from isolator.broker.relay import Scratch, reset, tune
from isolator.broker.repeats import Repeatable, Write
from isolator.broker.turns import Turns
from isolator.errors import IsolatorError, UsageError
from isolator.ipc.accept_loop import AcceptLoop
from isolator.ipc.body import Body
from isolator.ipc.fence import Fence
from isolator.ipc.succession import Departure, Descriptors
from isolator.ipc.tasks import Tasks, cancel_all
from isolator.policy.addresses import parse_address
from isolator.policy.denial import DenialRule
from isolator.policy.model import ListenRule
from isolator.policy.names import format_listen

BATCH = 8
"""Sockets requested at a time, again when half are used."""
CONNECT = 5.0
"""Seconds that the plugin's listener may take to accept; a full backlog is what takes long."""

Fetch = Callable[[int, int], Awaitable[list[socket.socket]]]
"""Called with a count and an IP version; returns unconnected sockets of the cage's network; raises IsolatorError."""


class InboundState(Body):
    """Listeners and connections on their way to another broker."""

    listeners: tuple[int, ...]
    flows: tuple[FlowState, ...]


class Inbound:
    """The listeners of one run, which it owns, and the connections that came in by them.

    ``fence``: past its deadline connections wait. ``limit``: connections at once. ``refusal`` gives the rule that
    refuses every new connection at present, or None. ``busy`` is called with the first connection of several.
    """

    def __init__(
        self,
        listeners: Iterable[tuple[socket.socket, ListenRule]],
        fetch: Fetch,
        write: Write,
        count: Callable[[Repeatable], None],
        fence: Fence,
        scratch: Scratch,
        buffers: Buffers,
        turns: Turns,
        *,
        limit: int,
        refusal: Callable[[], DenialRule | None],
        busy: Callable[[], None] = lambda: None,
    ) -> None:
        self.flows = FlowTable(limit, self._end, busy)
        self._fetch, self._write, self._count, self._refusal = fetch, write, count, refusal
        self._scratch, self._buffers, self._fence, self._turns = scratch, buffers, fence, turns
        self._loop = asyncio.get_running_loop()
        self._stock: deque[socket.socket] = deque()
        self._tasks = Tasks()
        self._filling: asyncio.Task[None] | None = None
        self._accepting = []
        for listener, rule in listeners:
            tune(listener)
            self._accepting.append(AcceptLoop(listener, partial(self._accepted, rule)))

    async def pass_on(self, departure: Departure) -> InboundState:
        """Hand the listeners and connections to another broker."""
        listeners = [accepting.release() for accepting in self._accepting]
        if self._filling is not None:
            await cancel_all([self._filling])
        while self._stock:
            self._stock.popleft().close()
        flows = await self.flows.pass_on(departure)
        return InboundState(listeners=tuple(departure.add(one.detach()) for one in listeners), flows=flows)

    def take_over(self, state: InboundState, descriptors: Descriptors) -> None:
        """Go on with the connections of another broker."""
        for one in state.flows:
            flow = Flow.taken_over(one, descriptors)
            flow.roomy = self._buffers.take()
            self.flows.add(flow)
            if flow.recorded:
                flow.join_again(self._scratch, self._fence, self._turns, self._end, _no_gate)
            else:
                self.flows.open(flow, self._open(flow))

    async def close(self) -> None:
        """Close the listeners and end every connection; all records are written when it returns."""
        for accepting in self._accepting:
            accepting.close()
        await self._tasks.close()
        await self.flows.close()
        while self._stock:
            self._stock.popleft().close()

    def _accepted(self, rule: ListenRule, client: socket.socket, peer: Sequence[object]) -> None:
        address = parse_address(str(peer[0]).partition("%")[0]) or IPv4Address(0)
        flow = Flow(client, address, rule.port, self._loop.time(), cage_port=rule.cage_port)
        flow.rule = f"listen {format_listen(rule)}"
        refused = DenialRule.TOO_MANY_OPEN if self.flows.full else self._refusal()
        if refused is None:
            flow.roomy = self._buffers.take()
            if not flow.roomy:
                keep_small(client)
            self.flows.open(flow, self._open(flow))
        else:
            self._count(flow.denied(refused))
            reset(client)

    async def _open(self, flow: Flow) -> None:
        await self._fence.opened()
        flow.server = await self._connect(flow)
        flow.recorded = True
        self._write(flow.opened(), happened_ns=flow.began)
        flow.join(self._scratch, self._fence, self._turns, self._end)
        flow.begin(self._turns)

    def _end(self, flow: Flow, failure: BaseException | None) -> None:
        if failure is not None:
            flow.failed(failure)
            if not (flow.recorded or flow.left):
                self._count(flow.unreachable())
        flow.release(orderly=failure is None)
        if flow.roomy:
            self._buffers.give()
        if flow.recorded:
            self._write(flow.closed(self._loop.time()))
        self.flows.remove(flow)

    async def _connect(self, flow: Flow) -> socket.socket:
        """A connection to the cage's port, on 127.0.0.1 or, where only that answers, ::1; raises OSError."""
        assert flow.cage_port is not None
        try:
            return await self._dial(await self._take(), str(IPv4Address("127.0.0.1")), flow.cage_port)
        except ConnectionRefusedError as refused:
            try:
                (sock,) = await self._request(1, 6)
            except OSError:
                raise refused from None
            return await self._dial(sock, str(IPv6Address("::1")), flow.cage_port)

    async def _dial(self, sock: socket.socket, address: str, port: int) -> socket.socket:
        try:
            sock.setblocking(False)
            async with asyncio.timeout(CONNECT):
                await self._loop.sock_connect(sock, (address, port))
        except TimeoutError as late:
            sock.close()
            raise OSError(errno.ETIMEDOUT, "the plugin does not accept") from late
        except BaseException:  # cancelled too: the socket has no other owner yet
            sock.close()
            raise
        return sock

    async def _take(self) -> socket.socket:
        while not self._stock:
            await asyncio.shield(self._fill())
        if len(self._stock) <= BATCH // 2:
            self._fill()
        return self._stock.popleft()

    def _fill(self) -> asyncio.Task[None]:
        if self._filling is None or self._filling.done():
            # A caller that waits sees an OSError; of a refill ahead of need the next one shows it.
            self._filling = self._tasks.run("a refill of inbound sockets", self._refill(), expected=(OSError,))
        return self._filling

    async def _refill(self) -> None:
        self._stock.extend(await self._request(BATCH, 4))

    async def _request(self, count: int, version: int) -> list[socket.socket]:
        try:
            return await self._fetch(count, version)
        except IsolatorError as error:
            raise OSError(errno.ENETUNREACH, str(error)) from error


def _no_gate(_: GateState) -> Gate:
    raise UsageError("a state that was handed over", "has a gate on a connection that comes in from outside")
