"""Which destinations a policy reaches: the one place that knows, for the meet, the broker and the ruleset alike.

A host text is parsed once, by ``parse_host``, into a ``Name``, a ``Wildcard`` or a ``Network``; each says which others
it ``covers``. ``Rules`` answers for a whole policy, at two moments. *Before* a name is resolved: may this name, or this
address written by the plugin itself, be connected to at that port (``Rules.name_ports``, ``Rules.literal``)? *After*:
is the address that came out one of those that are never reachable (``Rules.blocked``)? The ruleset is the same answer
as address ranges (``Rules.literal_ranges``, ``Rules.virtual_groups``), so the kernel refuses at once what the broker
would refuse later.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable
from ipaddress import IPv4Network, IPv6Address, IPv6Network, ip_address, ip_network
from typing import TypeAlias

from isolator.base.patterns import pattern
from isolator.base.structs import struct_class
from isolator.errors import UsageError, translated
from isolator.policy import addresses
from isolator.policy.model import VIRTUAL, AddressException, EgressRule, NetworkPolicy
from isolator.policy.units import shown

PUBLIC_PORTS = frozenset({80, 443})
"""TCP ports of the ``public`` mode."""
PUBLIC = f"any public address, TCP {' and '.join(map(str, sorted(PUBLIC_PORTS)))}"
"""The destinations of the ``public`` mode in words."""
GROUP_PREFIX = 20
MAX_GROUPS = 31
_WIDEST_VIRTUAL = 8
_NEVER_VIRTUAL = tuple(map(IPv4Network, ("0.0.0.0/8", "127.0.0.0/8", "169.254.0.0/16", "192.0.0.0/24", "224.0.0.0/3")))
"""Networks that a kernel or a cage has a meaning of its own for."""

_LOCAL = (IPv4Network("127.0.0.0/8"), IPv6Network("::1/128"))
_LABEL = pattern(r"[a-z0-9_]([a-z0-9_-]{0,61}[a-z0-9_])?")
_MAX_NAME = 253


@struct_class(frozen=True)
class Name:
    """A host name in lower case, without a final dot."""

    text: str

    def covers(self, other: Host) -> bool:
        """Whether every destination of ``other`` is this name."""
        return self == other

    def __str__(self) -> str:
        return self.text


@struct_class(frozen=True)
class Wildcard:
    """``*.example.com``: names with one or more whole labels before ``suffix``, which begins with its dot."""

    suffix: str

    def covers(self, other: Host) -> bool:
        """Whether every name of ``other`` matches; the dot keeps out ``example.com`` and ``evilexample.com``."""
        text = other.suffix if isinstance(other, Wildcard) else other.text if isinstance(other, Name) else ""
        return text.endswith(self.suffix)

    def __str__(self) -> str:
        return f"*{self.suffix}"


@struct_class(frozen=True)
class Network:
    """The addresses of a CIDR; an address alone is a network of one."""

    network: addresses.IPNetwork

    def covers(self, other: Host) -> bool:
        """Whether every address of ``other`` lies in this network; names lie in none."""
        return isinstance(other, Network) and addresses.is_subnet(other.network, self.network)

    def __str__(self) -> str:
        # Two spellings of one address would count as two rules.
        return str(self.network.network_address if self.network.num_addresses == 1 else self.network)


Host: TypeAlias = Name | Wildcard | Network
"""A parsed host text; ``str`` gives its one canonical spelling, which ``parse_host`` reads back."""


@functools.lru_cache(maxsize=1024)  # the meet compares each rule with each other one
def parse_host(text: str) -> Host:
    """Parse a DNS name, ``*.`` plus a name, an address, or a CIDR; raises ValueError with a sentence.

    Names of other scripts must be given in their ``xn--`` form: the name that an operator approves on a terminal has
    to be the one that is resolved, and two scripts can look alike.
    """
    if "://" in text:
        raise ValueError(f'"{shown(text)}" is a URL; write the host name alone')
    host = text.strip().lower().removesuffix(".")
    if not host or len(host) > _MAX_NAME:
        raise ValueError(f'"{shown(text)}" is not a host name')
    if ":" in host or "/" in host or host.replace(".", "").isdigit():
        return _parse_network(host, text)
    if not host.isascii():
        raise ValueError(f'"{shown(text)}": write names of other scripts in their xn-- form')
    name = host.removeprefix("*.")
    labels = _labels(name)
    if labels is None:
        hint = '; a wildcard is a whole first label, like "*.example.com"' if "*" in host else ""
        raise ValueError(f'"{shown(text)}" is not a host name{hint}')
    # "0x7f.1" and "127.1" are addresses to inet_aton and names to us: nothing may be both.
    if labels[-1].isdigit() or labels[-1].startswith("0x"):
        raise ValueError(f'"{shown(text)}" is neither a host name nor an address')
    if name == host:
        return Name(name)
    if len(labels) < 2:
        raise ValueError(f'"{shown(text)}" would cover a whole top-level domain')
    return Wildcard(f".{name}")


def _parse_network(host: str, text: str) -> Network:
    try:
        address = None if "/" in host else ip_address(host)
        network = ip_network(host if address is None else address)
    except ValueError:
        why = "is not an address or a network"
        if "/" in host:
            why += " (its host bits must be zero)"
        raise ValueError(f'"{shown(text)}" {why}') from None
    if address is None and network.num_addresses == 1:  # it is spelled as the address, which is to be read again
        address = network.network_address
    if isinstance(address, IPv6Address) and (address.scope_id or address.ipv4_mapped):
        raise ValueError(f'"{shown(text)}": write the plain address')
    return Network(network)


def normal_name(text: str) -> str | None:
    """The name in lower case without its final dot, or None when it is no host name.

    A host name has at most 253 characters, labels of 1 to 63 letters, digits, ``-`` and ``_``, and is no address.
    """
    name = text.lower().removesuffix(".")
    labels = _labels(name) if len(name) <= _MAX_NAME else None
    # A last label of digits is an old spelling of an IPv4 address (``127.1``), which resolvers turn into one.
    return name if labels is not None and not labels[-1].isdigit() else None


def _labels(name: str) -> list[str] | None:
    labels = name.split(".")
    return labels if all(map(_LABEL.fullmatch, labels)) else None


def parse_virtual(text: str) -> str:
    """An IPv4 network whose addresses can stand for names; raises ValueError with a sentence."""
    try:
        network = IPv4Network(text)
    except ValueError:
        raise ValueError(
            f'"{shown(text)}" is not an IPv4 network like "{VIRTUAL}" (its host bits must be zero)'
        ) from None
    if not _WIDEST_VIRTUAL <= network.prefixlen <= GROUP_PREFIX:
        raise ValueError(f"{network} must be a /{_WIDEST_VIRTUAL} to /{GROUP_PREFIX}: names need room")
    taken = next((other for other in _NEVER_VIRTUAL if other.overlaps(network)), None)
    if taken is not None:
        raise ValueError(f"{network} lies in {taken}, which programs and kernels take for something else")
    return str(network)


def never_reachable(rule: EgressRule, exceptions: Iterable[AddressException], virtual: str = VIRTUAL) -> str | None:
    """The network because of which no address of ``rule`` can be reached at any of its ports, or None.

    It is on the always-blocked list, or stands for names in cages. A name is never refused here: its addresses are
    checked when they are dialled.
    """
    host = parse_host(rule.host)
    if isinstance(host, Network) and addresses.is_subnet(host.network, IPv4Network(virtual)):
        return f"{virtual}, which stands for names in cages"
    blocked = addresses.wholly_blocked(host.network) if isinstance(host, Network) else None
    if not isinstance(host, Network) or blocked is None:
        return None
    for exception in exceptions:
        if exception.port in rule.ports and ip_network(exception.cidr).overlaps(host.network):
            return None
    return blocked


@struct_class(frozen=True)
class Destination:
    """One egress rule, parsed: a host and its TCP ports."""

    host: Host
    ports: frozenset[int]


def parse_destination(host: str, ports: Iterable[int]) -> Destination:
    """Parse one egress rule; raises UsageError for a host that ``parse_host`` refuses and for impossible ports."""
    allowed = frozenset(ports)
    if not allowed or not all(0 < port < 65536 for port in allowed):
        raise UsageError(f"egress {host}", "needs ports between 1 and 65535", "write it as NAME:PORT")
    with translated(ValueError, UsageError, f"egress {host!r}", "", "write hooks.example.com or *.example.com"):
        return Destination(parse_host(host), allowed)


_KEPT = 1024
"""Verdicts that are kept, as a plugin asks for the same names again and again."""


@struct_class(frozen=True)
class Verdict:
    """``rule`` names the grant that allows it, or the ``DenialRule`` that refuses it."""

    allowed: bool
    rule: str


@struct_class(frozen=True)
class VirtualGroup:
    """A part of the virtual range whose addresses may be used at ``ports`` only."""

    network: IPv4Network
    ports: frozenset[int]


class Rules:
    """The answers of one ``NetworkPolicy``. Raises UsageError for a rule that makes no sense."""

    def __init__(self, policy: NetworkPolicy) -> None:
        self.policy = policy
        self.public = policy.mode == "public"
        self.virtual = IPv4Network(policy.virtual)
        """Addresses that stand for names inside the cage; never dialled."""
        rules = policy.egress if policy.mode != "none" else ()
        granted = (parse_destination(rule.host, rule.ports) for rule in rules)
        # An exact name before a wildcard: a verdict names the first that allows it.
        self._granted = sorted(granted, key=lambda destination: not isinstance(destination.host, Name))
        self._exceptions = [(ip_network(item.cidr), item.port) for item in policy.exceptions]
        self._verdicts: dict[tuple[str, int], Verdict] = {}
        self.virtual_groups = self._groups()

    @property
    def exact_names(self) -> tuple[str, ...]:
        """Names that are granted as such, sorted; their virtual addresses are known from the start."""
        return tuple(sorted({str(granted.host) for granted in self._granted if isinstance(granted.host, Name)}))

    def name_ports(self, name: str) -> frozenset[int]:
        """TCP ports at which a normal name may be reached; empty when it is not granted."""
        ports: set[int] = set(PUBLIC_PORTS) if self.public else set()
        for granted in self._covering(Name(name)):
            ports |= granted.ports
        return frozenset(ports)

    def name(self, name: str, port: int) -> Verdict:
        """Whether a normal name may be reached at ``port``."""
        found = self._verdicts.get((name, port))
        if found is None:
            if len(self._verdicts) >= _KEPT:
                self._verdicts.clear()
            found = self._verdicts[name, port] = self._verdict(Name(name), port)
        return found

    def looked_up_by_proxy(self, name: str) -> bool:
        """Whether the proxy is given a normal name as it is: one that is granted by name, where the host says so.

        A name that only ``public`` covers is looked up here: nobody else can tell whether its address is public.
        """
        return self.policy.proxy_resolves and bool(self._covering(Name(name)))

    def literal(self, address: addresses.Address, port: int) -> Verdict:
        """Whether an address that the plugin wrote itself may be reached at ``port``."""
        if self.blocked(address, port):
            from isolator.policy.denial import DenialRule

            return Verdict(False, DenialRule.BLOCKED_ADDRESS)
        return self._verdict(Network(ip_network(address)), port)

    def blocked(self, address: addresses.Address, port: int) -> bool:
        """Whether a resolved address is on the always-blocked list without an exception for exactly this port."""
        return addresses.always_blocked(address) and not self.excepted(address, port)

    def excepted(self, address: addresses.Address, port: int) -> bool:
        """Whether ``host.toml`` takes this address and port off the always-blocked list."""
        if not self._exceptions:
            return False
        candidates = (address, addresses.unwrap(address))
        return any(port == at and any(item in network for item in candidates) for network, at in self._exceptions)

    def literal_ranges(self, version: int) -> list[tuple[frozenset[int], list[addresses.Range]]]:
        """Address ranges (both ends included) of one IP version that may be reached as written, by ports."""
        granted = [(item.host.network, item.ports) for item in self._granted if isinstance(item.host, Network)]
        granted = [item for item in granted if item[0].version == version]
        if self.public:
            granted.append((ip_network("0.0.0.0/0" if version == 4 else "::/0"), PUBLIC_PORTS))
        never = addresses.ranges_of(addresses.BLOCKED[version])
        # Addresses that are local in a cage, or stand for a name there, are never outside.
        inside = addresses.ranges_of(network for network in (*_LOCAL, self.virtual) if network.version == version)
        grouped: dict[tuple[addresses.Range, ...], set[int]] = {}
        for port in sorted({port for _, ports in granted for port in ports}):
            want = addresses.ranges_of(network for network, ports in granted if port in ports)
            opened = addresses.ranges_of(net for net, at in self._exceptions if at == port and net.version == version)
            result = addresses.subtract(addresses.subtract(want, addresses.subtract(never, opened)), inside)
            if result:
                grouped.setdefault(tuple(result), set()).add(port)
        return [(frozenset(ports), list(ranges)) for ranges, ports in grouped.items()]

    def _covering(self, host: Host) -> list[Destination]:
        return [granted for granted in self._granted if granted.host.covers(host)]

    def _verdict(self, host: Host, port: int) -> Verdict:
        covering = self._covering(host)
        for granted in covering:
            if port in granted.ports:
                return Verdict(True, f"{granted.host}:{port}")
        if self.public and port in PUBLIC_PORTS:
            return Verdict(True, "public")
        from isolator.policy.denial import DenialRule

        if covering or self.public:
            return Verdict(False, DenialRule.PORT)
        return Verdict(False, DenialRule.NO_NETWORK if self.policy.mode == "none" else DenialRule.NOT_GRANTED)

    def _groups(self) -> tuple[VirtualGroup, ...]:
        """One group per distinct set of ports; the union of all comes first, for names whose set is no group."""
        sets = {self.name_ports(name) for name in self.exact_names}
        base = PUBLIC_PORTS if self.public else frozenset()
        sets |= {granted.ports | base for granted in self._granted if isinstance(granted.host, Wildcard)}
        if self.public:
            sets.add(PUBLIC_PORTS)
        if not sets:
            return ()
        union = frozenset().union(*sets)
        ordered = [union, *sorted(sets - {union}, key=sorted)][:MAX_GROUPS]
        blocks = self.virtual.subnets(new_prefix=GROUP_PREFIX)
        return tuple(VirtualGroup(network, ports) for network, ports in zip(blocks, ordered, strict=False))
