"""A real broker process and real namespaces: what is granted is reached and recorded, the rest is refused."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
from collections import Counter

import pytest

from isolator.linux import netns
from isolator.policy.model import VIRTUAL, NetworkPolicy
from tests.broker.conftest import MakeCage, listed
from tests.support.internet_servers import OTHER, WEB
from tests.support.pretend_internet import BrokerProcess, PretendInternet
from tests.support.timeouts import seconds


async def test_a_granted_name_is_reached_over_https_and_recorded(cages: MakeCage, broker: BrokerProcess) -> None:
    cage = await cages(listed("hooks.example.com:443"))
    assert await cage.client("print(get('https://hooks.example.com/'))") == "host=hooks.example.com from=45.0.0.2"
    assert (await broker.wait_for("net.query", name="hooks.example.com", type="A"))["verdict"] == "allowed"
    connect = await broker.wait_for("net.connect")
    flow = connect.pop("flow")
    assert connect == {
        "name": "hooks.example.com",
        "address": WEB,
        "port": 443,
        "verdict": "allowed",
        "rule": "hooks.example.com:443",
    }
    closed = await broker.wait_for("net.closed", flow=flow)
    assert closed["sent"] > 200 and closed["received"] > 200 and closed["duration_ms"] > 0
    assert {record["plugin"] for record in broker.records} == {"tester"}
    assert {record["run"] for record in broker.records} == {"r1"}


async def test_a_name_that_is_not_listed_never_leaves_the_host(
    cages: MakeCage, broker: BrokerProcess, pretend: PretendInternet
) -> None:
    cage = await cages(listed("hooks.example.com:443"))
    script = """
start = time.monotonic()
try:
    socket.getaddrinfo('secret-data.other.example.com', 443)
except socket.gaierror as error:
    print(error.errno == socket.EAI_NONAME, time.monotonic() - start < 2)
"""
    assert await cage.client(script) == "True True"
    assert pretend.internet.dns.queries == []
    query = await broker.wait_for("net.query", name="secret-data.other.example.com", type="A")
    assert (query["verdict"], query["rule"]) == ("denied", "not-granted")


@pytest.mark.parametrize("policy", [NetworkPolicy(mode="none"), listed()])
async def test_policy_without_network_refuses_everything_at_once(
    cages: MakeCage, broker: BrokerProcess, pretend: PretendInternet, policy: NetworkPolicy
) -> None:
    cage = await cages(policy)
    script = f"""
print(attempt(tcp, {WEB!r}, 443), attempt(tcp, '2606:2800:220:1::34', 443), attempt(tcp, '198.18.0.1', 443))
try:
    socket.getaddrinfo('hooks.example.com', 443)
except socket.gaierror as error:
    print(error.errno == socket.EAI_NONAME)
"""
    assert await cage.client(script) == "ECONNREFUSED ECONNREFUSED ECONNREFUSED\nTrue"
    await broker.wait_for("net.denied", address=WEB, port=443, protocol="tcp")
    assert pretend.internet.dns.queries == []


async def test_public_mode_reaches_the_public_and_nothing_private(cages: MakeCage, broker: BrokerProcess) -> None:
    cage = await cages(NetworkPolicy(mode="public"))
    script = """
print(get('http://other.example.com/'))
print(tcp('1.2.3.4', 80).getpeername())
print(tcp('2606:2800:220:1::34', 80).getpeername()[:2])
for address in ('169.254.169.254', '10.9.9.9', '45.0.0.2:8080', '::ffff:169.254.169.254', '127.1.2.3', '172.31.0.1',
                '100.100.100.200', '64:ff9b::a9fe:a9fe', '2002:a9fe:a9fe::', 'fd00::1', 'fe80::1', '::ffff:10.9.9.9'):
    host, port = (address.split(':')[0], 8080) if address.endswith(':8080') else (address, 80)
    print(address, attempt(tcp, host, port))
"""
    lines = (await cage.client(script)).splitlines()
    assert lines[0] == "host=other.example.com from=45.0.0.2"
    assert lines[1:3] == ["('1.2.3.4', 80)", "('2606:2800:220:1::34', 80)"]
    refused = dict(line.split(" ", 1) for line in lines[3:])
    assert set(refused.values()) <= {"ECONNREFUSED", "EINVAL", "ENETUNREACH"}, refused
    assert len(refused) == 12
    denied = await broker.wait_for("net.denied", address="169.254.169.254", port=80)
    assert denied["rule"] == "blocked-address"


@pytest.mark.parametrize("virtual", [VIRTUAL, "11.8.0.0/15"])
async def test_guard_against_private_addresses_lets_a_granted_name_through_in_a_range_that_looks_public(
    cages: MakeCage, broker: BrokerProcess, virtual: str
) -> None:
    """As mcp-server-fetch and many others do: resolve, refuse what is not global, connect."""
    cage = await cages(listed("hooks.example.com:443", virtual=virtual))
    script = """
import ipaddress
address = ipaddress.ip_address(socket.gethostbyname('hooks.example.com'))
print(get('https://hooks.example.com/') if address.is_global else f'{address} is not global')
print(attempt(tcp, str(address - 1), 443))
"""
    lines = (await cage.client(script)).splitlines()
    if virtual == VIRTUAL:
        assert lines[0].endswith("is not global")
    else:
        assert lines[0] == "host=hooks.example.com from=45.0.0.2"
        assert (await broker.wait_for("net.connect"))["address"] == WEB
    await broker.wait_for("net.denied", rule="unallocated")


async def test_address_in_the_range_for_names_is_never_dialled(cages: MakeCage, broker: BrokerProcess) -> None:
    """A server answers there, its address is granted, and still it means a name in this cage."""
    cage = await cages(listed(f"{OTHER}:80", "hooks.example.com:443", virtual="1.2.0.0/16"))
    assert await cage.client(f"print(attempt(tcp, {OTHER!r}, 80))") == "ECONNREFUSED"
    await broker.wait_for("net.denied", address=OTHER, port=80, rule="unallocated")
    assert await cage.client("print(get('https://hooks.example.com/'))") == "host=hooks.example.com from=45.0.0.2"


async def test_connection_whose_forbidden_bytes_wait_as_it_is_accepted_is_refused_and_ends_once(
    cages: MakeCage, broker: BrokerProcess
) -> None:
    cage = await cages(listed("hooks.example.com:8080"))
    address = await cage.client("print(socket.gethostbyname('hooks.example.com'))")
    refused = "b'GET / HTTP/1.1\\r\\nHost: other.example.com\\r\\n\\r\\n'"
    script = f"s = attempt(socket.create_connection, ('{address}', 8080), 20); s.sendall({refused}); attempt(s.recv, 1)"

    def unread() -> bool:
        command = ["ss", "-Htn", "state", "established"]
        found = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        return any(int(line.split()[0]) for line in found.splitlines())

    os.kill(broker.process.pid, signal.SIGSTOP)
    try:
        client = asyncio.ensure_future(cage.client(script))
        async with asyncio.timeout(seconds(20)):
            while not netns.in_network(cage.network.netns_fd, unread):  # noqa: ASYNC110
                await asyncio.sleep(0.02)  # the kernel tells nobody of it
    finally:
        os.kill(broker.process.pid, signal.SIGCONT)
    await client
    assert (await broker.wait_for("net.denied"))["rule"] == "host-mismatch"
    await broker.detach("r1")
    closed = Counter(record["data"]["flow"] for record in broker.records if record["type"] == "net.closed")
    assert list(closed.values()) == [1]
