"""The name server of one cage, on its 127.0.0.53: answers granted names with virtual addresses.

A question is judged before anything leaves the host: a name that the policy does not cover gets NXDOMAIN here and
now. A covered one is looked up outside, so that the plugin gets the real error when there is one, and answered with
the address that stands for it in this cage. Only ``A`` has an answer; ``AAAA`` is answered empty (there are no virtual
IPv6 addresses, and the broker dials whichever family works); every other type is withheld, because it could carry
data (TXT, ANY) or lead around the check of names (HTTPS, SVCB).
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import struct
from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from ipaddress import IPv4Address
from typing import Any

import dns.exception
import dns.flags
import dns.message
import dns.opcode
import dns.rcode
import dns.rdataclass
import dns.rdatatype
import dns.rrset

from isolator.broker.resolver import ResolveError, Resolver
from isolator.broker.virtual import TTL, VirtualPool
from isolator.ipc.accept_loop import AcceptLoop
from isolator.pacing import TokenBucket
from isolator.policy.addresses import Address
from isolator.policy.denial import DenialRule
from isolator.policy.destinations import Rules, normal_name

QUERIES_PER_SECOND, QUERY_BURST = 50, 100
MAX_BUSY = 32
"""Lookups of one cage under way at once."""
MAX_TCP, TCP_IDLE = 8, 10.0
MAX_QUERY = 512
MAX_LABELS = 16
"""Deeper names serve to carry data out, not to find hosts."""

Record = Callable[[str, str, str, str], None]
"""Called with name, type, verdict (``allowed``, ``denied``, ``withheld``, ``failed``) and rule."""


@dataclass(frozen=True)
class Decision:
    """The reply to a question (code, address if any), and the verdict and rule of its record."""

    rcode: dns.rcode.Rcode
    verdict: str
    rule: str
    address: str | None = None


class Answers:
    """The answers to the questions of one cage.

    ``blocked`` gives the rule that keeps a resolved address out of reach at a port; ``refusal`` the rule that refuses
    every new lookup at present, or None.
    """

    def __init__(
        self,
        rules: Rules,
        pool: VirtualPool,
        resolver: Resolver,
        blocked: Callable[[Address, int], DenialRule | None],
        record: Record,
        refusal: Callable[[], DenialRule | None] = lambda: None,
    ) -> None:
        self._rules, self._pool, self._resolver, self._blocked, self._record = rules, pool, resolver, blocked, record
        self._refusal = refusal
        self._bucket = TokenBucket(QUERIES_PER_SECOND, QUERY_BURST)

    async def answer(self, wire: bytes) -> bytes | None:
        """The reply to one message, or None when none is due; never raises, whatever the bytes."""
        try:
            query = dns.message.from_wire(wire[:MAX_QUERY], question_only=True)
        except (dns.exception.DNSException, ValueError, struct.error, IndexError):
            return None
        if query.flags & dns.flags.QR or len(query.question) != 1:
            return None
        reply = dns.message.make_response(query, recursion_available=True)
        question = query.question[0]
        if not self._bucket.try_take():
            self._record("", "", "denied", DenialRule.DNS_RATE)
            reply.set_rcode(dns.rcode.REFUSED)
            return reply.to_wire()
        if query.opcode() != dns.opcode.QUERY or question.rdclass != dns.rdataclass.IN:
            reply.set_rcode(dns.rcode.NOTIMP)
            return reply.to_wire()
        kind = dns.rdatatype.to_text(question.rdtype)
        text = question.name.to_text(omit_final_dot=True)
        decision = await self._decide(text, question.rdtype)
        self._record(text.lower(), kind, decision.verdict, decision.rule)
        reply.set_rcode(decision.rcode)
        if decision.address is not None:
            reply.answer.append(dns.rrset.from_text(question.name, TTL, "IN", "A", decision.address))
        return reply.to_wire()

    async def _decide(self, text: str, kind: dns.rdatatype.RdataType) -> Decision:
        name = normal_name(text)
        nowhere = dns.rcode.NXDOMAIN
        if name is None or name.count(".") >= MAX_LABELS:
            return Decision(nowhere, "denied", DenialRule.NAME_FORM)
        if name == "localhost" or name.endswith(".localhost"):
            address = "127.0.0.1" if kind == dns.rdatatype.A else None
            return Decision(dns.rcode.NOERROR, "allowed", "localhost", address)
        ports = self._rules.name_ports(name)
        if not ports:
            return Decision(nowhere, "denied", self._rules.name(name, 443).rule)
        rule = self._rules.name(name, min(ports)).rule
        if kind == dns.rdatatype.AAAA:
            return Decision(dns.rcode.NOERROR, "allowed", rule)
        if kind != dns.rdatatype.A:
            return Decision(dns.rcode.NOERROR, "withheld", DenialRule.RECORD_TYPE)
        refused = self._refusal()
        if refused is not None:
            return Decision(dns.rcode.SERVFAIL, "failed", refused)
        if self._resolver.busy >= MAX_BUSY:
            return Decision(dns.rcode.SERVFAIL, "failed", DenialRule.DNS_BUSY)
        try:
            found = await self._resolver.resolve(name)
        except ResolveError:
            return Decision(dns.rcode.SERVFAIL, "failed", DenialRule.UPSTREAM)
        if not found.addresses:
            return Decision(dns.rcode.NOERROR if found.exists else nowhere, "allowed", rule)
        reasons = [self._blocked(address, port) for address in found.addresses for port in ports]
        if all(reasons):
            # Nothing could ever be reached through it: say so now rather than at each connection.
            return Decision(nowhere, "denied", reasons[0] or "")
        virtual: IPv4Address | None = self._pool.lookup(name)
        if virtual is None:
            return Decision(dns.rcode.SERVFAIL, "denied", DenialRule.TOO_MANY_NAMES)
        return Decision(dns.rcode.NOERROR, "allowed", rule, str(virtual))


class NameServer:
    """Serves answers on the two bound sockets, which it owns, until it is closed."""

    def __init__(self, answers: Answers, udp: socket.socket, tcp: socket.socket) -> None:
        self._answers, self._udp = answers, udp
        self._loop = asyncio.get_running_loop()
        self._tasks: set[asyncio.Task[None]] = set()
        self._open = 0
        udp.setblocking(False)
        self._loop.add_reader(udp, self._readable)
        self._accepting = AcceptLoop(tcp, lambda connection, _: self._spawn(self._stream(connection)))

    async def close(self) -> None:
        """Stop answering and close the sockets."""
        self._loop.remove_reader(self._udp)
        self._udp.close()
        self._accepting.close()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def _readable(self) -> None:
        for _ in range(32):
            try:
                wire, peer = self._udp.recvfrom(MAX_QUERY)
            except OSError:
                return
            self._spawn(self._datagram(wire, peer))

    async def _datagram(self, wire: bytes, peer: tuple[str, int]) -> None:
        reply = await self._answers.answer(wire)
        if reply is not None:
            with contextlib.suppress(OSError):  # the client has gone, or its socket is full: it asks again
                self._udp.sendto(reply, peer)

    async def _stream(self, connection: socket.socket) -> None:
        reader, writer = await asyncio.open_connection(sock=connection, limit=4096)
        self._open += 1
        try:
            while self._open <= MAX_TCP:
                async with asyncio.timeout(TCP_IDLE):
                    length = struct.unpack("!H", await reader.readexactly(2))[0]
                    if length > MAX_QUERY:
                        return
                    reply = await self._answers.answer(await reader.readexactly(length))
                    if reply is None:
                        return
                    writer.write(struct.pack("!H", len(reply)) + reply)
                    await writer.drain()
        except (OSError, asyncio.IncompleteReadError, TimeoutError):
            return
        finally:
            self._open -= 1
            writer.close()

    def _spawn(self, work: Coroutine[Any, Any, None]) -> None:
        task = self._loop.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
