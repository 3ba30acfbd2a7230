"""Addresses that no grant makes reachable.

Metadata services, private networks, everything that is not the public internet. The broker checks every *resolved*
address against this list; the meet uses it to refuse a request or a grant that names such an address outright.
Only an exact CIDR and port in ``host.toml`` takes something off it.
"""

from __future__ import annotations

from collections.abc import Iterable
from ipaddress import IPv4Network, IPv6Network, ip_network

from isolator.policy.model import AddressException, EgressRule

Network = IPv4Network | IPv6Network

BLOCKED4: tuple[IPv4Network, ...] = tuple(
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
)
OPEN6 = IPv6Network("2000::/3")
"""The only IPv6 space that is considered at all."""
BLOCKED6: tuple[IPv6Network, ...] = tuple(
    IPv6Network(text)
    for text in (
        "2001::/23",  # Teredo, ORCHID, benchmarking
        "2001:db8::/32",
        "2002::/16",  # 6to4
        "3fff::/20",
    )
)


def as_network(host: str) -> Network | None:
    """The network of an address or CIDR in canonical spelling; None for a name."""
    if not (":" in host or "/" in host or host.replace(".", "").isdigit()):
        return None
    return ip_network(host)


def subnet(inner: Network, outer: Network) -> bool:
    """Is ``inner`` within ``outer``? False across families."""
    if isinstance(inner, IPv4Network):
        return isinstance(outer, IPv4Network) and inner.subnet_of(outer)
    return isinstance(outer, IPv6Network) and inner.subnet_of(outer)


def wholly_blocked(network: Network) -> str | None:
    """The listed network that holds all of ``network``, or None when part of it is public."""
    if isinstance(network, IPv4Network):
        return next((str(blocked) for blocked in BLOCKED4 if network.subnet_of(blocked)), None)
    for blocked in BLOCKED6:
        if network.subnet_of(blocked):
            return str(blocked)
    return None if network.overlaps(OPEN6) else f"everything outside {OPEN6}"


def never_reachable(rule: EgressRule, exceptions: Iterable[AddressException]) -> str | None:
    """The listed network because of which no address of ``rule`` can be reached at any of its ports, or None.

    A name is never refused here: what it resolves to is checked when it is dialled.
    """
    network = as_network(rule.host)
    blocked = wholly_blocked(network) if network is not None else None
    if network is None or blocked is None:
        return None
    for exception in exceptions:
        if exception.port in rule.ports and ip_network(exception.cidr).overlaps(network):
            return None
    return blocked
