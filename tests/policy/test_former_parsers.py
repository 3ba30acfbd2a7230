"""The one parser of host texts against the three that it replaced: the manifest's, the broker's and the meet's.

Each stands here as it was, as an oracle: the new parser accepts the same texts with the same spelling and the same
refusal as the manifest's, means by each spelling the same as the broker's, and covers the same as the meet's.
"""

from __future__ import annotations

import ipaddress
import re
from ipaddress import IPv4Network, IPv6Address, IPv6Network, ip_address, ip_network

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from isolator.policy.addresses import BLOCKED, OPEN6, wholly_blocked
from isolator.policy.destinations import Name, Network, Rules, Wildcard, normal_name, parse_host
from isolator.policy.model import EgressRule, NetworkPolicy
from isolator.policy.units import shown

LABEL = re.compile(r"[a-z0-9_](?:[a-z0-9_-]{0,61}[a-z0-9_])?")


def former_manifest_parser(text: str) -> str:
    """Canonical spelling, as manifests and policy files were read."""
    if "://" in text:
        raise ValueError(f'"{shown(text)}" is a URL; write the host name alone')
    host = text.strip().lower().removesuffix(".")
    if not host or len(host) > 253:
        raise ValueError(f'"{shown(text)}" is not a host name')
    if ":" in host or "/" in host or host.replace(".", "").isdigit():
        return _former_address(host, text)
    if not host.isascii():
        raise ValueError(f'"{shown(text)}": write names of other scripts in their xn-- form')
    wildcard, name = (True, host[2:]) if host.startswith("*.") else (False, host)
    labels = name.split(".")
    if not all(LABEL.fullmatch(label) for label in labels):
        hint = '; a wildcard is a whole first label, like "*.example.com"' if "*" in host else ""
        raise ValueError(f'"{shown(text)}" is not a host name{hint}')
    if labels[-1].isdigit() or labels[-1].startswith("0x"):
        raise ValueError(f'"{shown(text)}" is neither a host name nor an address')
    if wildcard and len(labels) < 2:
        raise ValueError(f'"{shown(text)}" would cover a whole top-level domain')
    return host


def _former_address(host: str, text: str) -> str:
    try:
        if "/" in host:
            network = ip_network(host, strict=True)
            if network.num_addresses > 1:
                return str(network)
            address = network.network_address  # it was not held to what an address is, and not read again
        else:
            address = ip_address(host)
    except ValueError:
        why = "is not an address or a network"
        if "/" in host:
            why += " (its host bits must be zero)"
        raise ValueError(f'"{shown(text)}" {why}') from None
    if isinstance(address, IPv6Address) and (address.scope_id or address.ipv4_mapped):
        raise ValueError(f'"{shown(text)}": write the plain address')
    return str(address)


def former_normal_name(text: str) -> str | None:
    name = text.lower().removesuffix(".")
    if not name or len(name) > 253 or not name.isascii():
        return None
    labels = name.split(".")
    if not all(map(LABEL.fullmatch, labels)) or labels[-1].isdigit():
        return None
    return name


def former_broker_parser(host: str) -> tuple[str, object]:
    """Kind and value, as the broker read an effective policy."""
    try:
        return "network", ip_network(host.strip("[]"))
    except ValueError:
        pass
    if host.startswith("*."):
        suffix = former_normal_name(host[2:])
        if suffix is not None:
            return "suffix", f".{suffix}"
    elif (name := former_normal_name(host)) is not None:
        return "name", name
    raise ValueError(host)


def _as_network(host: str) -> IPv4Network | IPv6Network | None:
    if not (":" in host or "/" in host or host.replace(".", "").isdigit()):
        return None
    return ip_network(host)


def former_meet_covers(outer: str, inner: str) -> bool:
    """Cover between two canonical spellings, as the meet decided it."""
    if outer == inner:
        return True
    one, other = _as_network(outer), _as_network(inner)
    if one is not None and other is not None:
        return one.version == other.version and other.subnet_of(one)  # type: ignore[arg-type]  # of one version
    return outer.startswith("*.") and other is None and inner.removeprefix("*").endswith(outer[1:])


def former_wholly_blocked(network: IPv4Network | IPv6Network) -> str | None:
    listed = [item for item in BLOCKED[network.version] if item.version == 4 or item.subnet_of(OPEN6)]  # type: ignore[arg-type]
    for blocked in listed:
        if network.subnet_of(blocked):  # type: ignore[arg-type]  # of one version
            return str(blocked)
    if isinstance(network, IPv6Network) and not network.overlaps(OPEN6):
        return f"everything outside {OPEN6}"
    return None


GOOD = ["a", "b", "x", "a-b", "_srv", "xn--c-7tb", "com", "example"]
BAD = ["-a", "a-", "0x7f", "127", "1", "ä", "", "*", "A", "a b"]
good_names = st.lists(st.sampled_from(GOOD), min_size=1, max_size=5).map(".".join)
good_wildcards = st.lists(st.sampled_from(GOOD), min_size=2, max_size=4).map(lambda labels: f"*.{'.'.join(labels)}")
names = st.lists(st.sampled_from(GOOD + BAD), min_size=1, max_size=5).map(".".join)
wildcards = names.map(lambda name: f"*.{name}")
networks = st.one_of(
    st.builds(
        lambda a, p: f"{ipaddress.ip_network((int(a), p), strict=False)}", st.ip_addresses(v=4), st.integers(0, 32)
    ),
    st.builds(
        lambda a, p: f"{ipaddress.IPv6Network((int(a), p), strict=False)}", st.ip_addresses(v=6), st.integers(0, 128)
    ),
)
addresses = st.ip_addresses().map(str)
decorated = st.builds(
    lambda text, before, after: f"{before}{text}{after}",
    st.one_of(names, wildcards, networks, addresses),
    st.sampled_from(["", "", " ", "https://", "[", "::ffff:"]),
    st.sampled_from(["", "", ".", " ", "/8", "%eth0", ":443", "]"]),
)
texts = st.one_of(decorated, decorated.map(str.upper), st.text())
plain_addresses = st.one_of(st.ip_addresses(v=4), st.integers(1 << 64, (1 << 128) - 1).map(IPv6Address)).map(str)
_MAPPED = ip_network("::ffff:0:0/96")
_plain_networks = networks.filter(lambda text: not (text.endswith("/128") and ip_network(text).subnet_of(_MAPPED)))
good = st.one_of(good_names, good_wildcards, _plain_networks, plain_addresses).map(former_manifest_parser)
nested = st.one_of(
    st.builds(lambda wide, name: (wide, f"{name}{wide[1:]}"), good_wildcards, good_names),
    st.builds(lambda wide, name: (wide, f"*.{name}{wide[1:]}"), good_wildcards, good_names),
    st.builds(lambda address, p: (str(ip_network((int(address), p), strict=False)), str(address)),
              st.ip_addresses(v=4), st.integers(0, 32)),
)  # fmt: skip
"""Pairs of which the first covers the second."""


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(texts)
@example("::ffff:0:0/128")
@example("fe80::1%eth0/128")
def test_parser_accepts_spells_and_refuses_as_the_manifests_did(text: str) -> None:
    try:
        expected = former_manifest_parser(text)
    except ValueError as refusal:
        with pytest.raises(ValueError) as found:
            parse_host(text)
        assert str(found.value) == str(refusal)
    else:
        assert str(parse_host(text)) == expected
        assert parse_host(expected) == parse_host(text)


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(good)
def test_parser_means_what_the_brokers_did(text: str) -> None:
    host = parse_host(text)
    kind, value = former_broker_parser(text)
    match host:
        case Name(name):
            assert (kind, value) == ("name", name)
        case Wildcard(suffix):
            assert (kind, value) == ("suffix", suffix)
        case Network(network):
            assert (kind, value) == ("network", network)


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.one_of(st.tuples(good, good), nested))
def test_cover_is_the_same_for_the_meet_and_for_the_broker(pair: tuple[str, str]) -> None:
    outer, inner = map(former_manifest_parser, pair)
    one, other = parse_host(outer), parse_host(inner)
    assert one.covers(other) is former_meet_covers(outer, inner)
    rules = Rules(NetworkPolicy(mode="listed", egress=(EgressRule(host=outer, ports=(443,)),)))
    if isinstance(other, Name):
        assert bool(rules.name_ports(inner)) is former_meet_covers(outer, inner)
    elif isinstance(other, Network) and other.network.num_addresses == 1:
        address = other.network.network_address
        allowed = former_meet_covers(outer, inner) and not rules.blocked(address, 443)
        assert rules.literal(address, 443).allowed is allowed


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.one_of(texts, names))
def test_normal_form_of_a_name_is_the_former_one(text: str) -> None:
    assert normal_name(text) == former_normal_name(text)


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(networks)
def test_network_that_is_blocked_as_a_whole_is_named_as_before(text: str) -> None:
    assert wholly_blocked(ip_network(text)) == former_wholly_blocked(ip_network(text))
