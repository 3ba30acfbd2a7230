"""The name server of one cage, on its 127.0.0.53: answers granted names with virtual addresses.

A question is judged before anything leaves the host: a name that the policy does not cover gets NXDOMAIN here and
now. A covered one is looked up outside, so that the plugin gets the real error when there is one, and answered with
the address that stands for it in this cage. Only ``A`` has an answer; ``AAAA`` is answered empty (there are no virtual
IPv6 addresses, and the broker dials whichever family works); every other type is withheld, because it could carry
data (TXT, ANY) or lead around the check of names (HTTPS, SVCB).

Every question is on record: one within the rate by its name, one that is refused unread (over the rate, or no question
at all) in a count.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import struct
from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from ipaddress import IPv4Address
from typing import Any, Protocol

from isolator.base.pacing import TokenBucket
from isolator.broker import wire
from isolator.broker.resolver import Overworked, ResolveError, Resolver
from isolator.broker.virtual import TTL, VirtualPool
from isolator.broker.wire import Code
from isolator.ipc.accept_loop import AcceptLoop
from isolator.ipc.body import Body
from isolator.ipc.succession import Departure
from isolator.ipc.tasks import cancel_all
from isolator.policy.addresses import Address
from isolator.policy.denial import DenialRule
from isolator.policy.destinations import Rules, normal_name

QUERIES_PER_SECOND, QUERY_BURST = 50, 100
READ_PER_SECOND, READ_BURST = 500, 500
"""Messages of one cage that are read at all; the others wait in its socket, where the kernel drops the excess."""
READ_TOGETHER = 16
"""Messages that a cage beyond that rate has to wait for: they are then read at one wakeup of the broker."""
MAX_BUSY = 32
"""Lookups of one cage under way at once."""
MAX_TCP, TCP_IDLE = 8, 10.0
SETTLE = 2.0
"""Seconds for questions under way, before another broker takes over; clients ask again."""
MAX_QUERY = 512
MAX_LABELS = 16
"""Deeper names serve to carry data out, not to find hosts."""

_SO_MEMINFO, _MEMINFO, _DROPS = 55, struct.Struct("=9I"), 8


class Record(Protocol):
    """Records questions: name, type, verdict (``allowed``, ``denied``, ``withheld``, ``failed``), rule, how many."""

    def __call__(self, name: str, kind: str, verdict: str, rule: str, count: int = 1) -> None: ...


@dataclass(frozen=True)
class Decision:
    """The reply to a question (code, address if any), and the verdict and rule of its record."""

    code: Code
    verdict: str
    rule: str
    address: IPv4Address | None = None


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

    async def answer(self, message: bytes) -> bytes | None:
        """The reply to one message, or None when none is due; never raises, whatever the bytes."""
        if self.within_rate():
            return await self.read(message)
        self.refused(1)
        return wire.refusal(message[:MAX_QUERY])

    def within_rate(self) -> bool:
        """Take one message into account; False when it is beyond the rate, and to be refused unread."""
        return self._bucket.try_take()

    async def read(self, message: bytes) -> bytes | None:
        """As ``answer``, for a message within the rate."""
        try:
            question = wire.read_question(message[:MAX_QUERY])
        except wire.Broken:
            self._record("", "", "denied", DenialRule.DNS_FORM)
            return None
        decision = Decision(Code.NOTIMP, "denied", DenialRule.DNS_FORM)
        try:
            if question.plain:
                decision = Decision(Code.SERVFAIL, "failed", DenialRule.UPSTREAM)  # unless it is waited for to the end
                decision = await self._decide(question.name, question.kind)
        finally:
            kind = wire.type_text(question.kind)
            self._record(question.name.lower(), kind, decision.verdict, decision.rule)
        return question.reply(decision.code, decision.address, TTL)

    def refused(self, count: int) -> None:
        """Record messages beyond the rate: refused unread, or dropped by the kernel as they came faster still."""
        self._record("", "", "denied", DenialRule.DNS_RATE, count)

    async def _decide(self, text: str, kind: int) -> Decision:
        name = normal_name(text)
        nowhere = Code.NXDOMAIN
        if name is None or name.count(".") >= MAX_LABELS:
            return Decision(nowhere, "denied", DenialRule.NAME_FORM)
        if name == "localhost" or name.endswith(".localhost"):
            address = IPv4Address("127.0.0.1") if kind == wire.A else None
            return Decision(Code.NOERROR, "allowed", "localhost", address)
        ports = self._rules.name_ports(name)
        if not ports:
            return Decision(nowhere, "denied", self._rules.name(name, 443).rule)
        rule = self._rules.name(name, min(ports)).rule
        if kind == wire.AAAA:
            return Decision(Code.NOERROR, "allowed", rule)
        if kind != wire.A:
            return Decision(Code.NOERROR, "withheld", DenialRule.RECORD_TYPE)
        refused = self._refusal()
        if refused is not None:
            return Decision(Code.SERVFAIL, "failed", refused)
        if self._rules.looked_up_by_proxy(name):
            return self._stand_in(name, rule)
        if self._resolver.busy >= MAX_BUSY:
            return Decision(Code.SERVFAIL, "failed", DenialRule.DNS_BUSY)
        try:
            found = await self._resolver.resolve(name)
        except Overworked:
            return Decision(Code.SERVFAIL, "failed", DenialRule.DNS_BUSY)
        except ResolveError:
            return Decision(Code.SERVFAIL, "failed", DenialRule.UPSTREAM)
        if not found.addresses:
            return Decision(Code.NOERROR if found.exists else nowhere, "allowed", rule)
        reasons = [self._blocked(address, port) for address in found.addresses for port in ports]
        if all(reasons):
            # Nothing could ever be reached through it: say so now rather than at each connection.
            return Decision(nowhere, "denied", reasons[0] or "")
        return self._stand_in(name, rule)

    def _stand_in(self, name: str, rule: str) -> Decision:
        virtual = self._pool.lookup(name)
        if virtual is None:
            return Decision(Code.SERVFAIL, "denied", DenialRule.TOO_MANY_NAMES)
        return Decision(Code.NOERROR, "allowed", rule, virtual)


class NameServerState(Body):
    """The sockets of a name server on their way to another broker."""

    udp: int
    tcp: int
    drops: int


class NameServer:
    """Serves answers on the two bound sockets, which it owns, until it is closed."""

    def __init__(self, answers: Answers, udp: socket.socket, tcp: socket.socket, drops: int = 0) -> None:
        self._answers, self._udp = answers, udp
        self._loop = asyncio.get_running_loop()
        self._tasks: set[asyncio.Task[None]] = set()
        self._open = 0
        self._reading = TokenBucket(READ_PER_SECOND, READ_BURST)
        self._resting: asyncio.TimerHandle | None = None
        self._drops = drops
        """Messages that the kernel has dropped at this socket, as far as they are on record."""
        self._questions: set[asyncio.Task[None]] = set()
        """Answers to datagrams that are under way."""
        udp.setblocking(False)
        self._loop.add_reader(udp.fileno(), self._readable)
        self._accepting = AcceptLoop(tcp, lambda connection, _: self._spawn(self._stream(connection)))

    async def close(self) -> None:
        """Stop answering and close the sockets."""
        if self._resting is not None:
            self._resting.cancel()
        self._count_drops()
        self._loop.remove_reader(self._udp.fileno())
        self._udp.close()
        self._accepting.close()
        await cancel_all(self._tasks)

    async def pass_on(self, departure: Departure) -> NameServerState:
        """Hand the sockets to another broker; questions that were read are answered before, or in ``SETTLE`` never."""
        if self._resting is not None:
            self._resting.cancel()
        self._count_drops()
        self._loop.remove_reader(self._udp.fileno())
        tcp = self._accepting.release()
        if self._questions:
            await asyncio.wait(self._questions, timeout=SETTLE)
        await cancel_all(self._tasks)
        return NameServerState(
            udp=departure.add(self._udp.detach()), tcp=departure.add(tcp.detach()), drops=self._drops
        )  # fmt: skip

    def _readable(self) -> None:
        refused = 0
        for _ in range(32):
            try:
                message, peer = self._udp.recvfrom(MAX_QUERY)
            except OSError:
                break
            if self._answers.within_rate():
                task = self._spawn(self._datagram(message, peer))
                self._questions.add(task)
                task.add_done_callback(self._questions.discard)
            else:  # a flood of these costs neither a task nor a record for each
                refused += 1
                self._reply(wire.refusal(message), peer)
            if self._reading.take():
                self._loop.remove_reader(self._udp.fileno())
                self._resting = self._loop.call_later(self._reading.until(READ_TOGETHER), self._rested)
                break
        if refused:
            self._answers.refused(refused)

    def _rested(self) -> None:
        self._resting = None
        self._count_drops()
        self._loop.add_reader(self._udp.fileno(), self._readable)

    def _count_drops(self) -> None:
        drops = _MEMINFO.unpack(self._udp.getsockopt(socket.SOL_SOCKET, _SO_MEMINFO, _MEMINFO.size))[_DROPS]
        if drops != self._drops:
            self._answers.refused((drops - self._drops) & 0xFFFFFFFF)
            self._drops = drops

    async def _datagram(self, message: bytes, peer: tuple[str, int]) -> None:
        self._reply(await self._answers.read(message), peer)

    def _reply(self, reply: bytes | None, peer: tuple[str, int]) -> None:
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
                    message = await reader.readexactly(length)
                    await asyncio.sleep(self._reading.take())
                    reply = await self._answers.answer(message)
                    if reply is None:
                        return
                    writer.write(struct.pack("!H", len(reply)) + reply)
                    await writer.drain()
        except (OSError, asyncio.IncompleteReadError, TimeoutError):
            return
        finally:
            self._open -= 1
            writer.close()

    def _spawn(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        task = self._loop.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task
