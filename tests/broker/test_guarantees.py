"""Attempts to misuse a granted name, each against a real broker."""

from __future__ import annotations

import itertools
import subprocess
import sys
from pathlib import Path

import pytest

from isolator.broker.gate.gate import LONGEST_PAUSE
from isolator.policy.denial import DenialRule
from isolator.policy.model import AddressException, NetworkPolicy
from tests.broker.conftest import MakeCage, assert_watched, listed
from tests.support.internet_servers import METADATA, OTHER, PRIVATE, WEB
from tests.support.pretend_internet import BrokerProcess, PretendInternet
from tests.support.timeouts import seconds

RAW = """
def raw(host, port, data, timeout=5):
    try:
        with socket.create_connection((host, port), timeout) as s:
            s.sendall(data)
            got = s.recv(200)
            return got.decode() if got else 'closed'
    except OSError as e:
        return name_of(e)
def tls(host, sni, port=443):
    context = ssl.create_default_context(cafile=CA)
    context.check_hostname = False
    try:
        with socket.create_connection((host, port), 5) as s:
            with context.wrap_socket(s, server_hostname=sni) as t:
                t.sendall(b'GET / HTTP/1.1\\r\\nHost: inner.example\\r\\n\\r\\n')
                return t.recv(20).decode()[:15]
    except OSError as e:
        return name_of(e)
"""


@pytest.mark.parametrize(
    ("name", "rule"),
    [
        ("metadata.example.com", "blocked-address"),
        ("private.example.com", "blocked-address"),
        ("mapped.example.com", "blocked-address"),
        ("nat64.example.com", "blocked-address"),
        ("6to4.example.com", "blocked-address"),
        ("evilalias.example.com", "blocked-address"),
        ("host.example.com", "host-address"),
        ("gateway.example.com", "gateway"),
    ],
)
async def test_a_granted_name_that_leads_inside_is_refused(
    cages: MakeCage, broker: BrokerProcess, name: str, rule: str
) -> None:
    cage = await cages(listed("*.example.com:80,443"))
    script = f"""
try:
    print(socket.getaddrinfo({name!r}, 80))
except socket.gaierror as error:
    print(error.errno == socket.EAI_NONAME)
"""
    assert await cage.client(script) == "True"
    await broker.wait_for("net.query", name=name, verdict="denied", rule=rule)


async def test_a_name_that_changes_its_address_after_the_answer_is_refused(
    cages: MakeCage, broker: BrokerProcess, pretend: PretendInternet
) -> None:
    # DNS rebinding: public for the question, private for the connection.
    answers = itertools.chain([[WEB], [WEB]], itertools.repeat([METADATA]))
    pretend.internet.dns.records["rebind.example.com"] = lambda: next(answers)
    pretend.internet.dns.ttl = 0
    try:
        cage = await cages(listed("rebind.example.com:80"))
        script = (
            RAW + "print(raw('rebind.example.com', 80, b'GET / HTTP/1.1\\r\\nHost: rebind.example.com\\r\\n\\r\\n'))"
        )
        assert await cage.client(script) == "ECONNRESET"
        denied = await broker.wait_for("net.denied", name="rebind.example.com", address=METADATA, port=80)
        assert denied["rule"] == "blocked-address"
        assert not [r for r in broker.records if r["type"] == "net.connect"]
    finally:
        pretend.internet.dns.ttl = 60


async def test_only_the_public_one_of_mixed_addresses_is_dialled(cages: MakeCage, broker: BrokerProcess) -> None:
    cage = await cages(listed("mixed.example.com:80"))
    assert "host=mixed" in await cage.client("print(get('http://mixed.example.com/'))")
    assert (await broker.wait_for("net.connect"))["address"] == WEB


async def test_a_chain_of_aliases_is_followed(cages: MakeCage, broker: BrokerProcess) -> None:
    cage = await cages(listed("alias.example.com:80"))
    assert "host=alias" in await cage.client("print(get('http://alias.example.com/'))")
    assert (await broker.wait_for("net.connect"))["name"] == "alias.example.com"


async def test_an_exception_opens_one_address_and_port(cages: MakeCage) -> None:
    policy = listed("private.example.com:80,443", exceptions=(AddressException(cidr=f"{PRIVATE}/32", port=80),))
    cage = await cages(policy)
    script = RAW + "print(get('http://private.example.com/')[:12], tls('private.example.com', 'private.example.com'))"
    assert await cage.client(script) == "host=private ECONNRESET"


@pytest.mark.parametrize(
    ("attempt", "rule"),
    [
        ("tls('hooks.example.com', 'other.example.com')", "sni-mismatch"),
        ("tls('hooks.example.com', None)", "no-sni"),
        ("raw('hooks.example.com', 443, b'SSH-2.0-x\\r\\n')", "not-tls"),
        ("raw('hooks.example.com', 443, b'GET / HTTP/1.1\\r\\nHost: hooks.example.com\\r\\n\\r\\n')", "not-tls"),
        ("raw('hooks.example.com', 80, b'GET / HTTP/1.1\\r\\nHost: other.example.com\\r\\n\\r\\n')", "host-mismatch"),
        ("raw('hooks.example.com', 80, b'GET http://e.net/ HTTP/1.1\\r\\nHost: hooks.example.com\\r\\n\\r\\n')",
         "host-mismatch"),
        ("raw('hooks.example.com', 80, b'GET / HTTP/1.0\\r\\n\\r\\n')", "no-host"),
        ("raw('hooks.example.com', 80, b'\\x01\\x02')", "not-http"),
        ("raw('hooks.example.com', 80, b'GET / HTTP/1.1\\r\\n x\\r\\n\\r\\n')", "malformed"),
        ("raw('hooks.example.com', 8080, b'GET / HTTP/1.1\\r\\nHost: other.example.com\\r\\n\\r\\n')", "host-mismatch"),
    ],
)  # fmt: skip
async def test_the_first_bytes_must_fit_the_name(
    cages: MakeCage, broker: BrokerProcess, attempt: str, rule: str
) -> None:
    cage = await cages(listed("hooks.example.com:80,443,8080"))
    assert await cage.client(f"{RAW}print({attempt})") in {"ECONNRESET", "closed"}
    denied = await broker.wait_for("net.denied", rule=rule)
    assert denied["name"] == "hooks.example.com" and denied["address"] == WEB


@pytest.mark.parametrize("port", [80, 8080], ids=["first bytes are awaited", "the server may speak first"])
async def test_request_a_byte_at_a_time_passes_and_does_not_wake_the_broker_for_each(
    cages: MakeCage, broker: BrokerProcess, port: int
) -> None:
    cage = await cages(listed("hooks.example.com:80,8080"))
    script = f"""
import time
data = b'GET / HTTP/1.1\\r\\nHost: hooks.example.com\\r\\nX: ' + b'x' * 1000 + b'\\r\\nConnection: close\\r\\n\\r\\n'
with socket.create_connection(('hooks.example.com', {port}), 10) as s:
    s.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    began = time.monotonic()
    for at in range(len(data)):
        s.sendall(data[at:at + 1])
        time.sleep(0.0005)  # so that each byte comes by itself
    answer = s.recv(15)
    print(answer.decode(), time.monotonic() - began)
"""
    before = _wakeups(broker)
    *answer, took = (await cage.client(script)).split()
    woken = _wakeups(broker) - before
    assert answer == ["HTTP/1.1", "200", "OK"]
    assert woken < 60 + 4 * float(took) / LONGEST_PAUSE


def _wakeups(broker: BrokerProcess) -> int:
    status = Path(f"/proc/{broker.process.pid}/status").read_text()
    return int(status.partition("\nvoluntary_ctxt_switches:")[2].split()[0])


async def test_missing_server_name_can_be_allowed(cages: MakeCage) -> None:
    cage = await cages(listed("hooks.example.com:443", allow_no_sni=True))
    script = RAW + "print(tls('hooks.example.com', None), tls('hooks.example.com', 'other.example.com'))"
    assert await cage.client(script) == "HTTP/1.1 200 OK ECONNRESET"


async def test_an_address_granted_as_such_needs_no_name(cages: MakeCage, broker: BrokerProcess) -> None:
    cage = await cages(listed(f"{WEB}:443", "2606:2800:220::/48:80"))
    script = (
        RAW
        + f"""
print(tls({WEB!r}, 'anything.example.net'))
print(tcp('2606:2800:220:1::34', 80).getpeername()[1], attempt(tcp, {OTHER!r}, 443), attempt(tcp, {WEB!r}, 80))
"""
    )
    assert await cage.client(script) == "HTTP/1.1 200 OK\n80 ECONNREFUSED ECONNREFUSED"
    assert (await broker.wait_for("net.connect", port=443))["rule"] == f"{WEB}:443"


async def test_a_virtual_address_that_was_never_answered_is_refused(cages: MakeCage, broker: BrokerProcess) -> None:
    cage = await cages(listed("*.example.com:443"))
    assert await cage.client(RAW + "print(raw('198.18.3.3', 443, b'x'))") == "ECONNRESET"
    await broker.wait_for("net.denied", address="198.18.3.3", rule="unallocated")


async def test_a_wrong_port_of_a_granted_name_is_refused_before_it_connects(
    cages: MakeCage, broker: BrokerProcess
) -> None:
    cage = await cages(listed("hooks.example.com:443", "other.example.com:80"))
    assert await cage.client("print(attempt(tcp, 'hooks.example.com', 80))") == "ECONNREFUSED"
    await broker.wait_for("net.denied", name="hooks.example.com", port=80, rule="port")


async def test_protocol_where_the_server_speaks_first_is_carried(cages: MakeCage, broker: BrokerProcess) -> None:
    cage = await cages(listed("hooks.example.com:25"))
    script = """
s = tcp('hooks.example.com', 25)
print(s.recv(100))
s.sendall(b'EHLO me\\r\\n')
print(s.recv(100))
"""
    assert await cage.client(script) == "b'220 hello\\r\\n'\nb'got EHLO me\\r\\n'"


async def test_every_byte_arrives_and_half_close_is_passed_on(cages: MakeCage, broker: BrokerProcess) -> None:
    cage = await cages(listed("hooks.example.com:7"))
    script = """
import threading, hashlib, os
s = tcp('hooks.example.com', 7, 20)
data = os.urandom(1 << 20) * 24
def send():
    s.sendall(data)
    s.shutdown(socket.SHUT_WR)
threading.Thread(target=send).start()
got = bytearray()
while part := s.recv(1 << 20):
    got += part
tail = f'[{len(data)}]'.encode()
print(bytes(got) == data + tail)
"""
    assert await cage.client(script) == "True"
    size = 24 << 20
    closed = await broker.wait_for("net.closed")
    assert closed["sent"] == size and closed["received"] == size + len(f"[{size}]")
    assert closed["reason"] == "closed"


async def test_connection_to_an_absent_server_resets_and_is_recorded_as_failed(
    cages: MakeCage, broker: BrokerProcess
) -> None:
    cage = await cages(listed("hooks.example.com:9999"))
    assert await cage.client(RAW + "print(raw('hooks.example.com', 9999, b'x'))") == "ECONNRESET"
    failed = await broker.wait_for("net.connect", verdict="failed")
    assert failed["error"] == "econnrefused" and failed["name"] == "hooks.example.com"


async def test_names_with_ipv6_alone_or_both_families_are_reached(cages: MakeCage, broker: BrokerProcess) -> None:
    cage = await cages(listed("six.example.com:80", "both.example.com:443"))
    script = "print(get('http://six.example.com/'))\nprint(get('https://both.example.com/')[:9])"
    assert await cage.client(script) == "host=six.example.com from=2a00:1::2\nhost=both"


async def test_other_cages_names_and_addresses_are_of_no_use(cages: MakeCage, broker: BrokerProcess) -> None:
    one = await cages(listed("hooks.example.com:443"), "r1")
    two = await cages(listed("other.example.com:443"), "r2")
    address = await one.client("print(socket.gethostbyname('hooks.example.com'))")
    assert await two.client(RAW + f"print(tls({address!r}, 'hooks.example.com'))") == "ECONNRESET"
    await broker.wait_for("net.denied", address=address, rule="unallocated")


async def test_a_new_address_of_the_host_is_out_of_reach_at_once(
    cages: MakeCage, broker: BrokerProcess, pretend: PretendInternet
) -> None:
    from tests.support.internet_servers import run_in

    cage = await cages(NetworkPolicy(mode="public"))
    assert await cage.client(f"print(tcp({OTHER!r}, 80).getpeername()[0])") == OTHER
    run_in(pretend.host_fd, "ip", "addr", "add", f"{OTHER}/32", "dev", "lo")
    try:
        assert await cage.client(f"{RAW}print(raw({OTHER!r}, 80, b'x'))") == "ECONNRESET"
        await broker.wait_for("net.denied", address=OTHER, rule="host-address")
    finally:
        run_in(pretend.host_fd, "ip", "addr", "del", f"{OTHER}/32", "dev", "lo")


_ADDED = """
import subprocess
from ipaddress import ip_address
from isolator.broker.host_addresses import HostAddresses

def owners():
    return [addresses.owner(ip_address(text)) for text in ("1.2.3.4", "2a00::7", "::ffff:1.2.3.4")]
subprocess.run(["ip", "link", "set", "lo", "up"], check=True)
addresses = HostAddresses()
before = owners()
subprocess.run(["ip", "addr", "add", "1.2.3.4/32", "dev", "lo"], check=True)
subprocess.run(["ip", "addr", "add", "2a00::7/128", "dev", "lo", "nodad"], check=True)
print(before, owners())
"""


def test_new_address_of_the_host_is_out_of_reach_before_any_notice_is_read() -> None:
    """One of IPv6 is its own once the kernel has made its route, in a thread; until then it would be on its link."""
    command = ["unshare", "--net", sys.executable, "-c", _ADDED]
    run = subprocess.run(command, check=True, capture_output=True, text=True, cwd=Path(__file__).parents[2])
    mine, near = repr(DenialRule.HOST_ADDRESS), repr(DenialRule.NEIGHBOUR)
    assert run.stdout in [f"[None, None, None] [{mine}, {one}, {mine}]\n" for one in (mine, near)]


_CHANGED = """
import asyncio, subprocess
from ipaddress import ip_address
from isolator.broker.host_addresses import HostAddresses
from isolator.linux.netlink import RouteQuery

def ip(words):
    subprocess.run(["ip", *words.split()], check=True)

asked, really = [], RouteQuery.is_own
def is_own(self, address):
    asked.append(address)
    return really(self, address)

async def main():
    RouteQuery.is_own = is_own
    addresses = HostAddresses()
    await addresses.watch()
    await asyncio.sleep(0)  # no change is told any more from here on
    while True:
        del asked[:]
        first = [addresses.owner(ip_address(text)) for text in TEXTS for _ in range(2)]
        if len(asked) == len(TEXTS):  # and no second has passed meanwhile
            break
    for text, change in zip(TEXTS, CHANGES):
        ip(change)
        print(*first[:2], repr(addresses.owner(ip_address(text))))
    addresses.close()

TEXTS = ("1.2.3.4", "1.2.3.5", "1.2.3.6", "2a00::7")
CHANGES = (
    "addr add 1.2.3.4/32 dev lo",
    "route add local 1.2.3.5/32 dev lo",
    "rule add to 1.2.3.6/32 lookup 100",
    "-6 rule add to 2a00::7/128 lookup 100",
)
ip("link set lo up")
ip("route add local 1.2.3.6/32 dev lo table 100")
ip("-6 route add local 2a00::7/128 dev lo table 100")
asyncio.run(main())
"""


def test_address_is_asked_for_again_after_any_change_that_makes_it_the_hosts() -> None:
    """No notice is read meanwhile: that one has come is enough."""
    command = ["unshare", "--net", sys.executable, "-c", _CHANGED]
    run = subprocess.run(
        command, check=True, capture_output=True, text=True, cwd=Path(__file__).parents[2], timeout=seconds(60)
    )
    assert run.stdout.splitlines() == 4 * [f"None None {DenialRule.HOST_ADDRESS!r}"]


_REFRESH = """
import asyncio, subprocess
from ipaddress import ip_address
from isolator.broker.host_addresses import HostAddresses

async def main():
    failed, real = asyncio.Event(), HostAddresses.refresh
    asyncio.get_running_loop().set_exception_handler(lambda _, context: (print(context["message"]), failed.set()))
    addresses, count = HostAddresses(), 0
    def refresh():
        nonlocal count
        count += 1
        if count == 2:
            raise ValueError("for once")
        real(addresses)
    addresses.refresh = refresh
    await addresses.watch()
    subprocess.run(["ip", "route", "add", "9.9.9.0/24", "via", "10.7.0.77"], check=True)
    await failed.wait()
    while addresses.owner(ip_address("10.7.0.77")) is None:
        await asyncio.sleep(0.05)
    print(addresses.owner(ip_address("10.7.0.77")))
    addresses.close()

for words in ("link add d0 type veth peer name d1", "link set d0 up", "link set d1 up", "addr add 10.7.0.1/24 dev d0"):
    subprocess.run(["ip", *words.split()], check=True)
asyncio.run(main())
"""


def test_gateways_are_read_again_after_a_reading_that_failed() -> None:
    run = subprocess.run(
        ["unshare", "--net", sys.executable, "-c", _REFRESH],
        check=True, capture_output=True, text=True, cwd=Path(__file__).parents[2], timeout=seconds(60),
    )  # fmt: skip
    assert run.stdout == "refresh of the host's addresses has failed; it is begun again\ngateway\n"


async def test_new_gateway_of_the_host_is_out_of_reach(
    cages: MakeCage, broker: BrokerProcess, pretend: PretendInternet
) -> None:
    import asyncio

    from tests.support.internet_servers import run_in

    gateway = "45.0.0.77"
    run_in(pretend.internet.fd, "ip", "addr", "add", f"{gateway}/32", "dev", "lo")
    cage = await cages(NetworkPolicy(mode="public"))
    ask = f"{RAW}print(raw({gateway!r}, 80, b'GET / HTTP/1.0\\r\\n\\r\\n')[:12])"
    assert await cage.client(ask) == "HTTP/1.1 200"
    run_in(pretend.host_fd, "ip", "route", "add", "9.9.9.0/24", "via", gateway)
    try:
        async with asyncio.timeout(seconds(20)):
            # The broker's reading of the routes has no event of its own.
            while await cage.client(ask) != "ECONNRESET":  # noqa: ASYNC110 # see above
                await asyncio.sleep(0.1)
        await broker.wait_for("net.denied", address=gateway, rule="gateway")
    finally:
        run_in(pretend.host_fd, "ip", "route", "del", "9.9.9.0/24")
        run_in(pretend.internet.fd, "ip", "addr", "del", f"{gateway}/32", "dev", "lo")


async def test_kernel_denials_reach_the_trail_once_and_counted(cages: MakeCage, broker: BrokerProcess) -> None:
    cage = await cages(listed("hooks.example.com:443"))
    script = """
s = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
for _ in range(2000):
    try:
        s.sendto(b'x', ('8.8.8.8', 53))
    except OSError as e:
        pass
print('sent')
"""
    await cage.client(script)
    await broker.wait_for("net.denied", address="8.8.8.8", port=53, protocol="udp", rule="protocol-udp")
    await broker.detach("r1")
    denied = [r["data"] for r in broker.records if r["type"] == "net.denied"]
    assert len(denied) <= 20
    assert sum(item.get("count", 1) for item in denied) > 1900


async def test_a_broker_that_dies_leaves_the_cage_closed_and_a_new_one_opens_it(
    cages: MakeCage, broker: BrokerProcess, pretend: PretendInternet
) -> None:
    from isolator.layers.network import namespace as network

    cage = await cages(listed("hooks.example.com:443"))
    address = await cage.client("print(socket.gethostbyname('hooks.example.com'))")
    broker.process.kill()
    await broker.process.wait()
    assert await cage.client(f"print(attempt(tcp, {address!r}, 443))") == "ECONNREFUSED"
    second = await BrokerProcess.start(pretend)
    try:
        cage.network.sockets = network.reopen(cage.network)
        await cage.hand_over(second)
        # Exact names keep their address: no new question is needed.
        assert await cage.client(f"{RAW}print(tls({address!r}, 'hooks.example.com'))") == "HTTP/1.1 200 OK"
    finally:
        await second.stop()


async def test_detach_ends_flows_and_records_them_before_it_answers(cages: MakeCage, broker: BrokerProcess) -> None:
    import asyncio

    cage = await cages(listed("hooks.example.com:25"))
    client = asyncio.create_task(
        cage.client("s = tcp('hooks.example.com', 25)\nprint(attempt(lambda: s.recv(100) and s.recv(100)))")
    )
    await broker.wait_for("net.connect")
    await broker.detach("r1")
    closed = [r["data"] for r in broker.records if r["type"] == "net.closed"]
    assert [item["reason"] for item in closed] == ["cage ended"]
    assert await client == "ECONNRESET"


async def test_quiet_connection_is_ended_when_the_policy_says(cages: MakeCage, broker: BrokerProcess) -> None:
    cage = await cages(listed("hooks.example.com:25", idle=1.0))
    assert (
        await cage.client("s = tcp('hooks.example.com', 25, 60)\ns.recv(100)\nprint(attempt(s.recv, 1))")
        == "ECONNRESET"
    )
    assert (await broker.wait_for("net.closed", timeout=seconds(10)))["reason"] == "idle"


async def test_dead_end_of_a_quiet_connection_is_looked_for_on_both_sides(
    cages: MakeCage, broker: BrokerProcess, pretend: PretendInternet
) -> None:
    import asyncio

    cage = await cages(listed("hooks.example.com:25"))
    client = asyncio.create_task(
        cage.client("s = tcp('hooks.example.com', 25)\ns.recv(100)\ns.recv(100)", timeout=3600)
    )
    await broker.wait_for("net.connect")
    await assert_watched(pretend.host_fd, "dport = 25")
    await assert_watched(cage.network.netns_fd, "sport = 65053")
    client.cancel()
    await asyncio.gather(client, return_exceptions=True)


async def test_names_stand_for_addresses_of_another_range_where_the_host_has_one(cages: MakeCage) -> None:
    """One that guards against private addresses let pass."""
    cage = await cages(listed("hooks.example.com:443", virtual="11.8.0.0/15"))
    script = f"""{RAW}
import ipaddress
address = ipaddress.ip_address(socket.gethostbyname('hooks.example.com'))
print(address in ipaddress.ip_network('11.8.0.0/15'), address.is_global, tls(str(address), 'hooks.example.com'))"""
    assert await cage.client(script) == "True True HTTP/1.1 200 OK"


async def test_attach_with_too_few_sockets_is_an_error(broker: BrokerProcess) -> None:
    from isolator.errors import UsageError

    with pytest.raises(UsageError):
        await broker.channel.call("cage.attach", run="x", plugin="p", policy={}, timeout=5)


async def test_hello_that_may_hide_a_second_name_can_be_allowed(cages: MakeCage, broker: BrokerProcess) -> None:
    """The name in the clear is checked with the key as without it."""
    cage = await cages(listed("hooks.example.com:443", "other.example.com:443", allow_ech=True))
    plain = await cages(listed("hooks.example.com:443"), "plain")
    script = """
context = ssl.create_default_context(cafile=CA)
def hidden(inner):
    incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
    try:
        context.wrap_bio(incoming, outgoing, server_hostname=inner).do_handshake()
    except ssl.SSLWantReadError:
        pass
    record = outgoing.read()
    # One extension more at the end of the hello, and the four lengths around it.
    extra = struct.pack('!HH', 0xfe0d, 40) + bytes(40)
    at = 5 + 4 + 2 + 32
    at += 1 + record[at]
    at += 2 + int.from_bytes(record[at:at + 2], 'big')
    at += 1 + record[at]
    block = int.from_bytes(record[at:at + 2], 'big') + len(extra)
    body = record[9:at] + struct.pack('!H', block) + record[at + 2:] + extra
    message = record[5:6] + struct.pack('!I', len(body))[1:] + body
    return record[:3] + struct.pack('!H', len(message)) + message
for inner in ('hooks.example.com', 'other.example.com'):
    try:
        with socket.create_connection(('hooks.example.com', 443), 5) as s:
            s.sendall(hidden(inner))
            print('answered' if s.recv(5)[:1] == bytes([0x16]) else 'refused')
    except OSError as e:
        print(name_of(e))
"""
    assert await cage.client(script) == "answered\nECONNRESET"
    assert await plain.client(script) == "ECONNRESET\nECONNRESET"
    await broker.wait_for("net.denied", rule="encrypted-hello")
    await broker.wait_for("net.denied", rule="sni-mismatch")
