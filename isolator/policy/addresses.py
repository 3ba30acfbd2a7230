"""IP addresses: the ranges that no grant makes reachable, the spellings of one address, sets of addresses as ranges.

Metadata services, private networks, everything that is not the public internet. The broker checks every *resolved*
address against ``BLOCKED``, the ruleset leaves its ranges out, and the meet refuses a request or a grant that names
such an address outright. Only an exact CIDR and port in ``host.toml`` takes something off it.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import lru_cache
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network, ip_address

Address = IPv4Address | IPv6Address
IPNetwork = IPv4Network | IPv6Network
Range = tuple[int, int]
"""First and last address, as numbers of one IP version."""

OPEN6 = IPv6Network("2000::/3")
"""The only IPv6 space that is considered at all."""
_OUTSIDE6 = tuple(IPv6Network("::/0").address_exclude(OPEN6))
BLOCKED: dict[int, tuple[IPNetwork, ...]] = {
    4: tuple(
        IPv4Network(text)
        for text in (
            "0.0.0.0/8",
            "10.0.0.0/8",
            "100.64.0.0/10",
            "127.0.0.0/8",
            "168.63.129.16/32",  # Azure's wire server answers on a public address
            "169.254.0.0/16",  # metadata services
            "172.16.0.0/12",
            "192.0.0.0/24",
            "192.0.2.0/24",
            "192.88.99.0/24",
            "192.168.0.0/16",
            "198.18.0.0/15",
            "198.51.100.0/24",
            "203.0.113.0/24",
            "224.0.0.0/4",
            "240.0.0.0/4",
        )
    ),
    6: (
        *map(
            IPv6Network,
            (
                "2001::/23",  # Teredo, ORCHID, benchmarking
                "2001:db8::/32",
                "2002::/16",  # 6to4
                "3fff::/20",
            ),
        ),
        *_OUTSIDE6,
    ),
}
"""The networks of each IP version that are never reachable."""

_NAT64 = IPv6Network("64:ff9b::/96")
_COMPATIBLE = IPv6Network("::/96")
_6TO4 = IPv6Network("2002::/16")


def parse_address(text: str) -> Address | None:
    """An address, or None; scoped addresses (``fe80::1%eth0``) are refused: the scope names a link of the host."""
    try:
        address = ip_address(text)
    except ValueError:
        return None
    return None if isinstance(address, IPv6Address) and address.scope_id is not None else address


def unwrap(address: Address) -> Address:
    """The IPv4 address that an IPv6 spelling of it leads to: IPv4-mapped and NAT64; else the address itself."""
    if isinstance(address, IPv6Address):
        if address.ipv4_mapped is not None:
            return address.ipv4_mapped
        if address in _NAT64:
            return IPv4Address(int(address) & 0xFFFFFFFF)
    return address


def spellings(address: Address) -> tuple[Address, ...]:
    """The address and each IPv4 address that is packed into it (mapped, NAT64, compatible, 6to4)."""
    inner = unwrap(address)
    if inner != address:
        return (address, inner)
    if isinstance(address, IPv6Address):
        if address in _6TO4:
            return (address, IPv4Address(int(address) >> 80 & 0xFFFFFFFF))
        if address in _COMPATIBLE:
            return (address, IPv4Address(int(address) & 0xFFFFFFFF))
    return (address,)


@lru_cache(maxsize=1024)
def always_blocked(address: Address) -> bool:
    """Whether ``address`` lies in ``BLOCKED``, in whichever spelling."""
    inner = unwrap(address)
    return any(inner in network for network in BLOCKED[inner.version])


def wholly_blocked(network: IPNetwork) -> str | None:
    """The blocked network that holds all of ``network``, as text, or None when part of it is public."""
    holder = next((blocked for blocked in BLOCKED[network.version] if is_subnet(network, blocked)), None)
    return f"everything outside {OPEN6}" if holder in _OUTSIDE6 else str(holder) if holder is not None else None


def bracketed(host: object) -> str:
    """A host as it stands before ``:PORT``: an IPv6 address in brackets."""
    text = str(host)
    return f"[{text}]" if ":" in text else text


def is_subnet(inner: IPNetwork, outer: IPNetwork) -> bool:
    """Whether ``inner`` lies within ``outer``; False across IP versions."""
    if isinstance(inner, IPv4Network):
        return isinstance(outer, IPv4Network) and inner.subnet_of(outer)
    return isinstance(outer, IPv6Network) and inner.subnet_of(outer)


def ranges_of(networks: Iterable[IPNetwork]) -> list[Range]:
    """The addresses of networks of one IP version as sorted ranges that do not touch each other."""
    merged: list[Range] = []
    for low, high in sorted((int(network.network_address), int(network.broadcast_address)) for network in networks):
        if merged and low <= merged[-1][1] + 1:
            merged[-1] = (merged[-1][0], max(merged[-1][1], high))
        else:
            merged.append((low, high))
    return merged


def subtract(ranges: Iterable[Range], holes: Iterable[Range]) -> list[Range]:
    """``ranges`` without ``holes``, both as ``ranges_of`` gives them."""
    result = []
    for start, high in ranges:
        low = start
        for first, last in holes:
            if last < low or first > high:
                continue
            if first > low:
                result.append((low, first - 1))
            low = last + 1
        if low <= high:
            result.append((low, high))
    return result
