"""Outbound connections of one cage: judge, dial, compare and carry each that the kernel redirected to the broker.

For each accepted connection, in this order:

1. ``SO_ORIGINAL_DST`` gives its destination. A virtual address is a name; one that was never answered is refused;
   any other address was written by the plugin itself.
2. Name or address and port against the policy; then, for a name, its addresses now; each address against the
   always-blocked list and the host's own. The checked addresses are dialled: there is no second lookup.
3. The first bytes against the name (``guard``), and whatever else in the clear names a server (``gate``).
4. Bytes both ways until both ends are done, one breaks off, or nothing moved for the policy's ``idle``.

While the plugin is held back by its ``Fence`` nothing of this begins, and what has begun waits.

A refusal is a reset, at once. Each decision is a record: ``net.connect`` and ``net.closed``, or ``net.denied``.
"""

from __future__ import annotations

import asyncio
import socket
import struct
from collections.abc import Sequence
from functools import partial
from ipaddress import IPv4Address, IPv6Address
from typing import TYPE_CHECKING, Any, Self

from isolator.broker import guard
from isolator.broker.buffers import Buffers
from isolator.broker.dial import dial
from isolator.broker.dns import Answers, NameServer, NameServerState
from isolator.broker.first_bytes import FIRST_BYTES, FirstBytes
from isolator.broker.flow import Flow, FlowState, FlowTable
from isolator.broker.gate.gate import Gate
from isolator.broker.guard import Denied
from isolator.broker.inbound import Fetch, Inbound, InboundState
from isolator.broker.reach import Reach
from isolator.broker.records import Records
from isolator.broker.relay import reset, tune
from isolator.broker.resolver import Resolver
from isolator.broker.shared import Shared
from isolator.broker.turns import Turns
from isolator.broker.virtual import EntryState, VirtualPool
from isolator.ipc.accept_loop import AcceptLoop
from isolator.ipc.body import Body, Json
from isolator.ipc.fence import Fence
from isolator.ipc.succession import Departure, Descriptors
from isolator.ipc.tasks import cancel_all
from isolator.linux.boottime import boottime
from isolator.policy.addresses import Address
from isolator.policy.denial import DenialRule
from isolator.policy.destinations import Rules
from isolator.policy.model import NetworkPolicy

if TYPE_CHECKING:
    from isolator.broker.proxy import Proxy

APART = 0.001
"""Seconds from one connection of a cage that is opened at once to the next: a burst takes turns with other cages."""
_SO_ORIGINAL_DST = 80
_SOL_IPV6 = 41


class CageState(Body):
    """The broker's side of one run on its way to another broker."""

    run: str
    plugin: str
    policy: Json
    """JSON of `NetworkPolicy`"""
    tcp: tuple[int, ...]
    """its listeners: IPv4, IPv6 if there is one"""
    names: NameServerState
    nflog: int
    inbound: InboundState
    virtual: tuple[EntryState, ...]
    flows: tuple[FlowState, ...]


class Outbound:
    """The broker's side of one run. Owns ``sockets``, and serves them until it is closed.

    These are TCP v4, TCP v6, DNS UDP, DNS TCP, NFLOG and a host listener for each ``listen`` rule, in this order.
    """

    def __init__(
        self, run: str, plugin: str, rules: Rules, fence: Fence, shared: Shared, fetch: Fetch,
        sockets: Sequence[socket.socket], *, drops: int = 0,
    ) -> None:  # fmt: skip
        tcp4, tcp6, dns_udp, dns_tcp, log, *inbound = sockets
        policy = rules.policy
        self.run, self.plugin = run, plugin
        self._shared, self._rules, self._fence = shared, rules, fence
        self._loop = asyncio.get_running_loop()
        self._flows = FlowTable(policy.connects_open, self._end, self._busy)
        self._buffers = Buffers()
        self._turns = Turns()
        self._first_bytes = FirstBytes(policy, fence)
        self._at_once_again = 0.0
        self._pool = VirtualPool(rules, self._loop.time)
        self._resolver = Resolver(policy.resolvers, shared.resolvers, fence)
        self._proxy: Proxy | None = None
        if policy.proxy:
            from isolator.broker.proxy import Proxy

            self._proxy = Proxy(policy.proxy, Resolver(policy.resolvers, shared.resolvers, fence), fence)
        self._reach = Reach(rules, self._pool, self._resolver, shared)
        self._records = Records(shared.audit, plugin, run, self._loop.time, self._busy)
        answers = Answers(
            rules, self._pool, self._resolver, self._reach.blocked, self._records.query, shared.unrecordable
        )
        self._name_server = NameServer(answers, dns_udp, dns_tcp, drops)
        if tcp6.family != socket.AF_INET6:
            tcp6.close()  # a host without IPv6 has something else in the place of its listener
        listeners = [listener for listener in (tcp4, tcp6) if listener.fileno() >= 0]
        for listener in listeners:
            tune(listener)
        self._accepting = [AcceptLoop(listener, self._accepted) for listener in listeners]
        log.setblocking(False)
        self._nflog = log
        self._loop.add_reader(log.fileno(), self._read_refusals)
        self._inbound = Inbound(
            zip(inbound, policy.listen, strict=True), fetch, self._records.write, self._records.count, fence,
            shared.scratch, self._buffers, self._turns, limit=policy.connects_open, refusal=shared.unrecordable,
            busy=self._busy,
        )  # fmt: skip

    async def pass_on(self, departure: Departure) -> CageState:
        """Hand the sockets and every connection to another broker; counts that were not written are, here."""
        listeners = [accepting.release() for accepting in self._accepting]
        names = await self._name_server.pass_on(departure)
        inbound = await self._inbound.pass_on(departure)
        flows = await self._flows.pass_on(departure)
        self._loop.remove_reader(self._nflog.fileno())
        self._read_refusals()
        self._records.flush(everything=True)
        self._shared.ticks.drop(self.tick)
        return CageState(
            run=self.run,
            plugin=self.plugin,
            policy=self._rules.policy.model_dump(mode="json"),
            tcp=tuple(departure.add(listener.detach()) for listener in listeners),
            names=names,
            nflog=departure.add(self._nflog.detach()),
            inbound=inbound,
            virtual=self._pool.pass_on(),
            flows=flows,
        )

    @classmethod
    def taken_over(cls, state: CageState, fence: Fence, shared: Shared, fetch: Fetch, descriptors: Descriptors) -> Self:
        """Serve what another broker has served, its connections with it."""

        def take(*numbers: int) -> list[socket.socket]:
            return [socket.socket(fileno=descriptors.take(number)) for number in numbers]

        no_ipv6 = [socket.socket(socket.AF_INET)] if len(state.tcp) < 2 else []
        sockets = [
            *take(*state.tcp), *no_ipv6, *take(state.names.udp, state.names.tcp, state.nflog),
            *take(*state.inbound.listeners),
        ]  # fmt: skip
        rules = Rules(NetworkPolicy.model_validate(state.policy))
        cage = cls(state.run, state.plugin, rules, fence, shared, fetch, sockets, drops=state.names.drops)
        cage._pool.take_over(state.virtual)
        for one in state.flows:
            flow = Flow.taken_over(one, descriptors)
            cage._flows.add(flow)
            if flow.recorded:
                flow.roomy = cage._buffers.take()
                flow.entry = cage._reach.entry(flow)
                if flow.entry is not None:
                    flow.entry.flows += 1
                gate_again = partial(cage._first_bytes.gate_again, flow)
                flow.join_again(shared.scratch, fence, cage._turns, cage._end, gate_again)
            else:
                cage._flows.open(flow, cage._open(flow))
        cage._inbound.take_over(state.inbound, descriptors)
        return cage

    async def close(self) -> None:
        """Close the listeners and end every flow; all records are written when it returns."""
        for accepting in self._accepting:
            accepting.close()
        await self._inbound.close()
        await self._name_server.close()
        await self._resolver.close()
        if self._proxy is not None:
            await self._proxy.close()
        await self._flows.close()
        self._read_refusals()
        self._loop.remove_reader(self._nflog.fileno())
        self._nflog.close()
        self._records.flush(everything=True)
        self._shared.ticks.drop(self.tick)

    def _busy(self) -> None:
        self._shared.ticks.want(self.tick)

    def tick(self) -> bool:
        """Write counts that are due and end flows that stand still, once a second; whether there is anything left."""
        counting = self._records.flush()
        both = self._flows, self._inbound.flows
        if not any(both):
            return counting
        for flows in both:
            flows.tune()
        if not self._fence.closed_since(boottime() - FIRST_BYTES):
            self._flows.end_incomplete(self._loop.time() - FIRST_BYTES)
        if not self._fence.closed_since(boottime() - self._rules.policy.idle):
            for flows in both:
                flows.end_idle(self._loop.time() - self._rules.policy.idle)
        return counting or any(both)

    def _accepted(self, client: socket.socket, peer: Sequence[object]) -> None:
        try:
            address, port = _original_destination(client, 4 if len(peer) == 2 else 6)
        except OSError:
            reset(client)
            return
        flow = Flow(client, address, port, self._loop.time())
        if self._flows.full:
            self._deny(flow, DenialRule.TOO_MANY_OPEN)
            reset(client)
        else:
            self._begin(flow)

    def _begin(self, flow: Flow) -> None:
        at_once = flow.started >= self._at_once_again
        if at_once:
            self._at_once_again = flow.started + APART
        self._flows.open(flow, self._open(flow), at_once=at_once)

    def _end(self, flow: Flow, failure: BaseException | None) -> None:
        if isinstance(failure, Denied):
            self._deny(flow, failure.rule, **failure.found)
        elif failure is not None:
            flow.failed(failure)
            if flow.rule and not (flow.recorded or flow.left):  # it may have knocked at the other side
                self._records.count(flow.unreachable())
        flow.release(orderly=failure is None)
        if flow.roomy:
            self._buffers.give()
        if flow.recorded:
            self._records.write(flow.closed(self._loop.time()))
        self._flows.remove(flow)

    async def _open(self, flow: Flow) -> None:
        """Judge, dial, compare and join; raises Denied or OSError. Nothing is awaited that is there already."""
        if self._fence.closed:
            await self._fence.opened()
        self._reach.admit(flow)
        addresses = await self._reach.addresses(flow)
        if flow.name is None or not guard.speaks_first(flow.port):
            await self._dial(flow, addresses)
            self._join(flow)
            return
        gate = self._first_bytes.gate(flow)
        hello = self._loop.create_task(self._first_bytes.read(flow, gate))
        try:
            await self._dial(flow, addresses)
            first = await hello
        finally:
            await cancel_all([hello])
        self._join(flow, gate, first)

    def _join(self, flow: Flow, gate: Gate | None = None, first: bytes = b"") -> None:
        assert flow.server is not None
        if gate is None and flow.name is not None:
            gate = self._first_bytes.gate(flow)
        flow.recorded, flow.first = True, b""
        self._records.write(flow.opened(), happened_ns=flow.began, urgent=True)  # ahead of the first byte
        up, down = flow.join(self._shared.scratch, self._fence, self._turns, self._end)
        if gate is not None:
            up.guard(gate, down)
        flow.begin(self._turns, first)

    async def _dial(self, flow: Flow, addresses: tuple[Address, ...]) -> None:
        flow.roomy = self._buffers.take()
        if self._proxy is None:
            flow.server, flow.dialled = await dial(addresses, flow.port, self._fence, small=not flow.roomy)
        else:
            flow.via = self._proxy.where
            flow.server, flow.dialled = await self._proxy.dial(addresses, flow.name, flow.port, small=not flow.roomy)

    def _read_refusals(self) -> None:
        self._records.read_refusals(self._nflog, self._rules, self._pool)

    def _deny(self, flow: Flow, rule: str, **found: Any) -> None:
        flow.reason = rule
        self._records.count(flow.denied(rule, **found))


def _original_destination(client: socket.socket, version: int) -> tuple[Address, int]:
    """Read the destination of a redirected connection; raises OSError when the kernel does not know it (any more)."""
    if version == 4:
        raw = client.getsockopt(socket.IPPROTO_IP, _SO_ORIGINAL_DST, 16)
        port, packed = struct.unpack_from("!2xH4s", raw)
        return IPv4Address(packed), port
    raw = client.getsockopt(_SOL_IPV6, _SO_ORIGINAL_DST, 28)
    port, packed = struct.unpack_from("!2xH4x16s", raw)
    return IPv6Address(packed), port
