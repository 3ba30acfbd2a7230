"""NAT64 prefixes of the host's network: IPv6 addresses that lead to IPv4 ones, private ones included (RFC 6052, 7050).

A network with NAT64 answers for the IPv6 address of ``ipv4only.arpa``, which has none, with one of its own prefix. The
host's resolvers are asked when a cage first wants an IPv6 address. Without an answer there is no prefix.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Iterable
from ipaddress import IPv4Address, IPv6Address, IPv6Network

from isolator.broker.resolver import HostResolvers, ResolveError, Resolver
from isolator.policy.addresses import Address

NAME = "ipv4only.arpa"
KEPT, RETRY = 600.0, 60.0
"""Seconds for which an answer counts, and after which the question is asked again without one."""
_WELL_KNOWN = frozenset({IPv4Address("192.0.0.170"), IPv4Address("192.0.0.171")})
_POSITIONS = {
    96: (12, 13, 14, 15), 64: (9, 10, 11, 12), 56: (7, 9, 10, 11),
    48: (6, 7, 9, 10), 40: (5, 6, 7, 9), 32: (4, 5, 6, 7),
}  # fmt: skip
"""Bytes of an address that hold the IPv4 address, by the length of the prefix (RFC 6052, 2.2)."""


class Nat64:
    """The prefixes as of the last ``refresh``; ``close`` ends what is under way."""

    def __init__(self, servers: HostResolvers) -> None:
        self._resolver = Resolver((), servers)
        self._loop = asyncio.get_running_loop()
        self._prefixes: frozenset[IPv6Network] = frozenset()
        self._until = 0.0

    async def refresh(self) -> None:
        """Ask for the prefixes unless they are known."""
        if self._loop.time() < self._until:
            return
        kept = RETRY
        with contextlib.suppress(ResolveError):
            self._prefixes = prefixes((await self._resolver.resolve(NAME)).addresses)
            kept = KEPT
        self._until = self._loop.time() + kept

    def inside(self, address: Address) -> IPv4Address | None:
        """The IPv4 address that an IPv6 address leads to, or None."""
        if isinstance(address, IPv6Address):
            for prefix in self._prefixes:
                if address in prefix:
                    return _packed(address, prefix.prefixlen)
        return None

    async def close(self) -> None:
        """Cancel the lookup under way."""
        await self._resolver.close()


def prefixes(answer: Iterable[Address]) -> frozenset[IPv6Network]:
    """The prefixes by which a resolver has made IPv6 addresses of ``ipv4only.arpa``."""
    return frozenset(
        IPv6Network((address, length), strict=False)
        for address in answer
        if isinstance(address, IPv6Address)
        for length in _POSITIONS
        if _packed(address, length) in _WELL_KNOWN
    )


def _packed(address: IPv6Address, length: int) -> IPv4Address:
    return IPv4Address(bytes(address.packed[at] for at in _POSITIONS[length]))
