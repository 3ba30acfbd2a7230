"""One cage's way out: what the kernel redirected to us is judged, dialled, compared and carried.

For each accepted connection, in this order:

1. ``SO_ORIGINAL_DST`` says where it wanted to go. A virtual address is a name; one that was never answered is refused;
   any other address was written by the plugin itself.
2. Name or address and port against the policy; then, for a name, its addresses now; each address against the
   always-blocked list and the host's own. What was checked is what is dialled: there is no second lookup.
3. The first bytes against the name (``guard``), before any of them is passed on.
4. Bytes both ways until both ends are done, one breaks off, or nothing moved for ``IDLE`` seconds.

A refusal is a reset, at once. Each decision is a record: ``net.connect`` and ``net.closed``, or ``net.denied``.
"""

from __future__ import annotations

import asyncio
import errno
import socket
import struct
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv6Address
from typing import Any

from isolator.audit.client import AuditClient
from isolator.audit.schema import NetDenied, NetQuery, RecordData
from isolator.broker import guard, nflog, sniff
from isolator.broker.dial import dial
from isolator.broker.dns import NameServer
from isolator.broker.flow import Flow
from isolator.broker.host_addresses import HostAddresses
from isolator.broker.inbound import Fetch, Inbound
from isolator.broker.rate import Repeatable, RepeatCounter
from isolator.broker.relay import Scratch, reset
from isolator.broker.resolver import HostResolvers, ResolveError, Resolver
from isolator.broker.virtual import VirtualPool
from isolator.linux.netlink import parse_nflog
from isolator.policy.addresses import Address
from isolator.policy.denial import DenialRule
from isolator.policy.destinations import VIRTUAL, Rules
from isolator.policy.model import NetworkPolicy

IDLE = 900.0
FIRST_BYTES = 15.0
"""Seconds for a client to say what it wants where it has to say it before anything passes."""
KERNEL_LATE = 0.1
"""Seconds by which we may read of a refusal after the plugin felt it: the record and the reset leave together."""
UNACKNOWLEDGED = 15_000
"""Audit records under way beyond which nothing new is let out: what cannot be recorded does not happen."""
_SO_ORIGINAL_DST = 80
_SOL_IPV6 = 41


class Denied(Exception):
    """A connection that is refused; ``rule`` says why, ``data`` what else the record should tell."""

    def __init__(self, rule: str, **data: Any) -> None:
        super().__init__(rule)
        self.rule, self.data = rule, data


@dataclass(frozen=True)
class Shared:
    """What all cages of one broker use together."""

    audit: AuditClient
    host: HostAddresses
    resolvers: HostResolvers
    scratch: Scratch
    audit_first: bool = True
    """Whether nothing is let out while the trail cannot be written (``host.toml`` ``[audit] disk_full``)."""

    def unrecordable(self) -> DenialRule | None:
        """The rule that refuses everything new while it could not be recorded, or None."""
        if self.audit.blocked is not None:
            return DenialRule.AUDIT_UNAVAILABLE if self.audit_first else None
        return DenialRule.AUDIT_UNAVAILABLE if self.audit.unacknowledged > UNACKNOWLEDGED else None


class Outbound:
    """Carries the connections of one run. Owns the sockets it is started with."""

    def __init__(self, run: str, plugin: str, policy: NetworkPolicy, shared: Shared, fetch: Fetch) -> None:
        self.run, self.plugin = run, plugin
        self.flows: dict[asyncio.Task[None], Flow] = {}
        self._shared = shared
        self._loop = asyncio.get_running_loop()
        self._rules = Rules(policy)
        self._pool = VirtualPool(self._rules, self._loop.time)
        self._resolver = Resolver(policy.resolvers, shared.resolvers)
        self._repeats = RepeatCounter(self._write, self._loop.time)
        self._names = NameServer(
            self._rules, self._pool, self._resolver, self.blocked, self._query, self._shared.unrecordable
        )
        self._listeners: list[socket.socket] = []
        self._nflog: socket.socket | None = None
        self._fetch = fetch
        self._inbound: Inbound | None = None

    async def start(self, sockets: list[socket.socket]) -> None:
        """Serve TCP v4, TCP v6, DNS UDP, DNS TCP, NFLOG and a host listener for each ``listen`` rule, in this order."""
        tcp4, tcp6, udp, tcp, log, *outside = sockets
        await self._names.serve(udp, tcp)
        for listener in (tcp4, tcp6):
            listener.setblocking(False)
            self._listeners.append(listener)
            # A host without IPv6 has no listener for it, and something else in its place.
            if listener.family in {socket.AF_INET, socket.AF_INET6}:
                self._loop.add_reader(listener, self._accept, listener)
        log.setblocking(False)
        self._nflog = log
        self._loop.add_reader(log, self._refused)
        self._inbound = Inbound(
            list(zip(outside, self._rules.policy.listen, strict=True)), self._fetch, self._write_inbound,
            self._shared.scratch, limit=self._rules.policy.connects_open, refusal=self._shared.unrecordable,
        )  # fmt: skip

    async def close(self) -> None:
        """Close the listeners and end every flow; all records are handed over when it returns."""
        for listener in self._listeners:
            self._loop.remove_reader(listener)
            listener.close()
        self._listeners.clear()
        if self._inbound is not None:
            await self._inbound.close()
        await self._names.close()
        await self._resolver.close()
        for task, flow in list(self.flows.items()):
            flow.reason = "cage ended"
            task.cancel()
        await asyncio.gather(*self.flows, return_exceptions=True)
        if self._nflog is not None:
            self._refused()
            self._loop.remove_reader(self._nflog)
            self._nflog.close()
            self._nflog = None
        self._repeats.flush(everything=True)

    def tick(self) -> None:
        """Once a second: write counts that are due, end flows that stand still."""
        self._repeats.flush()
        before = self._loop.time() - IDLE
        inward = self._inbound.flows if self._inbound is not None else {}
        for task, flow in [*self.flows.items(), *inward.items()]:
            if flow.touched < before:
                flow.reason = "idle"
                task.cancel()

    def blocked(self, address: Address, port: int) -> DenialRule | None:
        """The rule that keeps a resolved address out of reach at ``port``, or None."""
        if self._rules.excepted(address, port):
            return None
        if self._rules.blocked(address, port):
            return DenialRule.BLOCKED_ADDRESS
        return self._shared.host.owner(address)

    def _accept(self, listener: socket.socket) -> None:
        for _ in range(64):
            try:
                client, _ = listener.accept()
            except BlockingIOError:
                return
            except OSError as error:
                if error.errno in {errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ENOBUFS}:
                    # The listener stays readable: wait for descriptors instead of spinning.
                    self._loop.remove_reader(listener)
                    self._loop.call_later(0.2, self._resume, listener)
                    return
                continue
            client.setblocking(False)
            try:
                address, port = _original_destination(client)
            except OSError:
                reset(client)
                continue
            flow = Flow(client, address, port, self._loop.time())
            if self._full():
                self._deny(flow, "too-many-open")
                reset(client)
                continue
            task = self._loop.create_task(self._carry(flow))
            self.flows[task] = flow
            task.add_done_callback(self._ended)

    def _full(self) -> bool:
        return len(self.flows) >= self._rules.policy.connects_open

    def _resume(self, listener: socket.socket) -> None:
        if listener in self._listeners:
            self._loop.add_reader(listener, self._accept, listener)

    def _ended(self, task: asyncio.Task[None]) -> None:
        self.flows.pop(task, None)
        if not task.cancelled() and task.exception() is not None:
            self._loop.call_exception_handler({"message": "a flow failed", "exception": task.exception()})

    async def _carry(self, flow: Flow) -> None:
        orderly = False
        try:
            await self._connect(flow)
            orderly = await flow.relay()
        except Denied as denied:
            self._deny(flow, denied.rule, **denied.data)
        except OSError as error:
            flow.failed(error)
            if not flow.recorded:
                self._repeats.add(flow.unreachable())
        finally:
            for pipe in flow.pipes:
                pipe.stop()
            for sock in (flow.client, flow.server):
                if sock is not None:
                    sock.close() if orderly else reset(sock)
            if flow.entry is not None:
                flow.entry.flows -= 1
            if flow.recorded:
                self._write(flow.closed(self._loop.time()))

    async def _connect(self, flow: Flow) -> None:
        """Judge, dial and compare; fills in the flow, raises Denied or OSError."""
        refusal = self._shared.unrecordable()
        if refusal is not None:
            entry = self._pool.entry(flow.address) if isinstance(flow.address, IPv4Address) else None
            flow.name = entry.name if entry is not None else None
            raise Denied(refusal)
        addresses = await self._destination(flow)
        if flow.name is not None and guard.speaks_first(flow.port):
            hello = self._loop.create_task(self._first_bytes(flow))
            try:
                await self._dial(flow, addresses)
                first = await hello
            finally:
                hello.cancel()
                await asyncio.gather(hello, return_exceptions=True)
        else:
            await self._dial(flow, addresses)
            first = b""
        flow.recorded = True
        self._write(flow.opened(), happened_ns=flow.began)
        up, down = flow.join(self._shared.scratch)
        down.start()
        if flow.name is not None and not guard.speaks_first(flow.port):
            first = await self._first_bytes(flow)
        up.start(first)

    async def _destination(self, flow: Flow) -> tuple[Address, ...]:
        """The addresses that this flow may go to; at least one."""
        if not (isinstance(flow.address, IPv4Address) and flow.address in VIRTUAL):
            verdict = self._rules.literal(flow.address, flow.port)
            flow.rule = verdict.rule
            if not verdict.allowed:
                raise Denied(verdict.rule)
            reason = self.blocked(flow.address, flow.port)
            if reason is not None:
                raise Denied(reason)
            return (flow.address,)
        flow.entry = self._pool.entry(flow.address)
        if flow.entry is None:
            raise Denied("unallocated")
        flow.entry.flows += 1
        flow.name = flow.entry.name
        verdict = self._rules.name(flow.name, flow.port)
        flow.rule = verdict.rule
        if not verdict.allowed:
            raise Denied(verdict.rule)
        try:
            answer = await self._resolver.resolve(flow.name)
        except ResolveError as error:
            raise OSError(errno.EHOSTUNREACH, str(error)) from error
        reasons = {address: self.blocked(address, flow.port) for address in answer.addresses}
        usable = tuple(address for address, reason in reasons.items() if reason is None)
        if not usable:
            for address, reason in reasons.items():
                flow.dialled = address
                raise Denied(str(reason))
            raise OSError(errno.EHOSTUNREACH, "no address")
        return usable

    async def _dial(self, flow: Flow, addresses: tuple[Address, ...]) -> None:
        flow.server, flow.dialled = await dial(addresses, flow.port)
        flow.client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    async def _first_bytes(self, flow: Flow) -> bytes:
        """Read until the guard can judge; the bytes read; raises Denied."""
        assert flow.name is not None
        data = b""
        client_first = guard.speaks_first(flow.port)
        hello: sniff.Hello | None = None
        try:
            # A client of a protocol where the server speaks first may be silent for as long as it likes.
            async with asyncio.timeout(FIRST_BYTES if client_first else None) as deadline:
                while hello is None:
                    part = await self._loop.sock_recv(flow.client, sniff.LIMIT)
                    if not part:
                        break
                    if not data and not client_first:
                        deadline.reschedule(self._loop.time() + FIRST_BYTES)
                    data += part
                    hello = sniff.sniff(data)
        except TimeoutError:
            # Half of what we compare, held back until we look away, would be a way round the comparison.
            raise Denied("incomplete" if data else "silent") from None
        except sniff.Malformed as error:
            raise Denied("malformed", detail=str(error)) from None
        if hello is None:
            if not data:
                return b""
            raise Denied("incomplete")
        rule = guard.objection(hello, flow.name, flow.port, allow_no_sni=self._rules.policy.allow_no_sni)
        if rule is not None:
            raise Denied(rule, asked=list(hello.names[:4]))
        return data

    def _refused(self) -> None:
        """Records of what the ruleset refused before it came to us."""
        for _ in range(64):
            if self._nflog is None:
                return
            try:
                packet = self._nflog.recv(65536)
            except BlockingIOError:
                return
            except OSError as error:
                if error.errno == errno.ENOBUFS:
                    self._repeats.add(NetDenied(rule="records-lost"))
                    continue
                return
            for prefix, payload in parse_nflog(packet):
                self._kernel_denial(nflog.read(prefix, payload))

    def _kernel_denial(self, refused: nflog.Refused) -> None:
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

    def _query(self, name: str, kind: str, verdict: str, rule: str) -> None:
        self._repeats.add(NetQuery(name=name or None, type=kind or None, verdict=verdict, rule=rule))

    def _write(self, record: RecordData, *, since_ns: int | None = None, happened_ns: int | None = None) -> None:
        self._shared.audit.record(record, plugin=self.plugin, run=self.run, since_ns=since_ns, happened_ns=happened_ns)


def _original_destination(client: socket.socket) -> tuple[Address, int]:
    """Where a redirected connection wanted to go; raises OSError when the kernel does not know (any more)."""
    if client.family == socket.AF_INET:
        raw = client.getsockopt(socket.IPPROTO_IP, _SO_ORIGINAL_DST, 16)
        port, packed = struct.unpack_from("!2xH4s", raw)
        return IPv4Address(packed), port
    raw = client.getsockopt(_SOL_IPV6, _SO_ORIGINAL_DST, 28)
    port, packed = struct.unpack_from("!2xH4x16s", raw)
    return IPv6Address(packed), port
