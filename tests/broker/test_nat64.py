"""Prefixes of a network's own NAT64, read from the answer for a name that has no IPv6 address."""

from __future__ import annotations

from ipaddress import IPv4Address, IPv6Address, IPv6Network, ip_address

import pytest

from isolator.broker import nat64
from isolator.broker.nat64 import Nat64, prefixes
from isolator.broker.resolver import HostResolvers

# RFC 6052, 2.4: 192.0.2.33 behind a prefix of each length.
EXAMPLES = {
    "2001:db8::/32": "2001:db8:c000:221::",
    "2001:db8:100::/40": "2001:db8:1c0:2:21::",
    "2001:db8:122::/48": "2001:db8:122:c000:2:2100::",
    "2001:db8:122:300::/56": "2001:db8:122:3c0:0:221::",
    "2001:db8:122:344::/64": "2001:db8:122:344:c0:2:2100::",
    "2001:db8:122:344::/96": "2001:db8:122:344::192.0.2.33",
}


@pytest.mark.parametrize("prefix", EXAMPLES)
async def test_address_behind_a_prefix_of_any_length_is_read(prefix: str) -> None:
    known = Nat64(HostResolvers())
    known._prefixes = frozenset({IPv6Network(prefix)})
    assert known.inside(ip_address(EXAMPLES[prefix])) == IPv4Address("192.0.2.33")
    assert known.inside(ip_address("2606:2800:220:1::34")) is None
    assert known.inside(ip_address("192.0.2.33")) is None
    await known.close()


@pytest.mark.parametrize("text", EXAMPLES)
def test_prefix_is_found_in_the_answer(text: str) -> None:
    network = IPv6Network(text)
    made = bytearray(network.network_address.packed)
    for at, byte in zip(nat64._POSITIONS[network.prefixlen], IPv4Address("192.0.0.171").packed, strict=True):
        made[at] = byte
    assert network in prefixes([IPv6Address(bytes(made)), ip_address("192.0.0.171")])


def test_answers_without_the_well_known_address_make_no_prefix() -> None:
    assert prefixes([ip_address("2001:db8::1"), ip_address("192.0.0.170"), ip_address("::ffff:1.2.3.4")]) == frozenset()
