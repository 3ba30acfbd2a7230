"""The cage's name server: answers, refusals, hostile questions, upstream errors."""

from __future__ import annotations

import asyncio
import socket
import struct
from ipaddress import IPv4Address

import dns.flags
import dns.message
import dns.rcode
import dns.rdatatype
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from isolator.broker.dns import Answers
from isolator.broker.resolver import HostResolvers, ResolveError, Resolver, Server
from isolator.broker.virtual import VirtualPool
from isolator.linux import netns
from isolator.policy.addresses import parse_address
from isolator.policy.destinations import VIRTUAL, Rules
from isolator.policy.model import NetworkPolicy
from tests.broker.conftest import MakeCage, listed
from tests.support.internet_servers import OTHER, WEB, Dns
from tests.support.pretend_internet import BrokerProcess, PretendInternet


@pytest.fixture
async def upstream() -> Dns:
    """A name server on loopback, in this process."""
    udp, tcp = socket.socket(socket.AF_INET, socket.SOCK_DGRAM), socket.socket()
    udp.bind(("127.0.0.1", 0))
    tcp.bind(("127.0.0.1", udp.getsockname()[1]))
    tcp.listen()
    server = Dns(udp, tcp)
    server.records.update(
        {
            "a.com": [WEB],
            "b.a.com": [OTHER],
            "v6.a.com": ["2606::1"],
            "loop.a.com": ["pool.a.com"],
            "pool.a.com": ["loop.a.com"],
        }
    )
    return server


def resolver(upstream: Dns) -> Resolver:
    return Resolver((f"127.0.0.1:{upstream._udp.getsockname()[1]}",), HostResolvers())


Seen = list[tuple[str, str, str, str]]


def name_server(policy: NetworkPolicy, upstream: Dns) -> tuple[Answers, Seen]:
    seen: Seen = []
    rules = Rules(policy)
    pool = VirtualPool(rules, asyncio.get_running_loop().time)
    blocked = lambda address, port: "blocked-address" if rules.blocked(address, port) else None  # noqa: E731
    server = Answers(rules, pool, resolver(upstream), blocked, lambda *record: seen.append(record))
    return server, seen


async def ask(server: Answers, name: str, kind: str = "A") -> dns.message.Message:
    wire = await server.answer(dns.message.make_query(name, kind).to_wire())
    assert wire is not None
    return dns.message.from_wire(wire)


async def test_a_granted_name_gets_a_virtual_address_with_a_short_life(upstream: Dns) -> None:
    server, seen = name_server(listed("a.com:443"), upstream)
    reply = await ask(server, "A.com.")
    assert IPv4Address(reply.answer[0][0].to_text()) in VIRTUAL
    assert reply.answer[0].ttl == 30
    assert reply.answer[0].name.to_text() == "A.com."  # as in the question: clients may vary the case
    assert seen == [("a.com", "A", "allowed", "a.com:443")]


async def test_ipv6_is_answered_empty_and_other_types_are_withheld(upstream: Dns) -> None:
    server, seen = name_server(listed("a.com:443"), upstream)
    for kind in ("AAAA", "HTTPS", "SVCB", "TXT", "ANY", "MX", "NULL", "SRV", "CNAME"):
        reply = await ask(server, "a.com", kind)
        assert reply.rcode() == dns.rcode.NOERROR and not reply.answer, kind
    assert {record[2] for record in seen} == {"allowed", "withheld"}
    assert upstream.queries == []


@pytest.mark.parametrize(
    ("name", "rule"),
    [
        ("c.com", "not-granted"),
        ("x.a.com", "not-granted"),
        ("a.com.evil.net", "not-granted"),
        ("34.216.184.93.in-addr.arpa", "not-granted"),
        ("1.2.3.4", "name-form"),
        ("a\\000b.com", "name-form"),
        (".", "name-form"),
        (".".join("abcdefghijklmnopqrstuvwxyz"), "name-form"),
    ],
)
async def test_name_that_is_not_granted_does_not_exist_and_is_not_looked_up(
    upstream: Dns, name: str, rule: str
) -> None:
    server, seen = name_server(listed("a.com:443"), upstream)
    for kind in ("A", "AAAA", "TXT"):
        assert (await ask(server, name, kind)).rcode() == dns.rcode.NXDOMAIN
    assert upstream.queries == []
    assert {record[2:] for record in seen} == {("denied", rule)}


async def test_errors_of_the_upstream_server_come_through(upstream: Dns) -> None:
    server, seen = name_server(listed("*.a.com:443"), upstream)
    assert (await ask(server, "missing.a.com")).rcode() == dns.rcode.NXDOMAIN
    assert (await ask(server, "loop.a.com")).rcode() == dns.rcode.SERVFAIL
    assert seen[-1][2:] == ("failed", "upstream")


async def test_the_rate_of_questions_is_capped(upstream: Dns) -> None:
    server, seen = name_server(listed("a.com:443"), upstream)
    codes = [(await ask(server, f"n{i}.com")).rcode() for i in range(150)]
    assert codes[:100] == [dns.rcode.NXDOMAIN] * 100
    assert codes.count(dns.rcode.REFUSED) >= 30
    assert ("", "", "denied", "dns-rate") in seen


async def test_a_truncated_answer_is_fetched_again_by_tcp(upstream: Dns) -> None:
    upstream.truncate = True
    answer = await resolver(upstream).resolve("a.com")
    assert [str(address) for address in answer.addresses] == [WEB]


async def test_a_silent_server_is_left_for_the_next(upstream: Dns, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("isolator.broker.resolver.TIMEOUT", 0.2)
    silent = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    silent.bind(("127.0.0.1", 0))
    port = silent.getsockname()[1]
    good = upstream._udp.getsockname()[1]
    both = Resolver((f"127.0.0.1:{port}", f"127.0.0.1:{good}"), HostResolvers())
    assert (await both.resolve("a.com")).exists
    with pytest.raises(ResolveError):
        await Resolver((f"127.0.0.1:{port}",), HostResolvers()).resolve("a.com")
    silent.close()


async def test_equal_questions_share_a_lookup_and_answers_are_kept(upstream: Dns) -> None:
    one = resolver(upstream)
    await asyncio.gather(*(one.resolve("a.com") for _ in range(20)))
    await one.resolve("a.com")
    assert upstream.queries == ["a.com", "a.com"]  # A and AAAA


async def test_lookup_without_any_resolver_fails_with_a_message_that_says_so(tmp_path: object) -> None:
    from pathlib import Path

    empty = HostResolvers(Path(str(tmp_path)) / "missing")
    with pytest.raises(ResolveError, match="no resolver"):
        await Resolver((), empty).resolve("a.com")


def test_resolver_is_read_in_each_spelling() -> None:
    assert Server.parse("1.1.1.1") == Server(IPv4Address("1.1.1.1"))
    assert Server.parse("1.1.1.1:5353") == Server(IPv4Address("1.1.1.1"), 5353)
    six = parse_address("2606:4700::1111")
    assert six is not None
    assert Server.parse("2606:4700::1111") == Server(six)
    assert Server.parse("[2606:4700::1111]:54") == Server(six, 54)
    for wrong in ("", "dns.example", "1.1.1.1:x", "1.1.1.1:0", "fe80::1%eth0"):
        assert Server.parse(wrong) is None


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(st.binary(max_size=600))
def test_any_bytes_are_answered_or_ignored(data: bytes) -> None:
    async def once() -> None:
        rules = Rules(NetworkPolicy(mode="none"))
        loop = asyncio.get_running_loop()
        server = Answers(
            rules, VirtualPool(rules, loop.time), Resolver((), HostResolvers()), lambda *_: None, lambda *_: None
        )
        for wire in (data, b"\x12\x34\x01\0\0\x01\0\0\0\0\0\0" + data):
            reply = await server.answer(wire)
            assert reply is None or len(reply) <= 600

    asyncio.run(once())


async def test_name_server_answers_alike_over_udp_and_tcp_inside_a_cage(
    cages: MakeCage, broker: BrokerProcess, pretend: PretendInternet
) -> None:
    cage = await cages(listed("hooks.example.com:443"))
    query = dns.message.make_query("hooks.example.com", "A").to_wire()

    def both() -> tuple[bytes, bytes]:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as udp:
            udp.settimeout(5)
            udp.sendto(query, ("127.0.0.53", 53))
            datagram = udp.recv(600)
        with socket.create_connection(("127.0.0.53", 53), 5) as tcp:
            tcp.sendall(struct.pack("!H", len(query)) + query)
            length = struct.unpack("!H", tcp.recv(2))[0]
            return datagram, tcp.recv(length)

    datagram, stream = await asyncio.to_thread(netns.in_network, cage.network.netns_fd, both)
    assert datagram == stream
    assert dns.message.from_wire(datagram).flags & dns.flags.RA


async def test_hostile_messages_do_not_stop_the_name_server(cages: MakeCage, broker: BrokerProcess) -> None:
    cage = await cages(listed("hooks.example.com:443"))

    def abuse() -> None:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as udp:
            for data in (b"", b"\0", b"\xff" * 512, b"\0" * 12, b"\x12\x34\x01\0\0\x01\0\0\0\0\0\0\xc0\x0c\0\1\0\1"):
                udp.sendto(data, ("127.0.0.53", 53))
        for data in (b"\xff\xff" + b"x" * 1000, b"\0", b"\0\x0c" + b"\0" * 12):
            with socket.create_connection(("127.0.0.53", 53), 5) as tcp:
                tcp.sendall(data)

    await asyncio.to_thread(netns.in_network, cage.network.netns_fd, abuse)
    assert (await cage.client("print(socket.gethostbyname('hooks.example.com'))")).startswith("198.1")


async def test_public_mode_answers_any_public_name(cages: MakeCage, broker: BrokerProcess) -> None:
    cage = await cages(NetworkPolicy(mode="public"))
    script = """
for name in ('hooks.example.com', 'metadata.example.com', 'nowhere.example.com'):
    try:
        print(socket.gethostbyname(name)[:6])
    except socket.gaierror as error:
        print(error.errno == socket.EAI_NONAME)
"""
    assert await cage.client(script) == "198.18\nTrue\nTrue"
    await broker.wait_for("net.query", name="metadata.example.com", verdict="denied", rule="blocked-address")
