"""Each guarantee of the broker, and its ablation: with that one check switched off the same attempt succeeds.

A test that cannot fail proves nothing. Checks in the broker are switched off by starting it through ``weakened.py``,
rules of the kernel by loading the ruleset without them. Where two checks each stop an attempt alone, the test
names both, and each of them alone is shown to be enough.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import re
import socket
import subprocess
import threading
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager

import pytest

from isolator.broker import buffers
from isolator.layers.network import namespace as network
from isolator.layers.network import ruleset
from isolator.linux import netns
from isolator.policy.destinations import Rules
from isolator.policy.model import AddressException, EgressRule, NetworkPolicy
from tests.broker.conftest import listed
from tests.broker.test_guarantees import RAW
from tests.support.internet_servers import GATEWAY, HOST, METADATA, NEIGHBOUR6, OTHER, PRIVATE, WEB, WEB6, run_in
from tests.support.pretend_internet import BrokerProcess, CageNet, PretendInternet, run_client
from tests.support.timeouts import seconds

Ruleset = Callable[[str], str]


@asynccontextmanager
async def cage(
    pretend: PretendInternet, policy: NetworkPolicy, *, off: Sequence[str] = (), change: Ruleset | None = None
) -> AsyncIterator[tuple[CageNet, BrokerProcess]]:
    """A cage and its broker, without the checks in ``off`` and with a ruleset that ``change`` has rewritten."""
    pretend.internet.dns.queries.clear()
    broker = await BrokerProcess.start(pretend, off=off)
    try:
        with pytest.MonkeyPatch.context() as patch:
            if change is not None:
                patch.setattr(network, "_ruleset", lambda policy: change(ruleset.render(Rules(policy))))
            made = await CageNet.attach(broker, policy)
        try:
            yield made, broker
        finally:
            await made.detach()
    finally:
        await broker.stop()


def without(*lines: str) -> Ruleset:
    """Take out every rule that contains one of these; fails when there is none, or the ablation would prove nothing."""

    def change(text: str) -> str:
        for line in lines:
            assert line in text, f"{line!r} is not in the ruleset"
        return "".join(row for row in text.splitlines(keepends=True) if not any(line in row for line in lines))

    return change


def everything_diverted(text: str) -> str:
    """Send all TCP to the broker, whatever the policy may reach."""
    hook = "type nat hook output priority -100; policy accept;"
    assert hook in text
    return text.replace(hook, f"{hook}\n  ip daddr != 127.0.0.0/8 meta l4proto 6 goto admit", 1)


def get(host: str) -> str:
    """Code that asks ``host`` on port 80, and prints the answer's first words or what went wrong."""
    return (
        f"try:\n    print(get('http://{host}/')[:9])\n"
        "except OSError as e:\n    e = getattr(e, 'reason', e)\n"
        "    print('no such name' if isinstance(e, socket.gaierror) else name_of(e))"
    )


# --- where a granted name may lead ---------------------------------------------------------------------------


INSIDE = {
    "metadata.example.com": "blocked",
    "private.example.com": "blocked",
    "mapped.example.com": "blocked",
    "nat64.example.com": "blocked",
    "6to4.example.com": "blocked",
    "evilalias.example.com": "blocked",
    "host.example.com": "host",
    "gateway.example.com": "host",
}


@pytest.mark.parametrize(("name", "check"), INSIDE.items())
async def test_name_that_leads_inside_is_stopped_by_one_check(pretend: PretendInternet, name: str, check: str) -> None:
    reached = f"host={name}"[:9]
    async with cage(pretend, listed("*.example.com:80")) as (caged, _):
        assert await caged.client(get(name)) == "no such name"
    async with cage(pretend, listed("*.example.com:80"), off=[check]) as (caged, _):
        assert await caged.client(get(name)) == reached


async def test_a_name_that_leads_to_the_hosts_loopback_is_stopped_twice(pretend: PretendInternet) -> None:
    policy = listed("loopback.example.com:5432")
    ask = f"{RAW}print(raw('loopback.example.com', 5432, b'select secret'))"
    for off in ([], ["blocked"], ["host"]):
        async with cage(pretend, policy, off=off) as (caged, _):
            with pytest.raises(AssertionError, match="Name or service"):
                await caged.client(ask.replace("except OSError", "except BlockingIOError"))
    async with cage(pretend, policy, off=["blocked", "host"]) as (caged, _):
        assert await caged.client(ask) == "row: secret"


LITERALS = [METADATA, PRIVATE, f"::ffff:{METADATA}", "64:ff9b::a9fe:a9fe", "2002:a9fe:a9fe::1", "fd00::1"]


@pytest.mark.parametrize("address", LITERALS)
async def test_an_address_inside_is_stopped_by_kernel_and_broker(pretend: PretendInternet, address: str) -> None:
    host = f"[{address}]" if ":" in address else address
    ask = get(host)
    change = everything_diverted if ":" not in address or address.startswith("::ffff") else _diverted6
    async with cage(pretend, NetworkPolicy(mode="public")) as (caged, _):
        assert await caged.client(ask) in {"ECONNREFUSED", "ENETUNREACH"}
    async with cage(pretend, NetworkPolicy(mode="public"), change=change) as (caged, _):
        assert await caged.client(ask) in {"ECONNRESET", "RemoteDisconnected"}
    async with cage(pretend, NetworkPolicy(mode="public"), off=["blocked"]) as (caged, _):
        assert await caged.client(ask) in {"ECONNREFUSED", "ENETUNREACH"}
    async with cage(pretend, NetworkPolicy(mode="public"), off=["blocked"], change=change) as (caged, _):
        assert (await caged.client(ask)).startswith("host=")


def _diverted6(text: str) -> str:
    return everything_diverted(text).replace("ip daddr != 127.0.0.0/8 meta", "ip6 daddr != ::1 meta", 1)


@pytest.mark.parametrize("address", [HOST, GATEWAY])
async def test_address_of_the_host_as_written_is_stopped_by_one_check(pretend: PretendInternet, address: str) -> None:
    ask = f"{RAW}print(raw({address!r}, 80, b'GET / HTTP/1.0\\r\\n\\r\\n')[:12])"
    async with cage(pretend, NetworkPolicy(mode="public")) as (caged, _):
        assert await caged.client(ask) == "ECONNRESET"
    async with cage(pretend, NetworkPolicy(mode="public"), off=["host"]) as (caged, _):
        assert await caged.client(ask) == "HTTP/1.1 200"


async def test_neighbour_on_the_hosts_link_is_stopped_unless_it_was_meant(pretend: PretendInternet) -> None:
    """An IPv6 address that is public by its number and at home by its place, and a name that leads there."""
    run_in(pretend.internet.fd, "ip", "-6", "addr", "add", f"{NEIGHBOUR6}/64", "dev", "down0", "nodad")
    pretend.internet.dns.records["near.example.com"] = [NEIGHBOUR6]
    literal = f"{RAW}print(raw({NEIGHBOUR6!r}, 80, b'GET / HTTP/1.0\\r\\n\\r\\n')[:12])"
    name = get("near.example.com")
    meant = AddressException(cidr=f"{NEIGHBOUR6}/128", port=80)
    try:
        async with cage(pretend, NetworkPolicy(mode="public")) as (caged, broker):
            assert await caged.client(literal) == "ECONNRESET"
            await broker.wait_for("net.denied", address=NEIGHBOUR6, rule="neighbour")
            assert await caged.client(name) == "no such name"
            assert (await caged.client(get(f"[{WEB6}]"))).startswith("host=")
        async with cage(pretend, NetworkPolicy(mode="public"), off=["host"]) as (caged, _):
            assert await caged.client(literal) == "HTTP/1.1 200"
            assert (await caged.client(name)).startswith("host=near")
        async with cage(pretend, NetworkPolicy(mode="public", exceptions=(meant,))) as (caged, _):
            assert await caged.client(literal) == "HTTP/1.1 200"
        written = EgressRule(host=NEIGHBOUR6, ports=(80,))
        async with cage(pretend, NetworkPolicy(mode="listed", egress=(written,))) as (caged, _):
            assert await caged.client(literal) == "HTTP/1.1 200"
    finally:
        run_in(pretend.internet.fd, "ip", "-6", "addr", "del", f"{NEIGHBOUR6}/64", "dev", "down0")


async def test_private_address_behind_the_networks_own_nat64_is_stopped_by_one_check(pretend: PretendInternet) -> None:
    private, public = "2a00:64::a9fe:a9fe", "2a00:64::5db8:d822"
    for address in (private, public):
        run_in(pretend.internet.fd, "ip", "-6", "addr", "add", f"{address}/128", "dev", "lo", "nodad")
    records = pretend.internet.dns.records
    records |= {"ipv4only.arpa": ["2a00:64::c000:aa"], "behind.example.com": [private]}
    ask = "{}print(raw({!r}, 80, b'GET / HTTP/1.0\\r\\n\\r\\n')[:12])"
    literal, name = ask.format(RAW, private), ask.format(RAW, "behind.example.com")
    try:
        async with cage(pretend, NetworkPolicy(mode="public")) as (caged, broker):
            assert await caged.client(literal) == "ECONNRESET"
            await broker.wait_for("net.denied", address=private, rule="blocked-address")
            assert await caged.client(ask.format(RAW, public)) == "HTTP/1.1 200"
        async with cage(pretend, listed("behind.example.com:80")) as (caged, _):
            assert await caged.client(name) == "ECONNRESET"
        async with cage(pretend, NetworkPolicy(mode="public"), off=["blocked"]) as (caged, _):
            assert await caged.client(literal) == "HTTP/1.1 200"
    finally:
        del records["ipv4only.arpa"]
        for address in (private, public):
            run_in(pretend.internet.fd, "ip", "-6", "addr", "del", f"{address}/128", "dev", "lo")


async def test_rebinding_is_stopped_by_the_check_at_the_dial(pretend: PretendInternet) -> None:
    pretend.internet.dns.ttl = 0
    try:
        for off, expected in (([], "ECONNRESET"), (["dial"], "host=rebi")):
            answers = itertools.chain([[WEB], [WEB]], itertools.repeat([METADATA]))
            pretend.internet.dns.records["rebind.example.com"] = lambda answers=answers: next(answers)  # type: ignore[misc]
            async with cage(pretend, listed("rebind.example.com:80"), off=off) as (caged, _):
                found = await caged.client(get("rebind.example.com"))
                assert found.replace("RemoteDisconnected", "ECONNRESET") == expected
    finally:
        pretend.internet.dns.ttl = 60


async def test_virtual_address_that_was_never_answered_is_stopped_by_one_check(pretend: PretendInternet) -> None:
    ask = f"{RAW}print(raw('198.18.3.3', 80, b'GET / HTTP/1.0\\r\\nHost: hooks.example.com\\r\\n\\r\\n')[:12])"
    for off, expected in (([], "ECONNRESET"), (["allocated"], "HTTP/1.1 200")):
        async with cage(pretend, listed("hooks.example.com:80"), off=off) as (caged, _):
            assert await caged.client(ask) == expected


# --- what leaves the host ------------------------------------------------------------------------------------


async def test_a_name_that_is_not_granted_never_leaves_the_host(pretend: PretendInternet) -> None:
    ask = get("other.example.com")
    async with cage(pretend, listed("hooks.example.com:80")) as (caged, _):
        assert await caged.client(ask) == "no such name"
        assert pretend.internet.dns.queries == []
    async with cage(pretend, listed("hooks.example.com:80"), off=["granted-names"]) as (caged, _):
        assert await caged.client(ask) == "host=othe"
        assert "other.example.com" in pretend.internet.dns.queries


DNS_QUESTION = r"b'\x12\x34\x01\0\0\1\0\0\0\0\0\0\5other\7example\3com\0\0\1\0\1'"
UDP_QUESTION = f"""
s = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
s.settimeout(3)
try:
    s.sendto({DNS_QUESTION}, ({WEB!r}, 53))
    print(s.recv(500)[:2] == b'\\x12\\x34')
except OSError as e:
    print(name_of(e))
"""


async def test_outside_resolver_over_udp_is_refused_at_once_and_has_no_route(pretend: PretendInternet) -> None:
    async with cage(pretend, NetworkPolicy(mode="public")) as (caged, broker):
        assert await caged.client(UDP_QUESTION) == "EPERM"
        await broker.wait_for("net.denied", rule="protocol-udp", address=WEB, port=53)
    # Without the ruleset there is still no interface: it is not refused any more, but nobody answers.
    async with cage(pretend, NetworkPolicy(mode="public"), change=without("goto refused", "policy drop")) as (caged, _):
        assert await caged.client(UDP_QUESTION) in {"TimeoutError", "ECONNREFUSED"}
        assert pretend.internet.dns.queries == []
    # Without the namespace, on the host itself, the same question is answered.
    assert await run_client(pretend, pretend.host_fd, "host-resolv.conf", UDP_QUESTION) == "True"
    assert "other.example.com" in pretend.internet.dns.queries


OUTSIDE = {
    "tcp": (53, f"raw({WEB!r}, 53, b'\\0\\x23' + {DNS_QUESTION})"),
    "tls": (853, f"tls({WEB!r}, 'dns.example.com', 853)"),
    "https": (443, f"tls({WEB!r}, 'dns.example.com')"),
}


@pytest.mark.parametrize("kind", OUTSIDE)
async def test_outside_resolver_over_tcp_is_stopped_by_kernel_and_broker(pretend: PretendInternet, kind: str) -> None:
    port, attempt = OUTSIDE[kind]
    ask = f"{RAW}{RAW_BYTES}print(len({attempt}) > 12 and not {attempt}.startswith('E'))"
    policy = listed("hooks.example.com:443")
    async with cage(pretend, policy) as (caged, broker):
        assert await caged.client(ask) == "False"
        assert (await broker.wait_for("net.denied", address=WEB, port=port))["rule"] == "not-granted"
    async with cage(pretend, policy, change=everything_diverted) as (caged, _):
        assert await caged.client(ask) == "False"
    async with cage(pretend, policy, off=["granted-literals"]) as (caged, _):
        assert await caged.client(ask) == "False"
    async with cage(pretend, policy, off=["granted-literals"], change=everything_diverted) as (caged, _):
        assert await caged.client(ask) == "True"


RAW_BYTES = """
def raw(host, port, data):
    try:
        with socket.create_connection((host, port), 5) as s:
            s.sendall(data)
            return repr(s.recv(200))
    except OSError as e:
        return name_of(e)
"""


# --- how a connection is used --------------------------------------------------------------------------------

HELLO = """
def hello(*extensions):
    body = b'\\x03\\x03' + bytes(32) + b'\\0' + b'\\0\\2\\x13\\1' + b'\\1\\0'
    block = b''.join(struct.pack('!HH', kind, len(data)) + data for kind, data in extensions)
    body += struct.pack('!H', len(block)) + block
    message = b'\\1' + struct.pack('!I', len(body))[1:] + body
    return b'\\x16\\3\\1' + struct.pack('!H', len(message)) + message
def name(text):
    return (0, struct.pack('!HBH', len(text) + 3, 0, len(text)) + text)
"""
FIRST = [
    ("sni-mismatch", 443, "tls('hooks.example.com', 'other.example.com')"),
    ("no-sni", 443, "tls('hooks.example.com', None)"),
    ("encrypted-hello", 443, "raw('hooks.example.com', 443, hello(name(b'hooks.example.com'), (0xfe0d, b'x' * 40)))"),
    ("not-tls", 443, "raw('hooks.example.com', 443, b'SSH-2.0-x\\r\\n')"),
    ("host-mismatch", 80, "raw('hooks.example.com', 80, b'GET / HTTP/1.1\\r\\nHost: other.example.com\\r\\n\\r\\n')"),
    ("host-mismatch", 80,
     "raw('hooks.example.com', 80, b'GET http://e.net/ HTTP/1.1\\r\\nHost: hooks.example.com\\r\\n\\r\\n')"),
    ("no-host", 80, "raw('hooks.example.com', 80, b'GET / HTTP/1.0\\r\\n\\r\\n')"),
    ("not-http", 80, "raw('hooks.example.com', 80, b'\\x01\\x02\\r\\n\\r\\n')"),
    ("host-mismatch", 8080,
     "raw('hooks.example.com', 8080, b'GET / HTTP/1.1\\r\\nHost: other.example.com\\r\\n\\r\\n')"),
    ("http2", 8080, "raw('hooks.example.com', 8080, b'PRI * HTTP/2.0\\r\\n\\r\\nSM\\r\\n\\r\\n')"),
    ("no-sni", 8080, "raw('hooks.example.com', 8080, b'\\x80\\x2e\\x01\\x03\\x03' + bytes(43))"),
]  # fmt: skip


@pytest.mark.parametrize(("rule", "port", "attempt"), FIRST)
async def test_first_bytes_are_stopped_by_one_objection(
    pretend: PretendInternet, rule: str, port: int, attempt: str
) -> None:
    ask = f"{RAW}{HELLO}print({attempt})"
    policy = listed("hooks.example.com:80,443,8080")
    async with cage(pretend, policy) as (caged, broker):
        assert await caged.client(ask) in {"ECONNRESET", "closed"}
        await broker.wait_for("net.denied", rule=rule, port=port)
    async with cage(pretend, policy, off=[f"first:{rule}"]) as (caged, broker):
        await caged.client(ask)
        # The reply is the server's own affair: it was reached, and the bytes went there.
        closed = await broker.wait_for("net.closed", name="hooks.example.com", port=port)
        assert closed["sent"] > 0
        assert not [r for r in broker.records if r["type"] == "net.denied"]


@pytest.mark.parametrize(
    ("rule", "attempt"),
    [
        ("malformed", "raw('hooks.example.com', 80, b'GET / HTTP/1.1\\r\\n x\\r\\n\\r\\n')"),
        ("malformed", "raw('hooks.example.com', 443, b'\\x16\\3\\1\\0\\x05\\2\\0\\0\\1x')"),
    ],
)
async def test_unreadable_first_bytes_are_not_passed_on(pretend: PretendInternet, rule: str, attempt: str) -> None:
    for off in ([], ["sniff"]):
        async with cage(pretend, listed("hooks.example.com:80,443"), off=off) as (caged, broker):
            await caged.client(f"{RAW}print({attempt})")
            if off:
                assert (await broker.wait_for("net.closed"))["sent"] > 0
            else:
                await broker.wait_for("net.denied", rule=rule)
                assert not [r for r in broker.records if r["type"] == "net.connect"]


TWO_REQUESTS = r"""
def two(host, port, second):
    try:
        with socket.create_connection((host, port), 5) as s:
            s.sendall(b'GET / HTTP/1.1\r\nHost: hooks.example.com\r\n\r\n')
            got = b''
            while not got.endswith(b'from=45.0.0.2'):
                got += s.recv(1000)
            s.sendall(b'GET / HTTP/1.1\r\nHost: ' + second + b'\r\n\r\n')
            return s.recv(12).decode() or 'closed'
    except OSError as e:
        return name_of(e)
"""
RETRIED = r"""
import os
def retried(second, wait):
    def extensions(name, share):
        share = b'\0\x1d\0\x20' + os.urandom(31) + b'\x09' if share else b''
        server = struct.pack('!HBH', len(name) + 3, 0, len(name)) + name
        return ((0, server), (10, b'\0\2\0\x1d'), (13, b'\0\6\x08\x04\x04\x03\x04\x01'), (43, b'\2\3\4'),
                (51, struct.pack('!H', len(share)) + share))
    try:
        with socket.create_connection(('hooks.example.com', 443), 5) as s:
            s.settimeout(5)
            s.sendall(hello(*extensions(b'hooks.example.com', False)))
            if wait:
                assert bytes.fromhex('cf21ad74e59a6111') in s.recv(4096)
            s.sendall(hello(*extensions(second, True)))
            got = b''
            while len(got) < (5 if wait else 100):  # more than a HelloRetryRequest
                part = s.recv(4096)
                if not part:
                    return 'closed'
                got += part
            return 'answered'
    except OSError as e:
        return name_of(e)
"""


@pytest.mark.parametrize("port", [80, 8080])
async def test_later_request_of_a_connection_is_stopped_by_one_check(pretend: PretendInternet, port: int) -> None:
    policy = listed("hooks.example.com:80,8080")
    ask = f"{TWO_REQUESTS}print(two('hooks.example.com', {port}, b'hooks.example.com'))"
    other = ask.replace("b'hooks", "b'other")
    async with cage(pretend, policy) as (caged, broker):
        assert await caged.client(ask) == "HTTP/1.1 200"
        assert await caged.client(other) in {"ECONNRESET", "closed"}
        await broker.wait_for("net.denied", rule="host-mismatch", port=port)
        await broker.wait_for("net.closed", reason="host-mismatch")
    async with cage(pretend, policy, off=["later"]) as (caged, broker):
        assert await caged.client(other) == "HTTP/1.1 200"


@pytest.mark.parametrize("wait", [True, False])
async def test_second_hello_with_another_name_is_stopped_by_one_check(pretend: PretendInternet, wait: bool) -> None:
    policy = listed("hooks.example.com:443")
    ask, other = (f"{HELLO}{RETRIED}print(retried(b'{name}.example.com', {wait}))" for name in ("hooks", "other"))
    async with cage(pretend, policy) as (caged, broker):
        assert await caged.client(ask) == "answered"
        assert await caged.client(other) in {"ECONNRESET", "closed"}
        await broker.wait_for("net.denied", rule="sni-mismatch", port=443)
        first = (await broker.wait_for("net.closed", reason="sni-mismatch"))["sent"]
    async with cage(pretend, policy, off=["later"]) as (caged, broker):
        await caged.client(other)
        # The reply is the server's own affair: both hellos went there.
        assert (await broker.wait_for("net.closed"))["sent"] > 2 * first
        assert not [r for r in broker.records if r["type"] == "net.denied"]


# --- everything but TCP --------------------------------------------------------------------------------------

PACKETS = {
    "udp": "socket.socket(socket.AF_INET, socket.SOCK_DGRAM).sendto(b'x', ('8.8.8.8', 443))",
    "udp6": "socket.socket(socket.AF_INET6, socket.SOCK_DGRAM).sendto(b'x', ('2001:4860:4860::8888', 443))",
    "multicast": "socket.socket(socket.AF_INET, socket.SOCK_DGRAM).sendto(b'x', ('224.0.0.251', 5353))",
    "icmp": "socket.socket(2, socket.SOCK_RAW, 1).sendto(b'\\x08\\0\\xf7\\xff' + bytes(4), ('9.9.9.9', 0))",
    "raw": "socket.socket(socket.AF_INET, socket.SOCK_RAW, 99).sendto(b'x', ('8.8.8.8', 0))",
}


@pytest.mark.parametrize("kind", PACKETS)
@pytest.mark.parametrize("on", [True, False], ids=["on", "off"])
def test_other_protocols_are_refused_at_once(monkeypatch: pytest.MonkeyPatch, kind: str, on: bool) -> None:
    if not on:
        change = without("goto refused", "policy drop")
        monkeypatch.setattr(network, "_ruleset", lambda policy: change(ruleset.render(Rules(policy))))
    made = network.prepare(NetworkPolicy(mode="public"))

    def send() -> str:
        try:
            # As root: a plugin may not even make some of these sockets.
            eval(PACKETS[kind], {"socket": socket})
        except OSError as error:
            return type(error).__name__
        return "sent"

    try:
        assert netns.in_network(made.netns_fd, send) == ("PermissionError" if on else "sent")
    finally:
        network.release(made)


# --- how much ------------------------------------------------------------------------------------------------

STORM = """
address = socket.gethostbyname('hooks.example.com')  # once: questions have a rate of their own
got = [attempt(tcp, address, 25) for _ in range(COUNT)]
print(sum(not isinstance(one, str) for one in got))
"""


async def test_connections_over_the_rate_are_refused_by_the_ruleset(pretend: PretendInternet) -> None:
    policy = listed("hooks.example.com:25", connects_open=512)
    storm = STORM.replace("COUNT", "120")
    async with cage(pretend, policy) as (caged, broker):
        assert 40 <= int(await caged.client(storm)) < 100
        await broker.wait_for("net.denied", rule="rate")
    async with cage(pretend, policy, change=without("goto over_rate")) as (caged, _):
        assert int(await caged.client(storm)) == 120


async def test_the_number_of_open_connections_is_kept_by_kernel_and_broker(pretend: PretendInternet) -> None:
    policy = listed("hooks.example.com:25", connects_open=8, connect_burst=400, connects_per_second=400)
    # A refusal of the broker is a reset after the client's connect: count the connections that are served.
    storm = """
kept = [s for s in (attempt(tcp, 'hooks.example.com', 25) for _ in range(30)) if not isinstance(s, str)]
print(sum(attempt(s.recv, 3) == b'220' for s in kept))
"""
    for off, change in (([], None), (["open"], None), ([], without("goto over_open"))):
        async with cage(pretend, policy, off=off, change=change) as (caged, broker):
            assert int(await caged.client(storm)) <= 8
            await broker.wait_for("net.denied", rule="too-many-open")
    async with cage(pretend, policy, off=["open"], change=without("goto over_open")) as (caged, _):
        assert int(await caged.client(storm)) == 30


HOLD = """
held = [tcp('hooks.example.com', 9000) for _ in range(40)]
print('holding', flush=True)
time.sleep(3600)
"""


async def test_kernel_memory_of_outer_connections_is_bounded(pretend: PretendInternet) -> None:
    small, most = 2 * 2 * buffers.SMALL, buffers.BUDGET + 40 * 4 * buffers.SMALL

    def allowed() -> list[int]:
        """What each outer connection to the pouring server may take, in bytes."""
        table = netns.in_network(
            pretend.host_fd,
            lambda: subprocess.run(["ss", "-Htmn", "dport", "=", "9000"], check=True, capture_output=True, text=True),
        ).stdout
        return [int(rb) + int(tb) for rb, tb in re.findall(r"rb(\d+),.*?tb(\d+)", table)]

    async def until(reached: Callable[[], bool]) -> None:
        async with asyncio.timeout(seconds(60)):
            # No event tells of a buffer that grows.
            while not await asyncio.to_thread(reached):  # noqa: ASYNC110 # see above
                await asyncio.sleep(0.1)

    server = pouring(pretend.internet.bound(WEB, 9000))
    policy = listed("hooks.example.com:9000", connect_burst=400, connects_per_second=200)
    try:
        for off in ([], ["buffers"]):
            async with cage(pretend, policy, off=off) as (caged, _):
                client = asyncio.create_task(caged.client(HOLD, timeout=3600))
                await until(lambda: len(allowed()) == 40)
                if off:
                    await until(lambda: sum(allowed()) > most)
                else:
                    await until(lambda: sum(size <= small for size in allowed()) >= 40 - buffers.BUDGET // (1 << 20))
                    assert sum(allowed()) <= most
                client.cancel()
                await asyncio.gather(client, return_exceptions=True)
    finally:
        server.close()


def pouring(listener: socket.socket) -> socket.socket:
    """Send without end to each connection of ``listener``."""

    def pour(connection: socket.socket) -> None:
        with contextlib.suppress(OSError), connection:
            while True:
                connection.sendall(bytes(1 << 16))

    def serve() -> None:
        with contextlib.suppress(OSError):
            while True:
                threading.Thread(target=pour, args=(listener.accept()[0],), daemon=True).start()

    threading.Thread(target=serve, daemon=True).start()
    return listener


async def test_questions_over_the_rate_are_refused(pretend: PretendInternet) -> None:
    storm = f"""
s = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
s.settimeout(5)
refused = 0
for _ in range(250):
    s.sendto({DNS_QUESTION}, ('127.0.0.53', 53))
    refused += s.recv(500)[3] & 15 == 5
print(refused)
"""
    for off in ([], ["dns-rate"]):
        async with cage(pretend, listed("hooks.example.com:80"), off=off) as (caged, _):
            assert (int(await caged.client(storm)) > 50) is not bool(off)


async def test_connection_that_cannot_be_recorded_is_not_let_out(pretend: PretendInternet) -> None:
    for off, expected in (([], False), (["recordable"], True)):
        async with cage(pretend, listed(f"{OTHER}:80"), off=off) as (caged, broker):
            broker.audit.send(b'{"blocked": "the disk is full"}')
            await asyncio.sleep(0.2)  # nothing answers such a packet
            ask = f"{RAW}print(raw({OTHER!r}, 80, b'GET / HTTP/1.0\\r\\n\\r\\n').startswith('HTTP/1.1 200'))"
            assert await caged.client(ask) == str(expected)


def test_every_check_of_the_weakened_broker_is_switched_off_here() -> None:
    """Every check that ``weakened`` knows is used here."""
    from pathlib import Path

    from tests.broker import weakened

    text = Path(__file__).read_text() + Path(__file__).with_name("test_guarantees.py").read_text()
    text += Path(__file__).with_name("test_fence.py").read_text()
    for line in (weakened.__doc__ or "").splitlines():
        if line.startswith("``") and not line.startswith("``python"):
            check = line.split("``")[1].split(":")[0]
            assert f'"{check}' in text, f"{check} is never switched off"
