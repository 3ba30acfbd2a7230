"""Connections that come in: a granted host port leads to the cage's loopback, is recorded, and ends with the run."""

from __future__ import annotations

import asyncio
import socket

import pytest

from isolator.broker.buffers import Buffers
from isolator.broker.inbound import Inbound
from isolator.broker.relay import Scratch
from isolator.broker.turns import Turns
from isolator.errors import UnavailableError
from isolator.ipc.fence import Fence
from isolator.layers.network import namespace as network
from isolator.linux import netns
from isolator.policy.model import ListenRule, NetworkPolicy
from tests.broker.conftest import MakeCage, assert_watched, listed
from tests.support.internet_servers import HOST, run_in
from tests.support.pretend_internet import BrokerProcess, CageNet, PretendInternet, run_client

SERVE = """
s = socket.create_server((ADDRESS, 3000), family=socket.AF_INET6 if ':' in ADDRESS else socket.AF_INET)
print('ready', flush=True)
c, peer = s.accept()
data = b''
while part := c.recv(65536):
    data += part
c.sendall(f'{len(data)} bytes from {peer[0]}'.encode())
c.close()
"""
ASK = """
s = tcp('127.0.0.1', 8080)
s.sendall(b'x' * 300_000)
s.shutdown(socket.SHUT_WR)
print(s.makefile().read())
"""


def policy(**more: object) -> NetworkPolicy:
    return listed("hooks.example.com:443", listen=(ListenRule(port=8080, cage_port=3000),), **more)


async def outside(cage: CageNet, code: str) -> str:
    """Run a client on the host."""
    return await run_client(cage.pretend, cage.pretend.host_fd, "host-resolv.conf", code)


async def until_listening(cage: CageNet, port: int) -> None:
    """Wait until something inside the cage listens at a port."""

    def there() -> bool:
        lines: list[str] = []
        for name in ("tcp", "tcp6"):
            with open(f"/proc/thread-self/net/{name}") as table:  # noqa: PTH123
                lines += table.read().splitlines()[1:]
        return any(line.split()[1].endswith(f":{port:04X}") and line.split()[3] == "0A" for line in lines)

    async with asyncio.timeout(20):
        # No event tells of a listener in another namespace.
        while not await asyncio.to_thread(netns.in_network, cage.network.netns_fd, there):  # noqa: ASYNC110 # see above
            await asyncio.sleep(0.02)


@pytest.mark.parametrize("address", ["127.0.0.1", "::1"])
async def test_a_granted_host_port_leads_into_the_cage_and_is_recorded(
    cages: MakeCage, broker: BrokerProcess, pretend: PretendInternet, address: str
) -> None:
    run_in(pretend.host_fd, "ip", "link", "set", "lo", "up")
    cage = await cages(policy())
    server = asyncio.create_task(cage.client(SERVE.replace("ADDRESS", repr(address))))
    await until_listening(cage, 3000)
    assert await outside(cage, ASK) == f"300000 bytes from {address}"
    await server
    connect = await broker.wait_for("net.connect", direction="in")
    flow = connect.pop("flow")
    assert connect == {
        "name": None, "address": "127.0.0.1", "port": 8080, "direction": "in", "cage_port": 3000,
        "verdict": "allowed", "rule": "listen 127.0.0.1:8080:3000",
    }  # fmt: skip
    closed = await broker.wait_for("net.closed", flow=flow)
    assert closed["received"] == 300_000 and closed["sent"] > 20 and closed["reason"] == "closed"


async def test_a_port_behind_which_nobody_listens_resets_and_is_recorded(
    cages: MakeCage, broker: BrokerProcess
) -> None:
    cage = await cages(policy())
    code = "s = attempt(tcp, '127.0.0.1', 8080)\nprint(s if isinstance(s, str) else attempt(s.recv, 1))"
    assert await outside(cage, code) == "ECONNRESET"
    failed = await broker.wait_for("net.connect", verdict="failed", direction="in")
    assert failed["error"] == "econnrefused"


async def test_dead_end_of_a_quiet_forwarded_connection_is_looked_for_on_both_sides(
    cages: MakeCage, broker: BrokerProcess, pretend: PretendInternet
) -> None:
    run_in(pretend.host_fd, "ip", "link", "set", "lo", "up")
    cage = await cages(policy())
    server = asyncio.create_task(cage.client(SERVE.replace("ADDRESS", "'127.0.0.1'"), timeout=3600))
    await until_listening(cage, 3000)
    client = asyncio.create_task(outside(cage, "s = tcp('127.0.0.1', 8080, 3600)\ns.recv(1)"))
    await broker.wait_for("net.connect", direction="in")
    await assert_watched(pretend.host_fd, "sport = 8080")
    await assert_watched(cage.network.netns_fd, "dport = 3000")
    for one in (server, client):
        one.cancel()
    await asyncio.gather(server, client, return_exceptions=True)


async def test_only_the_granted_address_listens_and_only_while_attached(cages: MakeCage, broker: BrokerProcess) -> None:
    cage = await cages(policy())
    assert await outside(cage, f"print(attempt(tcp, {HOST!r}, 8080))") == "ECONNREFUSED"
    await broker.channel.call("cage.detach", run="r1", timeout=5)
    assert await outside(cage, "print(attempt(tcp, '127.0.0.1', 8080))") == "ECONNREFUSED"


async def test_the_number_of_open_connections_is_limited(cages: MakeCage, broker: BrokerProcess) -> None:
    cage = await cages(policy(connects_open=3))
    serve = "s = socket.create_server(('127.0.0.1', 3000))\nkeep = []\n"
    serve += (
        "while len(keep) < 3:\n    keep.append(s.accept())\n    keep[-1][0].sendall(b'!')\nprint(keep[0][0].recv(1))"
    )
    server = asyncio.create_task(cage.client(serve))
    await until_listening(cage, 3000)
    code = "keep = [tcp('127.0.0.1', 8080) for _ in range(3)]\nprint([s.recv(1) for s in keep])\n"
    code += "print(attempt(lambda: tcp('127.0.0.1', 8080).recv(1)))\n[s.sendall(b'bye') for s in keep]"  # in any order
    assert await outside(cage, code) == "[b'!', b'!', b'!']\nECONNRESET"
    assert (await broker.wait_for("net.denied", direction="in"))["rule"] == "too-many-open"
    assert await server == "b'b'"


def test_taken_port_is_reported_in_one_line() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        rules = (ListenRule(port=port, cage_port=1), ListenRule(address="203.0.113.9", port=1, cage_port=1))
        with pytest.raises(UnavailableError, match=f"127.0.0.1:{port}: another program listens there"):
            network.host_listeners(listed(listen=rules))
    with pytest.raises(UnavailableError, match="no such address"):
        network.host_listeners(listed(listen=rules[1:]))


async def test_a_connector_reaches_the_cages_loopback_and_nothing_else(cages: MakeCage) -> None:
    cage = await cages(policy())
    made = [socket.socket(fileno=fd) for fd in network.connectors(cage.network, 2)]
    with made[0], made[1], pytest.raises(ConnectionRefusedError):
        made[0].connect(("127.0.0.1", 3000))
        made[1].connect(("10.0.0.1", 80))
    network.release(cage.network)
    with pytest.raises(UnavailableError, match="ended"):
        network.connectors(cage.network, 1)


async def test_refill_ahead_of_need_that_fails_is_reported_unless_the_supervisor_refused() -> None:
    reported: list[str] = []
    asyncio.get_running_loop().set_exception_handler(lambda _, context: reported.append(context["message"]))
    answers: list[Exception | list[socket.socket]] = [
        UnavailableError("supervisor", "is away", "try again"), ValueError("a fault"), [socket.socket()],
    ]  # fmt: skip

    async def fetch(count: int, version: int) -> list[socket.socket]:
        answer = answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return answer

    inbound = Inbound(
        [], fetch, lambda *_, **__: None, lambda _: None, Fence(), Scratch(), Buffers(), Turns(),
        limit=1, refusal=lambda: None,
    )  # fmt: skip
    for _ in range(3):
        await asyncio.wait([inbound._fill()])
    (await inbound._take()).close()
    assert reported == ["a refill of inbound sockets has failed"]
    await inbound.close()
