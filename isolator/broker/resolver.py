"""The upstream resolver: finds the addresses of a name outside the cage, with one cache per cage.

A cache of its own per cage, so that one plugin cannot find out from timing which names another looks up. Answers are
kept for their TTL and no longer; the addresses that were checked are dialled, because both come from here.
CNAMEs are followed, across answers if the server does not, up to ``MAX_CHAIN``; only the addresses at the end count.

Both families are asked at once, and a server that is silent for ``STAGGER`` seconds gets the next one beside it: a
client waits for five seconds in all. Whoever answers first counts; a family that says nothing is not waited for once
the other has addresses. Questions have a pace per cage, and reading answers has a budget in CPU time, because a
plugin's author may run the server at the far end.
"""

from __future__ import annotations

import asyncio
import fcntl
import os
import socket
import struct
import time
from collections import OrderedDict
from ipaddress import IPv6Address, ip_address
from pathlib import Path

from isolator.base.pacing import TokenBucket
from isolator.base.structs import struct_class
from isolator.broker import wire
from isolator.broker.wire import Code, Reply
from isolator.ipc.fence import Fence
from isolator.ipc.tasks import cancel_all
from isolator.policy.addresses import Address, parse_address
from isolator.policy.destinations import normal_name

MAX_CHAIN = 8
MAX_ADDRESSES = 16
MAX_CACHED = 1024
MAX_TTL = 300
NEGATIVE_TTL = 5
MAX_ANSWER = 16 * 1024
"""Bytes of an answer over TCP that are read."""
TIMEOUT = 4.0
"""Seconds for one family's answer, whoever gives it."""
STAGGER, RETRY = 0.4, 1.5
"""Seconds that one server has before the next is asked beside it; and before the first is asked again."""
FAMILY_GRACE = 0.3
"""Seconds that one family has to answer after the other gave addresses."""
CPU_PER_SECOND, CPU_BURST = 0.05, 0.25
"""Seconds of CPU time for reading the answers of one cage."""
ASKED_PER_SECOND, ASKED_AT_ONCE = 100, 64
"""Questions of one cage to servers, for one family each; those beyond wait. As many as its own questions need."""
OVER_TCP = 4
"""Addition to the count of a question that has to be asked again over TCP."""
_SIOCGIFINDEX = 0x8933


@struct_class(frozen=True)
class Answer:
    """Addresses of a name; ``exists`` is False for NXDOMAIN."""

    addresses: tuple[Address, ...]
    exists: bool = True


class ResolveError(Exception):
    """No server gave an answer; the message is the last failure."""


class Overworked(ResolveError):
    """The answers of this cage have cost more CPU time than it has; nothing was asked."""


@struct_class(frozen=True)
class Server:
    """One upstream server; ``scope``: the interface of a link-local address."""

    address: Address
    port: int = 53
    scope: str = ""

    @classmethod
    def of_host(cls, text: str) -> Server | None:
        """As ``parse``, and a scoped address (``fe80::1%eth0``): the host's own file may name a router that way."""
        plain, _, scope = text.partition("%")
        try:
            address = ip_address(plain)
        except ValueError:
            return None
        return cls(address, scope=scope) if scope and address.is_link_local else cls.parse(text)

    @classmethod
    def parse(cls, text: str) -> Server | None:
        """``ADDRESS``, ``IPV4:PORT`` or ``[IPV6]:PORT``; None for anything else."""
        address = parse_address(text.strip("[]"))
        if address is not None:
            return cls(address)
        host, colon, port = text.rpartition(":")
        address = parse_address(host.strip("[]"))
        if address is None or not colon or not port.isdigit() or not 0 < int(port) < 65536:
            return None
        return cls(address, int(port))


class HostResolvers:
    """The servers of the host's ``/etc/resolv.conf``, read again when the file changes."""

    def __init__(self, path: Path = Path("/etc/resolv.conf")) -> None:
        self._path = path
        self._stamp: tuple[int, int] | None = None
        self._servers: tuple[Server, ...] = ()

    def servers(self) -> tuple[Server, ...]:
        """The servers at this moment; none when the file is missing."""
        try:
            status = self._path.stat()
            if (stamp := (status.st_mtime_ns, status.st_ino)) != self._stamp:
                lines = [line.split() for line in self._path.read_text(errors="replace").splitlines()]
                found = [Server.of_host(line[1]) for line in lines if len(line) > 1 and line[0] == "nameserver"]
                self._servers = tuple(server for server in found if server is not None)
                self._stamp = stamp
        except OSError:
            self._servers = ()
        return self._servers


class Resolver:
    """The resolver of one cage. ``configured`` replaces the host's servers when it is not empty.

    ``fence``: nothing is asked past this deadline, as a plugin chooses the names; None: no plugin does.
    """

    def __init__(self, configured: tuple[str, ...], host: HostResolvers, fence: Fence | None = None) -> None:
        self._configured = tuple(server for text in configured if (server := Server.parse(text)) is not None)
        self._host, self._fence = host, fence or Fence()
        self._loop = asyncio.get_running_loop()
        self._work = TokenBucket(CPU_PER_SECOND, CPU_BURST)
        self._pace = TokenBucket(ASKED_PER_SECOND, ASKED_AT_ONCE)
        self._cache: OrderedDict[str, tuple[float, Answer]] = OrderedDict()
        self._running: dict[str, asyncio.Task[Answer]] = {}

    async def resolve(self, name: str) -> Answer:
        """Every address of ``name``, both families; raises ResolveError. Equal questions share one lookup."""
        cached = self._cache.get(name)
        if cached is not None and cached[0] > self._loop.time():
            return cached[1]
        task = self._running.get(name)
        if task is None:
            if self._work.tokens <= 0:
                raise Overworked("reading its answers takes too much CPU time")
            task = self._loop.create_task(self._lookup(name))
            self._running[name] = task
            task.add_done_callback(lambda _: self._running.pop(name, None))
        # One caller that gives up must not take the answer away from the others.
        return await asyncio.shield(task)

    @property
    def busy(self) -> int:
        """Lookups under way."""
        return len(self._running)

    async def close(self) -> None:
        """Cancel the lookups under way."""
        await cancel_all(self._running.values())

    async def _lookup(self, name: str) -> Answer:
        families = [self._loop.create_task(self._family(name, kind)) for kind in (wire.A, wire.AAAA)]
        try:
            done, late = await asyncio.wait(families, return_when=asyncio.FIRST_COMPLETED)
            if late:
                enough = all(task.exception() is None and task.result()[0].addresses for task in done)
                await asyncio.wait(late, timeout=FAMILY_GRACE if enough else None)
        finally:
            results = await cancel_all(families)
        answers = [result for result in results if not isinstance(result, BaseException)]
        for failure in results:
            # An answer of one family is enough; a failure that is none of DNS is a bug and must show.
            if isinstance(failure, BaseException) and not (
                isinstance(failure, ResolveError | asyncio.CancelledError)
                and any(answer.addresses for answer, _ in answers)
            ):
                raise failure
        addresses = tuple(dict.fromkeys(address for answer, _ in answers for address in answer.addresses))
        merged = Answer(addresses[:MAX_ADDRESSES], any(answer.exists for answer, _ in answers))
        ttl = min(ttl for answer, ttl in answers if answer.addresses or not addresses)
        self._cache[name] = (self._loop.time() + ttl, merged)
        self._cache.move_to_end(name)
        while len(self._cache) > MAX_CACHED:
            self._cache.popitem(last=False)
        return merged

    async def _family(self, name: str, kind: int) -> tuple[Answer, int]:
        target = name
        ttl = MAX_TTL
        for _ in range(MAX_CHAIN):
            if normal_name(target) is None:  # an alias may lead to any bytes
                return Answer(()), NEGATIVE_TTL
            reply = await self._ask(target, kind)
            step = _follow(reply, target)
            ttl = min(ttl, step.ttl)
            exists = reply.code != Code.NXDOMAIN
            if step.addresses or step.target == target or reply.final or not exists:
                return Answer(step.addresses, exists), (ttl if step.addresses else NEGATIVE_TTL)
            target = step.target
        raise ResolveError("a chain of aliases that is too long")

    async def _ask(self, target: str, kind: int) -> Reply:
        """The first good answer of any server; each is asked twice at most."""
        await asyncio.sleep(self._pace.take())
        servers = self._configured or self._host.servers()
        last = "no answer in time" if servers else "no resolver is configured"
        waiting = list(servers * 2)
        running: dict[asyncio.Task[Reply], Server] = {}
        end = self._loop.time() + TIMEOUT
        try:
            while waiting or running:
                pause = RETRY if len(waiting) == len(servers) + 1 else STAGGER
                if waiting:
                    server = waiting.pop(0)
                    running[self._loop.create_task(self._exchange(server, target, kind))] = server
                left = end - self._loop.time()
                if left <= 0:
                    break
                done, _ = await asyncio.wait(
                    running, timeout=min(pause, left) if waiting else left, return_when=asyncio.FIRST_COMPLETED
                )
                for task in done:
                    server = running.pop(task)
                    try:
                        reply = task.result()
                    except (OSError, wire.Broken) as error:
                        last = f"{server.address}: {str(error) or type(error).__name__}"
                        continue
                    if reply.code in {Code.NOERROR, Code.NXDOMAIN}:
                        return reply
                    last = f"{server.address}: code {reply.code}"
        finally:
            await cancel_all(running)
        raise ResolveError(last)

    async def _exchange(self, server: Server, target: str, kind: int) -> Reply:
        asked = wire.query(int.from_bytes(os.urandom(2), "big"), target, kind)
        with _socket(server, socket.SOCK_DGRAM) as sock:
            # Connected: only this server can answer, and a refusal is reported at once.
            await self._loop.sock_connect(sock, _where(server, sock))
            await self._fence.opened()
            await self._loop.sock_sendall(sock, asked)
            # Forged or late packets do not end the wait for the right one.
            while not wire.answers(answer := await self._loop.sock_recv(sock, 4096), asked):
                pass
        reply = self._read(answer, asked, kind)
        if not reply.truncated:
            return reply
        await asyncio.sleep(self._pace.take(OVER_TCP))
        with _socket(server, socket.SOCK_STREAM) as sock:
            await self._fence.opened()
            await self._loop.sock_connect(sock, _where(server, sock))
            await self._fence.opened()
            await self._loop.sock_sendall(sock, struct.pack("!H", len(asked)) + asked)
            length = struct.unpack("!H", await _read(sock, 2))[0]
            answer = await _read(sock, min(length, MAX_ANSWER))
        if not wire.answers(answer, asked):
            raise wire.Broken("an answer to another question")
        return self._read(answer, asked, kind)

    def _read(self, answer: bytes, asked: bytes, kind: int) -> Reply:
        started = time.thread_time()
        try:
            return wire.read_reply(answer, asked, kind)
        finally:
            self._work.take(time.thread_time() - started)


@struct_class(frozen=True)
class _Step:
    """One answer on the way from a name to its addresses."""

    target: str
    addresses: tuple[Address, ...]
    ttl: int


def _follow(reply: Reply, target: str) -> _Step:
    """Walk the aliases inside one answer, to addresses or to the name to ask for next."""
    ttl = MAX_TTL
    for _ in range(MAX_CHAIN):
        found = reply.addresses.get(target)
        if found is not None:
            return _Step(target, tuple(address for address, _ in found), min(ttl, *(each for _, each in found)))
        if target not in reply.aliases:
            break
        target, life = reply.aliases[target]
        ttl = min(ttl, life)
    return _Step(target, (), ttl)


def _socket(server: Server, kind: socket.SocketKind) -> socket.socket:
    family = socket.AF_INET if server.address.version == 4 else socket.AF_INET6
    sock = socket.socket(family, kind)
    sock.setblocking(False)
    return sock


def _where(server: Server, sock: socket.socket) -> tuple[str, int] | tuple[str, int, int, int]:
    """The socket address of a server; raises OSError when its interface is not there."""
    if not server.scope or not isinstance(server.address, IPv6Address):
        return str(server.address), server.port
    if server.scope.isdigit():
        index = int(server.scope)
    else:
        # Not if_nametoindex: it makes a Unix socket for this, which the broker may not.
        request = struct.pack("=16si20x", server.scope.encode()[:15], 0)
        index = struct.unpack("=16si20x", fcntl.ioctl(sock, _SIOCGIFINDEX, request))[1]
    return str(server.address), server.port, 0, index


async def _read(sock: socket.socket, count: int) -> bytes:
    loop = asyncio.get_running_loop()
    data = b""
    while len(data) < count:
        part = await loop.sock_recv(sock, count - len(data))
        if not part:
            raise ConnectionError("the resolver closed the connection")
        data += part
    return data
