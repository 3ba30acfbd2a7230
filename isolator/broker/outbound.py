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
import errno
import socket
import struct
from collections.abc import Coroutine, Sequence
from dataclasses import dataclass
from functools import partial
from ipaddress import IPv4Address, IPv6Address
from typing import TYPE_CHECKING, Any, Self

from isolator.audit.client import AuditClient
from isolator.audit.schema import NetDenied, NetQuery, RecordData
from isolator.broker import guard, nflog, sniff
from isolator.broker.buffers import Buffers
from isolator.broker.dial import begin, dial, established
from isolator.broker.dns import QUERIES_PER_SECOND, QUERY_BURST, Answers, NameServer, NameServerState
from isolator.broker.flow import DescribedError, Flow, FlowState, FlowTable
from isolator.broker.gate.gate import Gate, GateState
from isolator.broker.gate.looking import Looking
from isolator.broker.guard import Denied
from isolator.broker.host_addresses import HostAddresses
from isolator.broker.inbound import Fetch, Inbound, InboundState
from isolator.broker.nat64 import Nat64
from isolator.broker.relay import Scratch, reset, tune
from isolator.broker.repeats import Repeatable, RepeatCounter
from isolator.broker.resolver import Answer, HostResolvers, ResolveError, Resolver
from isolator.broker.turns import Turns
from isolator.broker.virtual import Entry, EntryState, VirtualPool
from isolator.ipc.accept_loop import AcceptLoop
from isolator.ipc.body import Body, Json
from isolator.ipc.fence import Fence
from isolator.ipc.succession import Departure, Descriptors
from isolator.linux.boottime import boottime
from isolator.linux.netlink import parse_nflog
from isolator.linux.readable import receive, resolve
from isolator.policy.addresses import Address
from isolator.policy.denial import DenialRule
from isolator.policy.destinations import Rules
from isolator.policy.model import NetworkPolicy

if TYPE_CHECKING:
    from isolator.broker.proxy import Proxy

FIRST_BYTES = 15.0
"""Seconds for a client to send its first bytes where they are compared before anything passes, or to end a request."""
KERNEL_LATE = 0.1
"""Seconds by which a refusal of the kernel may be read after the plugin felt it: record and reset leave together."""
UNACKNOWLEDGED = 15_000
"""Audit records under way beyond which nothing new is let out: nothing happens unrecorded."""
APART = 0.001
"""Seconds from one connection of a cage that is opened at once to the next: a burst takes turns with other cages."""
QUESTION_KEYS = 4 * (QUERY_BURST + QUERIES_PER_SECOND)
"""Different questions that are counted one by one; a cage cannot ask that many between two flushes."""
_SO_ORIGINAL_DST = 80
_SOL_IPV6 = 41


@dataclass(frozen=True)
class Shared:
    """The parts of a broker that all its cages share."""

    audit: AuditClient
    host: HostAddresses
    resolvers: HostResolvers
    nat64: Nat64
    scratch: Scratch
    audit_first: bool = True
    """Whether nothing is let out while the trail cannot be written (``host.toml`` ``[audit] disk_full``)."""

    def unrecordable(self) -> DenialRule | None:
        """The rule that refuses everything new while it could not be recorded, or None."""
        if self.audit.blocked is not None:
            return DenialRule.AUDIT_UNAVAILABLE if self.audit_first else None
        return DenialRule.AUDIT_UNAVAILABLE if self.audit.unacknowledged > UNACKNOWLEDGED else None


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
        self._flows = FlowTable(policy.connects_open, self._end)
        self._buffers = Buffers()
        self._looking, self._turns = Looking(), Turns()
        self._at_once_again = 0.0
        self._pool = VirtualPool(rules, self._loop.time)
        self._resolver = Resolver(policy.resolvers, shared.resolvers, fence)
        self._proxy: Proxy | None = None
        if policy.proxy:
            from isolator.broker.proxy import Proxy

            self._proxy = Proxy(policy.proxy, Resolver(policy.resolvers, shared.resolvers, fence), fence)
        self._repeats = RepeatCounter(self._write, self._loop.time)
        # The rate of questions bounds these: each name that is looked at has a record of its own.
        self._questions = RepeatCounter(self._write, self._loop.time, keys=QUESTION_KEYS)
        answers = Answers(rules, self._pool, self._resolver, self.blocked, self._query, shared.unrecordable)
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
            zip(inbound, policy.listen, strict=True), fetch, self._write_inbound, fence, shared.scratch, self._buffers,
            self._turns, limit=policy.connects_open, refusal=shared.unrecordable,
        )  # fmt: skip

    async def pass_on(self, departure: Departure) -> CageState:
        """Hand the sockets and every connection to another broker; counts that were not written are, here."""
        listeners = [accepting.release() for accepting in self._accepting]
        names = await self._name_server.pass_on(departure)
        inbound = await self._inbound.pass_on(departure)
        flows = await self._flows.pass_on(departure)
        self._loop.remove_reader(self._nflog.fileno())
        self._read_refusals()
        self._repeats.flush(everything=True)
        self._questions.flush(everything=True)
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
                flow.entry = cage._entry(flow)
                if flow.entry is not None:
                    flow.entry.flows += 1
                flow.join_again(shared.scratch, fence, cage._turns, cage._end, partial(cage._gate_again, flow))
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
        self._repeats.flush(everything=True)
        self._questions.flush(everything=True)

    def tick(self) -> None:
        """Write counts that are due and end flows that stand still; to be called once a second."""
        self._repeats.flush()
        self._questions.flush()
        if not self._fence.closed_since(boottime() - FIRST_BYTES):
            self._flows.end_incomplete(self._loop.time() - FIRST_BYTES)
        if not self._fence.closed_since(boottime() - self._rules.policy.idle):
            for flows in (self._flows, self._inbound.flows):
                flows.end_idle(self._loop.time() - self._rules.policy.idle)

    def blocked(self, address: Address, port: int) -> DenialRule | None:
        """The rule that keeps a resolved address out of reach at ``port``, or None."""
        if self._rules.excepted(address, port):
            return None
        if self._rules.blocked(address, port):
            return DenialRule.BLOCKED_ADDRESS
        inside = self._shared.nat64.inside(address)
        reason = None if inside is None else self.blocked(inside, port)
        return reason or self._shared.host.owner(address)

    def _accepted(self, client: socket.socket, _: object) -> None:
        try:
            address, port = _original_destination(client)
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
        self._flows.add(flow)
        try:
            rest = self._open_at_once(flow) if flow.started >= self._at_once_again else self._open(flow)
        except Exception as failure:
            self._end(flow, failure)
            if not isinstance(failure, Denied | OSError):
                raise
        else:
            if rest is not None:
                self._flows.open(flow, rest)

    def _end(self, flow: Flow, failure: BaseException | None) -> None:
        if isinstance(failure, Denied):
            self._deny(flow, failure.rule, **failure.found)
        elif failure is not None:
            flow.failed(failure)
            if flow.rule and not (flow.recorded or flow.left):  # it may have knocked at the other side
                self._repeats.add(flow.unreachable())
        flow.release(orderly=failure is None)
        if flow.roomy:
            self._buffers.give()
        if flow.recorded:
            self._write(flow.closed(self._loop.time()))
        self._flows.remove(flow)

    def _gate_again(self, flow: Flow, state: GateState) -> Gate:
        return Gate.taken_over(state, partial(self._judge, flow), self._looking)

    def _open_at_once(self, flow: Flow) -> Coroutine[Any, Any, None] | None:
        """Judge, dial and join, as far as nothing has to be waited for; returns what is left. Raises Denied or OSError.

        Most of what a task and another turn of the loop cost would come before the first byte.
        """
        self._at_once_again = flow.started + APART
        if self._fence.closed:
            return self._open(flow)
        self._admit(flow)
        known = Answer((flow.address,)) if flow.name is None else self._resolver.known(flow.name)
        compared = flow.name is not None and guard.speaks_first(flow.port)
        if compared or self._proxy is not None or known is None or [a.version for a in known.addresses] != [4]:
            return self._open(flow)
        (address,) = self._usable(flow, known.addresses)
        flow.roomy = self._buffers.take()
        flow.server, there = begin(address, flow.port, small=not flow.roomy)
        if not there:
            return self._established(flow, address)
        flow.dialled = address
        self._join(flow)
        return None

    async def _established(self, flow: Flow, address: Address) -> None:
        assert flow.server is not None
        await established(flow.server, address, flow.port)
        flow.dialled = address
        self._join(flow)

    async def _open(self, flow: Flow) -> None:
        """Judge, dial, compare and join; raises Denied or OSError."""
        await self._fence.opened()
        if not flow.rule:
            self._admit(flow)
        addresses = await self._addresses(flow)
        if flow.name is None or not guard.speaks_first(flow.port):
            await self._dial(flow, addresses)
            self._join(flow)
            return
        gate = self._gate(flow)
        hello = self._loop.create_task(self._first_bytes(flow, gate))
        try:
            await self._dial(flow, addresses)
            first = await hello
        finally:
            hello.cancel()
            await asyncio.gather(hello, return_exceptions=True)
        self._join(flow, gate, first)

    def _join(self, flow: Flow, gate: Gate | None = None, first: bytes = b"") -> None:
        assert flow.server is not None
        if gate is None and flow.name is not None:
            gate = self._gate(flow)
        flow.recorded, flow.first = True, b""
        self._write(flow.opened(), happened_ns=flow.began, urgent=True)  # ahead of the first byte
        up, down = flow.join(self._shared.scratch, self._fence, self._turns, self._end)
        if gate is not None:
            up.guard(gate, down)
        up.start(first)
        if not down.ended:  # behind the first bytes, which wait for neither
            tune(flow.server)
            down.start()

    def _gate(self, flow: Flow) -> Gate:
        return Gate(partial(self._judge, flow), strict=guard.speaks_first(flow.port), work=self._looking)

    def _judge(self, flow: Flow, hello: sniff.Hello) -> None:
        assert flow.name is not None
        policy = self._rules.policy
        rule = guard.objection(
            hello, flow.name, flow.port, allow_no_sni=policy.allow_no_sni, allow_ech=policy.allow_ech
        )
        if rule is not None:
            raise Denied(rule, asked=list(hello.names[:4]))

    def _entry(self, flow: Flow) -> Entry | None:
        """The name that the flow's destination stands for, if it is a virtual address that was answered."""
        return self._pool.entry(flow.address) if isinstance(flow.address, IPv4Address) else None

    def _admit(self, flow: Flow) -> None:
        """Hold a destination to the policy, before anything is looked up; raises Denied."""
        refusal = self._shared.unrecordable()
        if refusal is not None:
            entry = self._entry(flow)
            flow.name = entry.name if entry is not None else None
            raise Denied(refusal)
        if not (isinstance(flow.address, IPv4Address) and flow.address in self._rules.virtual):
            verdict = self._rules.literal(flow.address, flow.port)
        else:
            flow.entry = self._entry(flow)
            if flow.entry is None:
                raise Denied(DenialRule.UNALLOCATED)
            flow.entry.flows += 1
            flow.name = flow.entry.name
            verdict = self._rules.name(flow.name, flow.port)
        flow.rule = verdict.rule
        if not verdict.allowed:
            raise Denied(verdict.rule)

    async def _addresses(self, flow: Flow) -> tuple[Address, ...]:
        """The addresses that this flow may go to; none where the proxy looks its name up."""
        found: tuple[Address, ...] = (flow.address,)
        if flow.name is not None:
            if self._rules.looked_up_by_proxy(flow.name):
                return ()
            try:
                found = (await self._resolver.resolve(flow.name)).addresses
            except ResolveError as error:
                raise DescribedError(DenialRule.UPSTREAM) from error
        if any(address.version == 6 for address in found):
            await self._shared.nat64.refresh()
        return self._usable(flow, found)

    def _usable(self, flow: Flow, found: tuple[Address, ...]) -> tuple[Address, ...]:
        """Addresses among them that may be dialled; raises Denied, or DescribedError when there are none at all."""
        reasons = [self.blocked(address, flow.port) for address in found]
        if flow.name is None and reasons[0] is DenialRule.NEIGHBOUR and flow.rule != "public":
            return found  # whoever wrote the address, or its network, into the policy meant the neighbour
        usable = tuple(address for address, reason in zip(found, reasons, strict=True) if reason is None)
        if not found:
            raise DescribedError("no-address")
        if not usable:
            flow.dialled = found[0]
            raise Denied(reasons[0] or "")
        return usable

    async def _dial(self, flow: Flow, addresses: tuple[Address, ...]) -> None:
        flow.roomy = self._buffers.take()
        if self._proxy is None:
            flow.server, flow.dialled = await dial(addresses, flow.port, self._fence, small=not flow.roomy)
        else:
            flow.via = self._proxy.where
            flow.server, flow.dialled = await self._proxy.dial(addresses, flow.name, flow.port, small=not flow.roomy)

    async def _first_bytes(self, flow: Flow, gate: Gate) -> bytes:
        """Read until the gate lets bytes pass; returns these; raises Denied or OSError."""
        unread = [flow.first] if flow.first else []
        while True:
            try:
                async with asyncio.timeout(FIRST_BYTES):
                    return await self._until_passing(flow, gate, unread)
            except TimeoutError:
                if not self._fence.closed_since(boottime() - FIRST_BYTES):
                    # To pass on half of the compared bytes after a while would be a way round the comparison.
                    raise Denied(DenialRule.INCOMPLETE if flow.first else DenialRule.SILENT) from None

    async def _until_passing(self, flow: Flow, gate: Gate, unread: list[bytes]) -> bytes:
        """Read; ``unread``: bytes that another broker has read."""
        first = b""
        while not gate.passing:
            if self._looking.spent or self._looking.over:
                turn = self._loop.create_future()
                self._looking.turn(partial(resolve, turn))
                await turn
            again = bool(unread)
            part = unread.pop() if again else await receive(flow.client, self._looking.piece)
            if not part:
                if flow.first:
                    raise Denied(DenialRule.INCOMPLETE)
                return b""
            flow.first += b"" if again else part
            first = bytes(gate.feed(part))
            if gate.pause:
                await asyncio.sleep(gate.pause)
        return first

    def _read_refusals(self) -> None:
        """Record the packets that the ruleset refused before they reached a listener."""
        for _ in range(64):
            try:
                packet = self._nflog.recv(65536)
            except BlockingIOError:
                return
            except OSError as error:
                if error.errno == errno.ENOBUFS:
                    self._repeats.add(NetDenied(rule=DenialRule.RECORDS_LOST))
                    continue
                return
            for prefix, payload in parse_nflog(packet):
                refused = nflog.read(prefix, payload)
                denied = nflog.describe(refused, self._rules, self._pool)
                self._repeats.add(denied, count=refused.count, late=KERNEL_LATE)

    def _deny(self, flow: Flow, rule: str, **found: Any) -> None:
        flow.reason = rule
        self._repeats.add(flow.denied(rule, **found))

    def _write_inbound(
        self, record: RecordData, *, since_ns: int | None = None, happened_ns: int | None = None
    ) -> None:
        if isinstance(record, Repeatable) and "flow" not in record.data:  # many may be alike
            self._repeats.add(record)
        else:
            self._write(record, since_ns=since_ns, happened_ns=happened_ns)

    def _query(self, name: str, kind: str, verdict: str, rule: str, count: int = 1) -> None:
        self._questions.add(NetQuery(name=name or None, type=kind or None, verdict=verdict, rule=rule), count=count)

    def _write(
        self, record: RecordData, *, since_ns: int | None = None, happened_ns: int | None = None, urgent: bool = False
    ) -> None:
        self._shared.audit.record(
            record, plugin=self.plugin, run=self.run, since_ns=since_ns, happened_ns=happened_ns, urgent=urgent
        )


def _original_destination(client: socket.socket) -> tuple[Address, int]:
    """Read the destination of a redirected connection; raises OSError when the kernel does not know it (any more)."""
    if client.family == socket.AF_INET:
        raw = client.getsockopt(socket.IPPROTO_IP, _SO_ORIGINAL_DST, 16)
        port, packed = struct.unpack_from("!2xH4s", raw)
        return IPv4Address(packed), port
    raw = client.getsockopt(_SOL_IPV6, _SO_ORIGINAL_DST, 28)
    port, packed = struct.unpack_from("!2xH4x16s", raw)
    return IPv6Address(packed), port
