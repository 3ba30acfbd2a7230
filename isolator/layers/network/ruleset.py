"""The nftables ruleset of one cage's network namespace, as text for one transaction.

The namespace has only ``lo``, to which every address is local (see ``isolator.linux.netlink``).
In the output hook, in order:

1. the cage's own loopback traffic is not tracked: it is free, and cannot fill the connection table;
2. TCP to destinations of the policy is redirected to the broker's listener, up to a rate and a number of open
   connections (in the nat chain, where a refusal still shows the original destination);
3. everything that was not redirected is refused: TCP by a reset, the rest by EPERM.

Each refusal is logged to NFLOG with ``isolator:KIND``. Under a flood only each 64th record is, marked
``isolator:KIND/64``: the broker keeps a count, and the cage cannot drown it in records; whose record it is
the socket tells. So no rule names the cage, and those of one policy are the same in all. The broker's listener is
closed to direct connections: only a redirected one carries the ``dnat`` status.
"""

from __future__ import annotations

from collections.abc import Iterable
from ipaddress import IPv4Address, IPv6Address

from isolator.linux.netlink import NFLOG_GROUP, OWN_ADDRESSES
from isolator.policy.addresses import Range
from isolator.policy.destinations import Rules

TABLE = "isolator"
PORT = 65053
"""Where redirected TCP arrives, on 127.0.0.1 and ::1 of the cage; above the ephemeral ports."""
SAMPLE = 64
"""Of a flood of refused packets, each which one is logged."""


def render(rules: Rules) -> str:
    """Render the whole ruleset of a cage, which replaces the one in force."""
    policy = rules.policy
    admit = [
        f"limit rate over {policy.connects_per_second}/second burst {policy.connect_burst} packets goto over_rate",
        f"ct count over {policy.connects_open} goto over_open",
        f"meta l4proto 6 redirect to :{PORT}",
    ]
    # Two rules, not one: nft 1.0.6 merges ``sport != P dport != P`` into one comparison of both, which means "or".
    untracked = [
        f"tcp sport {PORT} accept",
        f"tcp dport {PORT} accept",
        f"ip daddr {{ 127.0.0.0/8, {OWN_ADDRESSES[0]} }} notrack",
        f"ip6 daddr {{ ::1, {OWN_ADDRESSES[1]} }} notrack",
    ]
    final = [
        "ct state untracked accept",
        "ct state established,related accept",
        "ct status dnat accept",
        "ct state invalid drop",
        "goto refused",
    ]
    chains = [
        _chain("stop", ["meta l4proto 6 reject with tcp reset", "drop"]),
        *(_chain(kind, _logged(kind)) for kind in ("refused", "over_rate", "over_open")),
        _chain("admit", admit),
        _chain("untracked", untracked, "type filter hook output priority -300; policy accept;"),
        _chain("diverted", list(_diverted(rules)), "type nat hook output priority -100; policy accept;"),
        _chain("final", final, "type filter hook output priority 0; policy drop;"),
    ]
    return f"flush ruleset\ntable inet {TABLE} {{\n{''.join(chains)}}}\n"


def _diverted(rules: Rules) -> Iterable[str]:
    for group in rules.virtual_groups:
        yield f"ip daddr {group.network} tcp dport {_ports(group.ports)} goto admit"
    for version, key in ((4, "ip"), (6, "ip6")):
        for ports, ranges in rules.literal_ranges(version):
            yield f"{key} daddr {_addresses(ranges, version)} tcp dport {_ports(ports)} goto admit"


def _logged(kind: str) -> list[str]:
    log = f"group {NFLOG_GROUP} snaplen 96 queue-threshold 1"
    return [
        f'limit rate 20/second burst 40 packets log prefix "{TABLE}:{kind}" {log} goto stop',
        f'numgen inc mod {SAMPLE} == 0 log prefix "{TABLE}:{kind}/{SAMPLE}" {log}',
        "goto stop",
    ]


def _chain(name: str, rules: Iterable[str], hook: str = "") -> str:
    body = "".join(f"  {line}\n" for line in ([hook] if hook else []) + list(rules))
    return f" chain {name} {{\n{body} }}\n"


def _ports(ports: frozenset[int]) -> str:
    return "{ " + ", ".join(map(str, sorted(ports))) + " }"


def _addresses(ranges: list[Range], version: int) -> str:
    kind = IPv4Address if version == 4 else IPv6Address
    return "{ " + ", ".join(f"{kind(a)}-{kind(b)}" if a != b else str(kind(a)) for a, b in ranges) + " }"
