"""Which destinations a policy reaches: the one place that knows, for the broker and for the ruleset alike.

Two questions are asked. *Before* a name is resolved: may this name, or this address written by the plugin
itself, be asked for at that port (``Rules.name_ports``, ``Rules.literal``)? *After*: is the address that came out one
of those that are never reachable (``Rules.blocked``)? The ruleset is the same answer as address ranges
(``Rules.literal_ranges``, ``Rules.virtual_groups``), so the kernel refuses at once what the broker would refuse later.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network, ip_address, ip_network

from isolator.errors import UsageError
from isolator.policy.addresses import BLOCKED4, BLOCKED6, OPEN6
from isolator.policy.model import NetworkPolicy

Address = IPv4Address | IPv6Address
Network = IPv4Network | IPv6Network
Range = tuple[int, int]

VIRTUAL = IPv4Network("198.18.0.0/15")
"""Addresses that stand for names inside a cage; never dialled."""
PUBLIC_PORTS = frozenset({80, 443})
GROUP_PREFIX = 20
MAX_GROUPS = 31

_NAT64 = IPv6Network("64:ff9b::/96")
_COMPATIBLE = IPv6Network("::/96")
_6TO4 = IPv6Network("2002::/16")
_LOCAL = (IPv4Network("127.0.0.0/8"), IPv6Network("::1/128"))

_LABEL = re.compile(r"[a-z0-9_]([a-z0-9_-]{0,61}[a-z0-9_])?\Z")


def normal_name(text: str) -> str | None:
    """The name in lower case without its final dot, or None when it is no host name.

    A host name has at most 253 characters, labels of 1 to 63 letters, digits, ``-`` and ``_``, and is no address.
    """
    name = text.lower().removesuffix(".")
    if not name or len(name) > 253 or not name.isascii():
        return None
    labels = name.split(".")
    # A last label of digits is an old spelling of an IPv4 address (``127.1``), which resolvers turn into one.
    if not all(map(_LABEL.match, labels)) or labels[-1].isdigit():
        return None
    return name


def unwrap(address: Address) -> Address:
    """The IPv4 address that an IPv6 spelling of it leads to: IPv4-mapped and NAT64; else the address itself."""
    if isinstance(address, IPv6Address):
        if address.ipv4_mapped is not None:
            return address.ipv4_mapped
        if address in _NAT64:
            return IPv4Address(int(address) & 0xFFFFFFFF)
    return address


def always_blocked(address: Address) -> bool:
    """Whether ``address`` is on the list that no grant opens, in whichever spelling."""
    inner = unwrap(address)
    if isinstance(inner, IPv4Address):
        return any(inner in network for network in BLOCKED4)
    return inner not in OPEN6 or any(inner in network for network in BLOCKED6)


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


@dataclass(frozen=True)
class Grant:
    """One parsed egress rule: exactly one of ``name``, ``suffix`` and ``network`` is set."""

    text: str
    ports: frozenset[int]
    name: str | None = None
    suffix: str | None = None
    network: Network | None = None

    def covers(self, name: str) -> bool:
        """Whether the rule covers a normal name; a wildcard stands for one or more whole labels."""
        return name == self.name or (self.suffix is not None and name.endswith(self.suffix))


@dataclass(frozen=True)
class Verdict:
    """``rule`` names the grant that allows it, or the reason why it is refused."""

    allowed: bool
    rule: str


@dataclass(frozen=True)
class VirtualGroup:
    """A part of the virtual range whose addresses may be used at ``ports`` only."""

    network: IPv4Network
    ports: frozenset[int]


def parse_grant(host: str, ports: Iterable[int]) -> Grant:
    """Parse one egress rule; raises UsageError when the host is neither name, wildcard, address nor CIDR."""
    allowed = frozenset(ports)
    if not allowed or not all(0 < port < 65536 for port in allowed):
        raise UsageError(f"egress {host}", "needs ports between 1 and 65535", "write it as NAME:PORT")
    try:
        return Grant(host, allowed, network=ip_network(host.strip("[]")))
    except ValueError:
        pass
    if host.startswith("*."):
        suffix = normal_name(host[2:])
        if suffix is not None:
            return Grant(host, allowed, suffix=f".{suffix}")
    elif (name := normal_name(host)) is not None:
        return Grant(host, allowed, name=name)
    raise UsageError(
        f"egress {host!r}", "is no host name, wildcard, address or CIDR", "write hooks.example.com or *.example.com"
    )


class Rules:
    """A ``NetworkPolicy`` in the form in which it is asked. Raises UsageError for a rule that makes no sense."""

    def __init__(self, policy: NetworkPolicy) -> None:
        self.policy = policy
        self.public = policy.mode == "public"
        rules = policy.egress if policy.mode != "none" else ()
        self.grants = tuple(parse_grant(rule.host, rule.ports) for rule in rules)
        self._exact: dict[str, list[Grant]] = {}
        for grant in self.grants:
            if grant.name is not None:
                self._exact.setdefault(grant.name, []).append(grant)
        self._wild = [grant for grant in self.grants if grant.suffix is not None]
        self._networks = [grant for grant in self.grants if grant.network is not None]
        self._exceptions = [(ip_network(item.cidr), item.port) for item in policy.exceptions]
        self.virtual_groups = self._groups()

    @property
    def exact_names(self) -> tuple[str, ...]:
        """Names that are granted as such, sorted; their virtual addresses are known from the start."""
        return tuple(sorted(self._exact))

    def name_ports(self, name: str) -> frozenset[int]:
        """TCP ports at which a normal name may be reached; empty when it is not granted."""
        ports: set[int] = set(PUBLIC_PORTS) if self.public else set()
        for grant in self._covering(name):
            ports |= grant.ports
        return frozenset(ports)

    def name(self, name: str, port: int) -> Verdict:
        """Whether a normal name may be reached at ``port``."""
        covering = self._covering(name)
        for grant in covering:
            if port in grant.ports:
                return Verdict(True, f"{grant.text}:{port}")
        if self.public and port in PUBLIC_PORTS:
            return Verdict(True, "public")
        if covering or self.public:
            return Verdict(False, "port")
        return Verdict(False, "no-network" if self.policy.mode == "none" else "not-granted")

    def literal(self, address: Address, port: int) -> Verdict:
        """Whether an address that the plugin wrote itself may be reached at ``port``."""
        if self.blocked(address, port):
            return Verdict(False, "blocked-address")
        known = False
        for grant in self._networks:
            if grant.network is not None and grant.network.version == address.version and address in grant.network:
                if port in grant.ports:
                    return Verdict(True, f"{grant.text}:{port}")
                known = True
        if self.public and port in PUBLIC_PORTS:
            return Verdict(True, "public")
        if known or self.public:
            return Verdict(False, "port")
        return Verdict(False, "no-network" if self.policy.mode == "none" else "not-granted")

    def blocked(self, address: Address, port: int) -> bool:
        """Whether a resolved address is on the always-blocked list without an exception for exactly this port."""
        return always_blocked(address) and not self.excepted(address, port)

    def excepted(self, address: Address, port: int) -> bool:
        """Whether ``host.toml`` takes this address and port off the always-blocked list."""
        candidates = (address, unwrap(address))
        return any(
            port == at and any(item.version == network.version and item in network for item in candidates)
            for network, at in self._exceptions
        )

    def literal_ranges(self, version: int) -> list[tuple[frozenset[int], list[Range]]]:
        """Address ranges (both ends included) of one IP version that may be reached as written, by ports."""
        wide: Network = IPv4Network("0.0.0.0/0") if version == 4 else IPv6Network("::/0")
        granted = [(grant.network, grant.ports) for grant in self._networks if grant.network is not None]
        if self.public:
            granted.append((wide, PUBLIC_PORTS))
        granted = [item for item in granted if item[0].version == version]
        never = _ranges([*BLOCKED4] if version == 4 else [*BLOCKED6])
        if version == 6:
            never = _merge([*never, *_complement(_ranges([OPEN6]), 128)])
        # What is local in a cage, and what stands for a name there, is never an address of the outside.
        inside = _ranges([network for network in (*_LOCAL, VIRTUAL) if network.version == version])
        grouped: dict[tuple[Range, ...], set[int]] = {}
        for port in sorted({port for _, ports in granted for port in ports}):
            want = _ranges([network for network, ports in granted if port in ports])
            opened = _ranges([net for net, at in self._exceptions if at == port and net.version == version])
            result = _subtract(_subtract(want, _subtract(never, opened)), inside)
            if result:
                grouped.setdefault(tuple(result), set()).add(port)
        return [(frozenset(ports), list(ranges)) for ranges, ports in grouped.items()]

    def _covering(self, name: str) -> list[Grant]:
        return [*self._exact.get(name, ()), *(grant for grant in self._wild if grant.covers(name))]

    def _groups(self) -> tuple[VirtualGroup, ...]:
        """One group per distinct set of ports; the union of all comes first, for names whose set is no group."""
        sets = {self.name_ports(name) for name in self._exact}
        base = PUBLIC_PORTS if self.public else frozenset()
        sets |= {grant.ports | base for grant in self._wild}
        if self.public:
            sets.add(PUBLIC_PORTS)
        if not sets:
            return ()
        union = frozenset().union(*sets)
        ordered = [union, *sorted(sets - {union}, key=sorted)][:MAX_GROUPS]
        blocks = VIRTUAL.subnets(new_prefix=GROUP_PREFIX)
        return tuple(VirtualGroup(network, ports) for network, ports in zip(blocks, ordered, strict=False))


def parse_address(text: str) -> Address | None:
    """An address, or None; scoped addresses (``fe80::1%eth0``) are refused: the scope names a link of the host."""
    try:
        address = ip_address(text)
    except ValueError:
        return None
    return None if isinstance(address, IPv6Address) and address.scope_id is not None else address


def _ranges(networks: Iterable[Network]) -> list[Range]:
    return _merge((int(network.network_address), int(network.broadcast_address)) for network in networks)


def _merge(ranges: Iterable[Range]) -> list[Range]:
    merged: list[Range] = []
    for low, high in sorted(ranges):
        if merged and low <= merged[-1][1] + 1:
            merged[-1] = (merged[-1][0], max(merged[-1][1], high))
        else:
            merged.append((low, high))
    return merged


def _complement(ranges: list[Range], bits: int) -> list[Range]:
    return _subtract([(0, (1 << bits) - 1)], ranges)


def _subtract(ranges: list[Range], holes: list[Range]) -> list[Range]:
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
