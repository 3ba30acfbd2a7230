"""The cage's name server: answers, refusals, hostile questions, upstream errors."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import struct
import sys
from collections.abc import Callable
from ipaddress import IPv4Address, IPv4Network
from pathlib import Path

import dns.flags
import dns.message
import dns.rcode
import dns.rdatatype
import dns.rrset
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from isolator.broker import wire
from isolator.broker.dns import READ_TOGETHER, Answers, NameServer
from isolator.broker.resolver import HostResolvers, ResolveError, Resolver, Server
from isolator.broker.virtual import VirtualPool
from isolator.linux import netns
from isolator.policy.addresses import parse_address
from isolator.policy.destinations import Rules
from isolator.policy.model import VIRTUAL, NetworkPolicy
from tests.broker.conftest import MakeCage, listed
from tests.support.internet_servers import OTHER, WEB, Dns, run_in
from tests.support.pretend_internet import BrokerProcess, CageNet, PretendInternet
from tests.support.timeouts import seconds


@pytest.fixture
async def upstream() -> Dns:
    """A name server on loopback, in this process."""
    while True:
        udp, tcp = socket.socket(socket.AF_INET, socket.SOCK_DGRAM), socket.socket()
        udp.bind(("127.0.0.1", 0))
        with contextlib.suppress(OSError):  # that number is somebody else's for TCP
            tcp.bind(("127.0.0.1", udp.getsockname()[1]))
            tcp.listen()
            break
        udp.close()
        tcp.close()
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


Seen = list[tuple[str | int, ...]]


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
    assert IPv4Address(reply.answer[0][0].to_text()) in IPv4Network(VIRTUAL)
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


async def test_question_whose_answer_is_not_waited_for_is_on_record(upstream: Dns) -> None:
    """The cage has ended, or left its connection: the name has reached the server all the same."""
    upstream.silent = {"A", "AAAA"}
    server, seen = name_server(listed("*.a.com:443"), upstream)
    asking = asyncio.create_task(ask(server, "secret.a.com"))
    async with asyncio.timeout(seconds(10)):
        while not upstream.queries:  # noqa: ASYNC110 # it is another thread's
            await asyncio.sleep(0.01)
    asking.cancel()
    await asyncio.wait({asking})
    assert seen == [("secret.a.com", "A", "failed", "upstream")]


async def test_the_rate_of_questions_is_capped(upstream: Dns, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("isolator.broker.dns.QUERIES_PER_SECOND", 1e-6)
    server, seen = name_server(listed("a.com:443"), upstream)
    codes = [(await ask(server, f"n{i}.com")).rcode() for i in range(150)]
    assert codes[:100] == [dns.rcode.NXDOMAIN] * 100
    assert codes.count(dns.rcode.REFUSED) == 50
    assert ("", "", "denied", "dns-rate", 1) in seen


async def test_flood_beyond_the_rate_is_refused_without_a_task_and_a_record_for_each(upstream: Dns) -> None:
    answers, seen = name_server(listed("a.com:443"), upstream)
    while answers.within_rate():
        pass
    udp = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    udp.bind(("127.0.0.1", 0))
    server = NameServer(answers, udp, socket.create_server(("127.0.0.1", 0)))
    loop = asyncio.get_running_loop()
    try:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as client:
            client.connect(udp.getsockname())
            client.setblocking(False)
            tasks = asyncio.all_tasks()
            for number in range(READ_TOGETHER):
                client.send(dns.message.make_query("a.com", "A", id=number).to_wire())
            async with asyncio.timeout(seconds(10)):
                replies = [dns.message.from_wire(await loop.sock_recv(client, 512)) for _ in range(READ_TOGETHER)]
            assert {(one.id, one.rcode()) for one in replies} == {(n, dns.rcode.REFUSED) for n in range(READ_TOGETHER)}
            assert not server._tasks and asyncio.all_tasks() == tasks
            assert seen == [("", "", "denied", "dns-rate", READ_TOGETHER)]
    finally:
        await server.close()


async def test_a_truncated_answer_is_fetched_again_by_tcp(upstream: Dns) -> None:
    upstream.truncate = True
    answer = await resolver(upstream).resolve("a.com")
    assert [str(address) for address in answer.addresses] == [WEB]


async def test_a_silent_server_is_left_for_the_next(upstream: Dns, monkeypatch: pytest.MonkeyPatch) -> None:
    silent = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    silent.bind(("127.0.0.1", 0))
    port = silent.getsockname()[1]
    good = upstream._udp.getsockname()[1]
    both = Resolver((f"127.0.0.1:{port}", f"127.0.0.1:{good}"), HostResolvers())
    monkeypatch.setattr("isolator.broker.resolver.TIMEOUT", 3600.0)
    async with asyncio.timeout(seconds(20)):
        assert (await both.resolve("a.com")).exists
    monkeypatch.setattr("isolator.broker.resolver.TIMEOUT", 0.2)
    with pytest.raises(ResolveError):
        await Resolver((f"127.0.0.1:{port}",), HostResolvers()).resolve("a.com")
    silent.close()


@pytest.mark.parametrize("kind", ["A", "AAAA"])
async def test_family_that_is_not_answered_is_not_waited_for(
    upstream: Dns, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    monkeypatch.setattr("isolator.broker.resolver.TIMEOUT", 3600.0)
    upstream.silent = {kind}
    async with asyncio.timeout(seconds(20)):
        answer = await resolver(upstream).resolve("a.com" if kind == "AAAA" else "v6.a.com")
    assert [str(address) for address in answer.addresses] == [WEB if kind == "AAAA" else "2606::1"]


def reply_to(query: bytes, *addresses: str, name: str = "") -> dns.message.Message:
    """A response with these ``A`` records, to another question if ``name`` is given."""
    asked = dns.message.from_wire(query)
    reply = dns.message.make_response(dns.message.make_query(name, "A") if name else asked)
    reply.id = asked.id
    if addresses and reply.question[0].rdtype == dns.rdatatype.A:
        reply.answer.append(dns.rrset.from_text(reply.question[0].name, 60, "IN", "A", *addresses))
    return reply


def forged(query: bytes, by: str) -> bytes:
    """A response that names OTHER, and is not the one to ``query``."""
    if by == "question":
        return reply_to(query, OTHER, name="b.a.com").to_wire()
    reply = reply_to(query, OTHER)
    reply.id ^= 1 if by == "id" else 0
    reply.flags ^= dns.flags.QR if by == "direction" else 0
    return reply.to_wire()


@pytest.mark.parametrize("by", ["id", "question", "direction"])
async def test_answer_with_another_id_or_question_is_not_taken(upstream: Dns, by: str) -> None:
    upstream.crafted = lambda query, _: [forged(query, by), reply_to(query, WEB).to_wire()]
    answer = await resolver(upstream).resolve("a.com")
    assert [str(address) for address in answer.addresses] == [WEB]


@pytest.mark.parametrize("by", ["id", "question", "direction"])
async def test_answer_over_tcp_with_another_id_or_question_is_not_taken(
    upstream: Dns, by: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def crafted(query: bytes, stream: bool) -> list[bytes]:
        if stream:
            return [forged(query, by)]
        cut = reply_to(query)
        cut.flags |= dns.flags.TC
        return [cut.to_wire()]

    upstream.crafted = crafted
    with pytest.raises(ResolveError):
        await resolver(upstream).resolve("a.com")


def calls(work: Callable[[], object]) -> int:
    """The number of function calls that some work makes, in Python and in C: its cost, whatever the machine does."""
    count = 0

    def seen(_: object, event: str, __: object) -> None:
        nonlocal count
        count += event in {"call", "c_call"}

    sys.setprofile(seen)
    try:
        work()
    finally:
        sys.setprofile(None)
    return count


def question(labels: int) -> bytes:
    return b"\x12\x34\x01\0\0\x01\0\0\0\0\0\0" + b"\x01a" * labels + b"\0\0\x01\0\x01"


async def test_work_for_a_question_grows_no_faster_than_its_labels(upstream: Dns) -> None:
    server, _ = name_server(listed("a.com:443"), upstream)

    def once(labels: int) -> None:
        with contextlib.suppress(StopIteration):
            server.answer(question(labels)).send(None)

    def cost(labels: int) -> int:
        once(labels)  # imports and caches do not count
        return calls(lambda: once(labels))

    assert cost(120) - cost(60) <= (cost(60) - cost(4)) * 2
    assert cost(120) < 2000


def heavy(query: bytes) -> bytes:
    """64 KiB of addresses whose owners are one name of 127 labels, by pointers."""
    end = query.index(b"\0", 12) + 5
    labels = b"\x01a" * 126
    records = b"\xc0" + bytes((end,)) + b"\0\x01\0\x01\0\0\0\x3c\0\x04\x01\x02\x03\x04"
    first = labels + b"\0" + records[2:]
    count = (65_000 - end - len(first)) // len(records)
    head = query[:2] + b"\x81\x80\0\x01" + struct.pack("!H", count + 1) + b"\0\0\0\0"
    return head + query[12:end] + first + records * count


async def test_answer_of_64_kib_costs_no_more_than_a_large_honest_one(upstream: Dns) -> None:
    asked = wire.query(7, "a.com", wire.A)
    honest = dns.message.from_wire(asked)
    full = dns.message.make_response(honest)
    full.answer.append(dns.rrset.from_text("a.com.", 60, "IN", "A", *(f"1.2.3.{i}" for i in range(128))))
    large = full.to_wire(max_size=65535)
    assert len(wire.read_reply(large, asked, wire.A).addresses["a.com"]) == 128

    def read() -> None:
        with contextlib.suppress(wire.Broken):
            wire.read_reply(heavy(asked), asked, wire.A)

    assert calls(read) < 4 * calls(lambda: wire.read_reply(large, asked, wire.A))


async def test_lookups_end_when_reading_their_answers_has_cost_too_much(
    upstream: Dns, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("isolator.broker.resolver.CPU_PER_SECOND", 1e-9)
    monkeypatch.setattr("isolator.broker.resolver.CPU_BURST", 1e-9)
    server, seen = name_server(listed("*.a.com:443"), upstream)
    assert (await ask(server, "b.a.com")).answer
    assert (await ask(server, "pool.a.com")).rcode() == dns.rcode.SERVFAIL
    assert seen[-1][2:4] == ("failed", "dns-busy")
    assert "pool.a.com" not in upstream.queries
    assert (await ask(server, "b.a.com")).answer  # what is known stays


async def test_questions_to_servers_have_a_pace(upstream: Dns, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("isolator.broker.resolver.ASKED_PER_SECOND", 1e-6)
    monkeypatch.setattr("isolator.broker.resolver.ASKED_AT_ONCE", 4)  # both families of two names
    asking = resolver(upstream)
    for name in ("a.com", "b.a.com"):
        assert (await asking.resolve(name)).addresses
    waiting = asyncio.create_task(asking.resolve("pool.a.com"))
    assert (await resolver(upstream).resolve("pool.b.com")).exists is False, "another cage's questions wait for nobody"
    assert not waiting.done() and "pool.a.com" not in upstream.queries
    assert (await asking.resolve("a.com")).addresses  # what is known is there at once
    waiting.cancel()
    await asyncio.gather(waiting, return_exceptions=True)
    await asking.close()


def test_question_over_the_rate_is_refused_unread() -> None:
    deep = dns.message.make_query(".".join("abcdefgh" * 15), "A").to_wire()
    short = dns.message.make_query("a.com", "A").to_wire()
    for message in (deep, short):
        refused = wire.refusal(message)
        assert refused is not None
        reply = dns.message.from_wire(refused)
        assert (reply.id, reply.rcode()) == (dns.message.from_wire(message).id, dns.rcode.REFUSED)
        assert reply.question == dns.message.from_wire(message).question
    assert calls(lambda: wire.refusal(deep)) == calls(lambda: wire.refusal(short))
    for broken in (b"", short[:11], short[:-3], b"\0" * 12, b"\x12\x34\x81" + short[3:]):
        assert wire.refusal(broken) is None


async def test_every_question_of_a_burst_is_on_record_by_name(cages: MakeCage, broker: BrokerProcess) -> None:
    cage = await cages(listed("hooks.example.com:443"))
    await cage.client("for i in range(95): attempt(socket.gethostbyname, f'n{i}.example.com')")
    await broker.detach("r1")
    asked = {r["data"].get("name") for r in broker.records if r["type"] == "net.query"}
    assert asked == {f"n{i}.example.com" for i in range(95)}


@pytest.mark.parametrize(
    ("message", "found"),
    [
        (b"\0", ("", "", "denied", "dns-form")),
        (b"\x12\x34\x01\0\0\x02\0\0\0\0\0\0", ("", "", "denied", "dns-form")),
        (dns.message.make_query("version.bind", "TXT", rdclass="CH").to_wire(),
         ("version.bind", "TXT", "denied", "dns-form")),
        (b"\x12\x34\x29" + dns.message.make_query("a.com", "A").to_wire()[3:], ("a.com", "A", "denied", "dns-form")),
        (dns.message.make_response(dns.message.make_query("a.com", "A")).to_wire(), ("", "", "denied", "dns-form")),
    ],
    ids=["one byte", "two questions", "other class", "other operation", "answer"],
)  # fmt: skip
async def test_message_that_is_no_question_for_an_address_is_on_record(
    upstream: Dns, message: bytes, found: tuple[str, ...]
) -> None:
    server, seen = name_server(listed("a.com:443"), upstream)
    await server.answer(message)
    assert seen == [found]


async def test_flood_of_questions_is_counted_to_the_last(cages: MakeCage, broker: BrokerProcess) -> None:
    cage = await cages(listed("hooks.example.com:443"))
    script = """
s = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
for _ in range(20000):
    s.sendto(b'\\x12\\x34\\x01\\0\\0\\1\\0\\0\\0\\0\\0\\0\\5other\\7example\\3com\\0\\0\\1\\0\\1', ('127.0.0.53', 53))
print('sent')
"""
    assert await cage.client(script) == "sent"
    # The next question is read after every one of the flood.
    assert await cage.client("print(attempt(socket.gethostbyname, 'hooks.example.com')[:3])") in {"198", "gai"}
    await broker.detach("r1")
    counts = [r["data"].get("count", 1) for r in broker.records if r["type"] == "net.query"]
    assert sum(counts) >= 20001


def test_name_server_of_the_host_may_be_link_local(tmp_path: Path) -> None:
    file = tmp_path / "resolv.conf"
    file.write_text("nameserver fe80::1%eth0\nnameserver 2001:db8::1%eth0\nnameserver 1.1.1.1\n")
    first, second = HostResolvers(file).servers()
    assert (str(first.address), first.scope, str(second.address)) == ("fe80::1", "eth0", "1.1.1.1")


async def test_link_local_name_server_of_the_host_is_asked(pretend: PretendInternet) -> None:
    for fd, link, address in ((pretend.internet.fd, "down0", "fe80::53"), (pretend.host_fd, "up0", "fe80::2")):
        run_in(fd, "ip", "-6", "addr", "add", f"{address}/64", "dev", link, "nodad")

    def bound(kind: socket.SocketKind) -> socket.socket:
        sock = socket.socket(socket.AF_INET6, kind)
        sock.bind(("fe80::53", 53, 0, socket.if_nametoindex("down0")))
        if kind == socket.SOCK_STREAM:
            sock.listen()
        return sock

    kinds = (socket.SOCK_DGRAM, socket.SOCK_STREAM)
    sockets = [netns.in_network(pretend.internet.fd, lambda kind=kind: bound(kind)) for kind in kinds]
    server = Dns(*sockets)
    server.records["hooks.example.com"] = [WEB]
    file = pretend.directory / "host-resolv.conf"
    honest = file.read_text()
    file.write_text("nameserver fe80::53%up0\n")
    broker = await BrokerProcess.start(pretend)
    try:
        cage = await CageNet.attach(broker, listed("hooks.example.com:80"))
        try:
            assert "host=hooks" in await cage.client("print(get('http://hooks.example.com/'))")
        finally:
            await cage.detach()
    finally:
        file.write_text(honest)
        await broker.stop()
        for sock in sockets:
            with contextlib.suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)
            sock.close()


async def test_equal_questions_share_a_lookup_and_answers_are_kept(upstream: Dns) -> None:
    one = resolver(upstream)
    await asyncio.gather(*(one.resolve("a.com") for _ in range(20)))
    await one.resolve("a.com")
    assert upstream.queries == ["a.com", "a.com"]  # A and AAAA


async def test_lookup_without_any_resolver_fails_with_a_message_that_says_so(tmp_path: Path) -> None:
    empty = HostResolvers(tmp_path / "missing")
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
        for message in (data, b"\x12\x34\x01\0\0\x01\0\0\0\0\0\0" + data):
            reply = await server.answer(message)
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
