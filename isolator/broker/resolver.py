"""The upstream resolver: finds the addresses of a name outside the cage, with one cache per cage.

A cache of its own per cage, so that one plugin cannot find out from timing which names another looks up. Answers are
kept for their TTL and no longer; the addresses that were checked are dialled, because both come from here.
CNAMEs are followed, across answers if the server does not, up to ``MAX_CHAIN``; only the addresses at the end count.
"""

from __future__ import annotations

import asyncio
import contextlib
import secrets
import socket
import struct
from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path

import dns.exception
import dns.flags
import dns.message
import dns.name
import dns.rcode
import dns.rdatatype
import dns.rrset

from isolator.policy.addresses import Address, parse_address

MAX_CHAIN = 8
MAX_ADDRESSES = 16
MAX_CACHED = 1024
MAX_TTL = 300
NEGATIVE_TTL = 5
TIMEOUT = 2.0
"""Seconds for one server's answer; every server is tried twice."""


@dataclass(frozen=True)
class Answer:
    """Addresses of a name; ``exists`` is False for NXDOMAIN."""

    addresses: tuple[Address, ...]
    exists: bool = True


class ResolveError(Exception):
    """No server gave an answer; the message is the last failure."""


@dataclass(frozen=True)
class Server:
    """One upstream server."""

    address: Address
    port: int = 53

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
                found = [Server.parse(line[1]) for line in lines if len(line) > 1 and line[0] == "nameserver"]
                self._servers = tuple(server for server in found if server is not None)
                self._stamp = stamp
        except OSError:
            self._servers = ()
        return self._servers


class Resolver:
    """The resolver of one cage. ``configured`` replaces the host's servers when it is not empty."""

    def __init__(self, configured: tuple[str, ...], host: HostResolvers) -> None:
        self._configured = tuple(server for text in configured if (server := Server.parse(text)) is not None)
        self._host = host
        self._loop = asyncio.get_running_loop()
        self._cache: OrderedDict[str, tuple[float, Answer]] = OrderedDict()
        self._running: dict[str, asyncio.Task[Answer]] = {}

    async def resolve(self, name: str) -> Answer:
        """Every address of ``name``, both families; raises ResolveError. Equal questions share one lookup."""
        cached = self._cache.get(name)
        if cached is not None and cached[0] > self._loop.time():
            return cached[1]
        task = self._running.get(name)
        if task is None:
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
        tasks = list(self._running.values())
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _lookup(self, name: str) -> Answer:
        results = await asyncio.gather(
            self._family(name, dns.rdatatype.A), self._family(name, dns.rdatatype.AAAA), return_exceptions=True
        )
        answers = [result for result in results if not isinstance(result, BaseException)]
        failures = [result for result in results if isinstance(result, BaseException)]
        for failure in failures:
            # An answer of one family is enough; a failure that is none of DNS is a bug and must show.
            if not isinstance(failure, ResolveError) or not any(answer.addresses for answer, _ in answers):
                raise failure
        addresses = tuple(dict.fromkeys(address for answer, _ in answers for address in answer.addresses))
        merged = Answer(addresses[:MAX_ADDRESSES], any(answer.exists for answer, _ in answers))
        ttl = min(ttl for answer, ttl in answers if answer.addresses or not addresses)
        self._cache[name] = (self._loop.time() + ttl, merged)
        self._cache.move_to_end(name)
        while len(self._cache) > MAX_CACHED:
            self._cache.popitem(last=False)
        return merged

    async def _family(self, name: str, kind: dns.rdatatype.RdataType) -> tuple[Answer, int]:
        target = dns.name.from_text(name)
        ttl = MAX_TTL
        for _ in range(MAX_CHAIN):
            message = await self._ask(target, kind)
            step = _follow(message, target, kind)
            ttl = min(ttl, step.ttl)
            final = step.target == target or any(rrset.rdtype == dns.rdatatype.SOA for rrset in message.authority)
            if step.addresses or final or message.rcode() == dns.rcode.NXDOMAIN:
                exists = message.rcode() != dns.rcode.NXDOMAIN
                return Answer(step.addresses, exists), (ttl if step.addresses else NEGATIVE_TTL)
            target = step.target
        raise ResolveError("a chain of aliases that is too long")

    async def _ask(self, target: dns.name.Name, kind: dns.rdatatype.RdataType) -> dns.message.Message:
        servers = self._configured or self._host.servers()
        last = "no resolver is configured"
        for server in servers * 2:
            try:
                message = await self._exchange(server, target, kind)
            except (OSError, TimeoutError, dns.exception.DNSException, ValueError, struct.error) as error:
                last = f"{server.address}: {str(error) or type(error).__name__}"
                continue
            if message.rcode() in {dns.rcode.NOERROR, dns.rcode.NXDOMAIN}:
                return message
            last = f"{server.address}: {dns.rcode.to_text(message.rcode())}"
        raise ResolveError(last)

    async def _exchange(
        self, server: Server, target: dns.name.Name, kind: dns.rdatatype.RdataType
    ) -> dns.message.Message:
        query = dns.message.make_query(target, kind, id=secrets.randbits(16), use_edns=0, payload=1232)
        wire = query.to_wire()
        where = (str(server.address), server.port)
        async with asyncio.timeout(TIMEOUT):
            with _socket(server, socket.SOCK_DGRAM) as sock:
                # Connected: only this server can answer, and a refusal is reported at once.
                await self._loop.sock_connect(sock, where)
                await self._loop.sock_sendall(sock, wire)
                while True:
                    # Forged or late packets do not end the wait for the right one.
                    with contextlib.suppress(dns.exception.DNSException, ValueError, struct.error):
                        answer = dns.message.from_wire(await self._loop.sock_recv(sock, 4096), ignore_trailing=True)
                        if query.is_response(answer):
                            break
            if not answer.flags & dns.flags.TC:
                return answer
            with _socket(server, socket.SOCK_STREAM) as sock:
                await self._loop.sock_connect(sock, where)
                await self._loop.sock_sendall(sock, struct.pack("!H", len(wire)) + wire)
                length = struct.unpack("!H", await _read(sock, 2))[0]
                answer = dns.message.from_wire(await _read(sock, length))
        if not query.is_response(answer):
            raise ResolveError("an answer to another question")
        return answer


@dataclass(frozen=True)
class _Step:
    target: dns.name.Name
    addresses: tuple[Address, ...]
    ttl: int


def _follow(message: dns.message.Message, target: dns.name.Name, kind: dns.rdatatype.RdataType) -> _Step:
    """Walk the aliases inside one answer, to addresses or to the name to ask for next."""
    ttl = MAX_TTL
    for _ in range(MAX_CHAIN):
        records = _records(message, target, kind)
        if records is not None:
            found = (parse_address(record.to_text()) for record in records)
            return _Step(target, tuple(item for item in found if item is not None), min(ttl, records.ttl))
        alias = _records(message, target, dns.rdatatype.CNAME)
        if alias is None:
            break
        ttl = min(ttl, alias.ttl)
        target = alias[0].target
    return _Step(target, (), ttl)


def _records(
    message: dns.message.Message, name: dns.name.Name, kind: dns.rdatatype.RdataType
) -> dns.rrset.RRset | None:
    return next((rrset for rrset in message.answer if rrset.name == name and rrset.rdtype == kind), None)


def _socket(server: Server, kind: socket.SocketKind) -> socket.socket:
    family = socket.AF_INET if server.address.version == 4 else socket.AF_INET6
    sock = socket.socket(family, kind)
    sock.setblocking(False)
    return sock


async def _read(sock: socket.socket, count: int) -> bytes:
    loop = asyncio.get_running_loop()
    data = b""
    while len(data) < count:
        part = await loop.sock_recv(sock, count - len(data))
        if not part:
            raise ConnectionError("the resolver closed the connection")
        data += part
    return data
