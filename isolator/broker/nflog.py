"""Refusals of the kernel: NFLOG records turned into ``net.denied`` records.

An NFLOG record holds the first bytes of the refused IP packet and the prefix of the rule that refused it.
"""

from __future__ import annotations

from dataclasses import dataclass
from ipaddress import IPv4Address, IPv6Address

from isolator.audit.schema import NetDenied
from isolator.broker.virtual import VirtualPool
from isolator.policy.addresses import Address
from isolator.policy.denial import DenialRule, protocol_rule
from isolator.policy.destinations import Rules

_PROTOCOLS = {1: "icmp", 2: "igmp", 6: "tcp", 17: "udp", 58: "icmpv6", 132: "sctp", 136: "udplite"}


@dataclass(frozen=True)
class Refused:
    """One refused packet; ``count`` is how many such packets the record stands for."""

    kind: str
    protocol: str
    address: Address | None
    port: int | None
    count: int


def read(prefix: str, packet: bytes) -> Refused:
    """Interpret one record; fields that the packet is too short for are None."""
    kind, _, sample = prefix.rpartition(":")[2].partition("/")
    protocol, address, rest = _header(packet)
    port = int.from_bytes(rest[2:4], "big") if protocol in {6, 17, 132, 136} and len(rest) >= 4 else None
    name = _PROTOCOLS.get(protocol, f"ip-{protocol}") if protocol is not None else "unknown"
    return Refused(kind, name, address, port, int(sample) if sample.isdigit() else 1)


def describe(refused: Refused, rules: Rules, pool: VirtualPool) -> NetDenied:
    """The record for one refusal in a cage with these rules and virtual addresses."""
    address, port = refused.address, refused.port
    entry = pool.entry(address) if isinstance(address, IPv4Address) else None
    if refused.kind in {"over_rate", "over_open"}:
        rule: str = DenialRule.RATE if refused.kind == "over_rate" else DenialRule.TOO_MANY_OPEN
    elif refused.protocol != "tcp" or address is None or port is None:
        rule = protocol_rule(refused.protocol)
    elif entry is not None:
        rule = DenialRule.PORT
    elif isinstance(address, IPv4Address) and address in rules.virtual:
        rule = DenialRule.UNALLOCATED
    elif address.is_loopback:
        rule = DenialRule.BROKER_PORT
    else:
        rule = rules.literal(address, port).rule
    return NetDenied(
        name=entry.name if entry is not None else None,
        address=str(address) if address is not None else None,
        port=port,
        protocol=refused.protocol,
        verdict="denied",
        rule=rule,
    )


def _header(packet: bytes) -> tuple[int | None, Address | None, bytes]:
    if len(packet) >= 20 and packet[0] >> 4 == 4:
        # Only the first fragment has the transport header.
        rest = packet[(packet[0] & 15) * 4 :] if not int.from_bytes(packet[6:8], "big") & 0x1FFF else b""
        return packet[9], IPv4Address(packet[16:20]), rest
    if len(packet) >= 40 and packet[0] >> 4 == 6:
        return packet[6], IPv6Address(packet[24:40]), packet[40:]
    return None, None, b""
