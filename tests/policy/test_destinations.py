"""Destinations: names and wildcards, the always-blocked list against Python's own ipaddress, ranges of the ruleset."""

from __future__ import annotations

import ipaddress
import re
from ipaddress import IPv4Address, IPv6Address, ip_address

import pytest
from hypothesis import given
from hypothesis import strategies as st

from isolator.broker.virtual import KEEP, VirtualPool
from isolator.errors import UsageError
from isolator.layers.network.layer import Network
from isolator.policy.addresses import BLOCKED, always_blocked, spellings
from isolator.policy.destinations import Rules, never_reachable, normal_name, parse_destination, parse_virtual
from isolator.policy.host import HostConfig
from isolator.policy.meet.effective import meet
from isolator.policy.model import AddressException, EgressRule, NetworkPolicy
from isolator.policy.parse.host_file import parse_host_config
from tests.broker.conftest import listed
from tests.policy.samples import asking


# Addresses near the borders of blocks are the interesting ones; uniform ones almost never meet a /24.
def borders(version: int) -> list[int]:
    """Addresses at and beside the first and the last of each blocked network."""
    near = [int(n[i]) + d for n in BLOCKED[version] for i in (0, -1) for d in (-1, 0, 1)]
    return [number for number in near if 0 <= number < 1 << (32 if version == 4 else 128)]


v4 = st.one_of(st.sampled_from(borders(4)), st.integers(0, (1 << 32) - 1)).map(IPv4Address)
v6 = st.one_of(
    st.sampled_from(borders(6)),
    st.integers(0, (1 << 128) - 1),
    st.integers(0x2000 << 112, (0x4000 << 112) - 1),
).map(IPv6Address)


@given(v4)
def test_no_ipv4_address_that_python_calls_private_is_open(address: IPv4Address) -> None:
    ours = always_blocked(address)
    theirs = not address.is_global or address.is_multicast
    if address in ipaddress.ip_network("192.0.0.0/24"):
        assert ours  # Python opens two anycast addresses in it
    elif address in ipaddress.ip_network("192.88.99.0/24") or address == ip_address("168.63.129.16"):
        assert ours  # ours alone
    else:
        assert ours == theirs


@given(v6)
def test_no_ipv6_address_that_python_calls_private_is_open(address: IPv6Address) -> None:
    if address.ipv4_mapped is not None or address in ipaddress.ip_network("64:ff9b::/96"):
        return
    if not always_blocked(address):
        assert address.is_global
        assert address in ipaddress.ip_network("2000::/3")


@given(v4)
def test_every_ipv6_spelling_of_a_blocked_ipv4_address_is_blocked(address: IPv4Address) -> None:
    if not always_blocked(address):
        return
    number = int(address)
    mapped = IPv6Address(0xFFFF << 32 | number)
    nat64 = IPv6Address(0x64FF9B << 96 | number)
    six_to_four = IPv6Address(0x2002 << 112 | number << 80)
    compatible = IPv6Address(number)
    for spelling in (mapped, nat64, six_to_four, compatible):
        assert always_blocked(spelling), spelling
    for spelling in (mapped, nat64, six_to_four):
        assert address in spellings(spelling)


@given(v4, st.sampled_from([80, 443, 5432]))
def test_ipv4_ranges_of_the_ruleset_agree_with_the_check(address: IPv4Address, port: int) -> None:
    policy = NetworkPolicy(
        mode="public",
        exceptions=(AddressException(cidr="10.9.9.0/24", port=443), AddressException(cidr="198.18.1.0/24", port=80)),
    )
    rules = Rules(policy)
    number = int(address)
    in_ranges = any(
        port in ports and any(a <= number <= b for a, b in ranges) for ports, ranges in rules.literal_ranges(4)
    )
    assert in_ranges == (rules.literal(address, port).allowed and address not in rules.virtual)


@given(v6, st.sampled_from([80, 443]))
def test_ipv6_ranges_of_the_ruleset_never_exceed_the_check(address: IPv6Address, port: int) -> None:
    rules = Rules(NetworkPolicy(mode="public"))
    number = int(address)
    if any(port in ports and any(a <= number <= b for a, b in ranges) for ports, ranges in rules.literal_ranges(6)):
        assert rules.literal(address, port).allowed


def test_an_exception_opens_exactly_its_addresses_and_its_port() -> None:
    rules = Rules(NetworkPolicy(mode="public", exceptions=(AddressException(cidr="10.9.9.0/30", port=443),)))
    assert rules.literal(ip_address("10.9.9.3"), 443).allowed
    assert not rules.literal(ip_address("10.9.9.4"), 443).allowed
    assert not rules.literal(ip_address("10.9.9.3"), 80).allowed
    assert not rules.blocked(ip_address("::ffff:10.9.9.1"), 443)


def test_an_exception_grants_nothing_by_itself() -> None:
    rules = Rules(listed("hooks.example.com:443", exceptions=(AddressException(cidr="10.9.9.0/30", port=443),)))
    assert not rules.literal(ip_address("10.9.9.3"), 443).allowed
    assert rules.literal_ranges(4) == []


def test_a_grant_of_a_blocked_network_opens_nothing() -> None:
    rules = Rules(listed("10.0.0.0/8:443", "0.0.0.0/0:443"))
    assert not rules.literal(ip_address("10.1.1.1"), 443).allowed
    assert rules.literal(ip_address("1.1.1.1"), 443).allowed
    assert not any(a <= int(ip_address("10.1.1.1")) <= b for _, ranges in rules.literal_ranges(4) for a, b in ranges)


@pytest.mark.parametrize(
    ("name", "granted"),
    [
        ("example.com", False),
        ("a.example.com", True),
        ("a.b.example.com", True),
        ("evilexample.com", False),
        ("a.example.com.evil.net", False),
        ("aexample.com", False),
    ],
)
def test_a_wildcard_stands_for_whole_labels(name: str, granted: bool) -> None:
    assert bool(Rules(listed("*.example.com:443")).name_ports(name)) is granted


@pytest.mark.parametrize(
    "text",
    ["", ".", "a..b", "-a.com", "a-.com", "a" * 64 + ".com", "1.2.3.4", "127.1", "0x7f.1", "a b.com", "ä.de",
     "a/b.com", "a.com\n", "a.com\0", "*.a.com", ".".join(["a" * 60] * 5)],
)  # fmt: skip
def test_text_that_is_no_host_name_has_no_normal_form(text: str) -> None:
    assert normal_name(text) is None


def test_name_has_one_normal_form() -> None:
    assert normal_name("Hooks.EXAMPLE.com.") == "hooks.example.com"
    assert normal_name("_srv.a-b.xn--bcher-kva.example") == "_srv.a-b.xn--bcher-kva.example"


@pytest.mark.parametrize("host", ["", "*", "*.", "a*.b.com", "10.0.0.1/8", "http://a.com", "a.com:443", "a.*.com",
                                  "*.0.0.1", "*.com", "::ffff:1.2.3.4"])  # fmt: skip
def test_egress_rule_that_makes_no_sense_is_refused(host: str) -> None:
    with pytest.raises(UsageError):
        parse_destination(host, (443,))


def test_ports_of_a_destination_are_between_1_and_65535() -> None:
    for ports in ((), (0,), (65536,)):
        with pytest.raises(UsageError):
            parse_destination("a.com", ports)


@given(st.text())
def test_normal_name_is_its_own_normal_form(text: str) -> None:
    name = normal_name(text)
    assert name is None or (normal_name(name) == name and len(name) <= 253)


class _Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def test_exact_names_have_the_same_virtual_address_in_every_broker() -> None:
    rules = Rules(listed("a.com:443", "b.com:443,8443", "*.c.com:22"))
    one, two = VirtualPool(rules, _Clock()), VirtualPool(rules, _Clock())
    assert one.lookup("a.com") == two.lookup("a.com")
    assert one.lookup("b.com") == two.lookup("b.com")
    address = one.lookup("a.com")
    assert address is not None
    entry = one.entry(address)
    assert entry is not None and entry.name == "a.com"


def test_a_virtual_address_lies_in_the_group_of_its_ports() -> None:
    rules = Rules(listed("a.com:443", "b.com:443,8443", "*.c.com:22"))
    pool = VirtualPool(rules, _Clock())
    for name in ("a.com", "b.com", "x.c.com"):
        address = pool.lookup(name)
        group = next(group for group in rules.virtual_groups if address in group.network)
        assert group.ports == rules.name_ports(name)


def test_virtual_pool_is_bounded_and_keeps_addresses_in_use() -> None:
    clock = _Clock()
    pool = VirtualPool(Rules(NetworkPolicy(mode="public")), clock, capacity=3)
    first = [pool.lookup(f"n{i}.com") for i in range(3)]
    assert len(set(first)) == 3
    assert pool.lookup("n3.com") is None  # all were answered a moment ago
    clock.now = KEEP + 1
    used = pool.entry(first[0]) if first[0] else None
    assert used is not None
    used.flows = 1
    assert pool.lookup("n3.com") is not None
    assert first[0] is not None and pool.entry(first[0]) is used
    assert pool.lookup("n0.com") == first[0]
    assert first[1] is not None and pool.entry(first[1]) is None
    assert len(pool) == 3


@given(st.lists(st.integers(0, 5000), max_size=300))
def test_no_two_names_ever_share_a_virtual_address(names: list[int]) -> None:
    rules = Rules(NetworkPolicy(mode="public"))
    pool = VirtualPool(rules, _Clock(), capacity=100)
    seen: dict[object, str] = {}
    for number in names:
        name = f"n{number}.com"
        address = pool.lookup(name)
        if address is not None:
            assert seen.setdefault(address, name) == name
            assert address in rules.virtual


@pytest.mark.parametrize("text", ["198.18.0.0/15", "11.8.0.0/15", "10.64.0.0/16", "25.0.0.0/8", "44.128.16.0/20"])
def test_range_for_names_is_the_operators_choice(text: str) -> None:
    assert parse_virtual(text) == text
    rules = Rules(NetworkPolicy(mode="public", virtual=text))
    assert {group.network.subnet_of(rules.virtual) for group in rules.virtual_groups} == {True}
    pool = VirtualPool(rules, _Clock())
    assert pool.lookup("a.example.com") in rules.virtual
    first = rules.virtual[1]
    assert not any(a <= int(first) <= b for _, ranges in rules.literal_ranges(4) for a, b in ranges)


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("198.18.0.0", "must be a /8 to /20"),
        ("198.18.0.0/24", "must be a /8 to /20"),
        ("8.0.0.0/7", "must be a /8 to /20"),
        ("198.18.0.1/15", "host bits must be zero"),
        ("2001:db8::/32", "not an IPv4 network"),
        ("names", "not an IPv4 network"),
        ("127.0.0.0/16", "lies in 127.0.0.0/8"),
        ("192.0.0.0/8", "lies in 192.0.0.0/24"),
        ("169.254.0.0/16", "lies in 169.254.0.0/16"),
        ("240.0.0.0/8", "lies in 224.0.0.0/3"),
    ],
)
def test_range_that_cannot_stand_for_names_is_refused(text: str, why: str) -> None:
    with pytest.raises(ValueError, match=re.escape(why)):
        parse_virtual(text)


def test_address_within_the_range_for_names_is_never_granted() -> None:
    inside = EgressRule(host="11.8.7.7", ports=(443,))
    assert never_reachable(inside, ()) is None
    assert never_reachable(inside, (), "11.8.0.0/15") == "11.8.0.0/15, which stands for names in cages"
    host = parse_host_config(b"[network]\nvirtual = '11.8.0.0/15'\n", source="host.toml")
    proposal = meet(asking(network={"egress": ["11.8.7.7:443", "hooks.slack.com:443"]}), None, host)
    assert [line.verdict for line in proposal.lines if line.field == "egress"] == ["refused", "granted"]
    assert proposal.effective.network.virtual == "11.8.0.0/15"
    assert [rule.host for rule in proposal.effective.network.egress] == ["hooks.slack.com"]


def test_exception_within_the_range_for_names_is_refused_at_its_line() -> None:
    with pytest.raises(UsageError, match=r"host.toml:2: network.exceptions: 198.18.7.0/24 lies in 198.18.0.0/15"):
        parse_host_config(b"[network]\nexceptions = ['198.18.7.0/24:443']\n", source="host.toml")
    moved = b"[network]\nexceptions = ['198.18.7.0/24:443']\nvirtual = '11.8.0.0/15'\n"
    assert parse_host_config(moved, source="host.toml").exceptions[0].cidr == "198.18.7.0/24"


def test_guards_of_python_take_the_default_for_private_and_the_advised_range_for_public() -> None:
    """The table of docs/egress.md has more of them, measured once."""
    assert not Rules(NetworkPolicy(mode="public")).virtual[5].is_global
    assert Rules(NetworkPolicy(mode="public", virtual="11.8.0.0/15")).virtual[5].is_global


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("proxy = 'proxy.example.com'", "has no port"),
        ("proxy = 'https://proxy.example.com:3128'", "is a URL"),
        ("proxy = 'proxy:3128'", "write the name with its domain"),
        ("proxy = '*.example.com:3128'", "is not one HOST:PORT"),
        ("proxy = '10.0.0.0/24:3128'", "is not one HOST:PORT"),
        ("proxy = 'p.example.com:3128,3129'", "is not one HOST:PORT"),
        ("proxy_resolves = true", "there is no proxy; name it"),
    ],
)
def test_proxy_that_is_none_is_refused_at_its_line(text: str, why: str) -> None:
    with pytest.raises(UsageError, match=re.escape(why)) as caught:
        parse_host_config(f"[network]\n{text}\n".encode(), source="host.toml")
    assert str(caught.value).startswith("host.toml:2: network.proxy")


def test_policy_goes_through_the_proxy_and_explain_says_what_that_gives_up() -> None:
    core = asking(network={"egress": ["hooks.slack.com:443"]})
    plain = b"[network]\nproxy = 'http://10.0.0.8:3128/'\n"
    checked = parse_host_config(plain, source="host.toml")
    left = parse_host_config(plain + b"proxy_resolves = true\n", source="host.toml")
    texts = []
    for host in (HostConfig(), checked, left):
        policy = meet(core, None, host).effective
        assert policy.network.proxy == host.proxy
        texts.append(Network.describe(policy))
    assert "proxy" not in texts[0]
    assert "never private, local or metadata addresses. All of it goes through the proxy 10.0.0.8:3128" in texts[1]
    assert "which looks granted names up itself: whether they lead inside is the proxy's to check" in texts[2]
    assert (len(HostConfig().notes()), len(checked.notes()), len(left.notes())) == (0, 1, 2)
    none = meet(asking(network={"egress": []}), None, left).effective.network
    assert (none.mode, none.proxy, none.proxy_resolves) == ("none", "", False)
