"""The way out through a company's proxy: a connection to it, then CONNECT (RFC 9110, 9.3.6).

Loaded only where ``host.toml`` names a proxy. Cages know nothing of it: they connect as ever, and names, ports and
first bytes are held to the policy as ever. A destination goes to the proxy as the address that was resolved and
checked here; as a name only where the policy leaves the lookup to the proxy (``Rules.looked_up_by_proxy``).
"""

from __future__ import annotations

import asyncio
import re
import socket
from collections.abc import Sequence

from isolator.broker.dial import dial
from isolator.broker.flow import DescribedError
from isolator.broker.resolver import ResolveError, Resolver
from isolator.ipc.fence import Fence
from isolator.linux.readable import readable
from isolator.policy.addresses import Address, bracketed, parse_address
from isolator.policy.names import parse_egress

ANSWER_SECONDS = 20.0
"""Seconds for the proxy's answer to CONNECT: it has a connection to make itself."""
MAX_HEAD = 16 * 1024
MAX_TRIES = 3
"""Addresses of one name for which the proxy is asked."""
_STATUS = re.compile(rb"HTTP/1\.[01] ([1-9][0-9][0-9])[ \r]")


class Proxy:
    """A proxy, ``HOST:PORT``; ``resolver`` finds its address, which no policy has to grant.

    ``fence``: nothing is sent to it past this deadline.
    """

    def __init__(self, where: str, resolver: Resolver, fence: Fence) -> None:
        rule = parse_egress(where)
        self.where = where
        self._host, self._port, self._resolver, self._fence = rule.host, rule.ports[0], resolver, fence

    async def close(self) -> None:
        """Cancel lookups under way."""
        await self._resolver.close()

    async def dial(
        self, addresses: Sequence[Address], name: str | None, port: int, *, small: bool
    ) -> tuple[socket.socket, Address | None]:
        """Connect to one of the addresses, which the caller has checked; to ``name`` when there are none.

        Returns the socket, and the address that answered. Raises DescribedError.
        """
        if not addresses:
            return await self._connect(str(name), port, small), None
        # Many proxies have no IPv6.
        tries = sorted(addresses, key=lambda address: address.version)[:MAX_TRIES]
        for address in tries[:-1]:
            try:
                return await self._connect(str(address), port, small), address
            except _RefusedError:
                continue
        return await self._connect(str(tries[-1]), port, small), tries[-1]

    async def _connect(self, host: str, port: int, small: bool) -> socket.socket:
        target = f"{bracketed(host)}:{port}"
        addresses = await self._addresses()
        try:
            sock, _ = await dial(addresses, self._port, self._fence, small=small)
        except OSError as error:
            raise DescribedError(f"proxy {self.where} cannot be reached: {error.strerror}") from error
        try:
            await asyncio.sleep(0)  # in a task from here on (``begun``), as a time-out needs one
            async with asyncio.timeout(ANSWER_SECONDS):
                request = f"CONNECT {target} HTTP/1.1\r\nHost: {target}\r\n\r\n"
                await self._fence.opened()
                await asyncio.get_running_loop().sock_sendall(sock, request.encode())
                status = await _read_status(sock)
            if status == 407:
                raise DescribedError(f"proxy {self.where} wants credentials (407); let this host through it without")
            if not 200 <= status < 300:
                raise _RefusedError(f"proxy {self.where} refuses {target} ({status})")
        except BaseException as error:  # cancelled too: the socket has no other owner yet
            sock.close()
            if isinstance(error, TimeoutError):
                raise DescribedError(f"proxy {self.where} does not answer") from None
            if isinstance(error, OSError) and not isinstance(error, DescribedError):
                raise DescribedError(f"proxy {self.where} broke off: {error.strerror}") from error
            if isinstance(error, ValueError):
                raise DescribedError(f"proxy {self.where} does not speak HTTP") from None
            raise
        return sock

    async def _addresses(self) -> tuple[Address, ...]:
        address = parse_address(self._host)
        if address is not None:
            return (address,)
        try:
            found = (await self._resolver.resolve(self._host)).addresses
        except ResolveError as error:
            raise DescribedError(f"proxy {self.where} is not found: {error}") from None
        if not found:
            raise DescribedError(f"proxy {self.where} is not found: its name has no address")
        return found


class _RefusedError(DescribedError):
    """The proxy does not connect to this destination."""


async def _read_status(sock: socket.socket) -> int:
    """The status of the final answer, read to the end of its head and not a byte further: what follows is the server's.

    Raises ValueError for anything that is no HTTP, OSError.
    """
    while True:
        head = b""
        while b"\r\n\r\n" not in head[-4:]:
            await readable(sock.fileno())
            data = sock.recv(MAX_HEAD, socket.MSG_PEEK)
            if not data:
                raise ValueError("it ended before its answer did")
            end = (head + data).find(b"\r\n\r\n")
            head += sock.recv(len(data) if end < 0 else end + 4 - len(head))
            if len(head) > MAX_HEAD or not head.startswith(b"HTTP/1."[: len(head)]):
                raise ValueError("no head of an answer")
        found = _STATUS.match(head)
        if found is None:
            raise ValueError("no status")
        if not 100 <= int(found[1]) < 200:
            return int(found[1])
