"""Order in which a connection's record and its first bytes leave the broker."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import json
import socket
import weakref
from collections.abc import AsyncIterator
from ipaddress import IPv4Address

import pytest

from isolator.audit.client import AuditClient
from isolator.broker.flow import Flow, FlowTable
from isolator.broker.gate.gate import Gate
from isolator.broker.guard import Denied
from isolator.broker.host_addresses import HostAddresses
from isolator.broker.nat64 import Nat64
from isolator.broker.outbound import Outbound
from isolator.broker.relay import Scratch
from isolator.broker.resolver import HostResolvers
from isolator.broker.shared import Shared
from isolator.broker.sniff import Hello
from isolator.broker.turns import Turns
from isolator.ipc.channel import pair
from isolator.ipc.fence import LOST, Fence
from isolator.ipc.succession import Departure, to_bytes
from isolator.policy.denial import DenialRule
from isolator.policy.destinations import Rules
from tests.broker.conftest import listed
from tests.support.timeouts import seconds


class Line:
    """A cage's side of the broker, one connection of it whose server has answered, and the audit process's end."""

    def __init__(self) -> None:
        self.trail, theirs = pair()
        self.client, client = socket.socketpair()
        self.far = socket.create_server(("127.0.0.1", 0))
        server = socket.create_connection(self.far.getsockname())
        self.server, _ = self.far.accept()
        for sock in (self.trail, client, server, self.server):
            sock.setblocking(False)
        resolvers, self.host = HostResolvers(), HostAddresses()
        self.audit = AuditClient(theirs)
        shared = Shared(self.audit, self.host, resolvers, Nat64(resolvers), Scratch())
        local = ("127.0.0.1", 0)
        udp = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        udp.bind(local)
        log, self.log = socket.socketpair()
        sockets = [socket.create_server(local), socket.socket(), udp, socket.create_server(local), log]
        port = self.far.getsockname()[1]
        local_is_meant = ({"cidr": "127.0.0.1/32", "port": port},)
        rules = Rules(listed("93.184.216.34:80", f"127.0.0.1:{port}", exceptions=local_is_meant))
        self.cage = Outbound("r1", "tester", rules, Fence(), shared, self._fetch, sockets)
        now = asyncio.get_running_loop().time()  # else it stands idle on a host that is up for a day
        self.flow = Flow(client, IPv4Address("93.184.216.34"), 80, now, server=server)

    @staticmethod
    async def _fetch(count: int, version: int) -> list[socket.socket]:
        raise AssertionError("nothing comes in")

    def sent(self) -> bytes:
        """The bytes that the server has got, once a record of their connection is on its way to the trail."""
        (line,) = self.trail.recv(65536).splitlines()
        record = json.loads(line)
        assert (record["type"], record["data"]["flow"]) == ("net.connect", self.flow.id)
        return self.server.recv(65536)

    async def close(self) -> None:
        self.flow.release(orderly=True)
        await self.cage.close()
        self.audit.close()
        self.host.close()
        for sock in (self.trail, self.client, self.server, self.far, self.log):
            sock.close()


@pytest.fixture
async def line() -> AsyncIterator[Line]:
    made = Line()
    yield made
    await made.close()


async def test_record_is_on_its_way_before_bytes_that_were_compared(line: Line) -> None:
    line.cage._join(line.flow, None, b"GET / HTTP/1.1\r\n")
    assert line.sent() == b"GET / HTTP/1.1\r\n", "in the same turn of the loop"


async def test_connection_to_a_near_server_is_opened_in_the_turn_in_which_it_is_accepted(line: Line) -> None:
    client, inner = socket.socketpair()
    inner.setblocking(False)
    address, port = line.far.getsockname()
    flow = Flow(inner, IPv4Address(address), port, 0.0)
    client.send(b"HELO")
    line.cage._begin(flow)
    assert flow.recorded
    (record,) = map(json.loads, line.trail.recv(65536).splitlines())
    assert (record["type"], record["data"]["flow"]) == ("net.connect", flow.id)
    line.server, old = line.far.accept()[0], line.server
    old.close()
    assert line.server.recv(100) == b"HELO"
    client.close()


async def test_connection_notices_a_lost_end_from_the_first_tick_on_and_sends_every_piece_at_once(line: Line) -> None:
    line.cage._flows.add(line.flow)
    line.cage._join(line.flow)
    assert line.flow.server is not None
    for ticks, kept in enumerate((0, 1)):
        if ticks:
            line.cage.tick()
        assert line.flow.server.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE) == kept
        assert line.flow.server.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY) == 1
    line.cage._flows.remove(line.flow)


async def test_failure_to_open_is_that_when_its_cage_ends_in_the_same_turn(line: Line) -> None:
    ends: list[BaseException | None] = []
    table = FlowTable(1, lambda flow, failure: (ends.append(failure), table.remove(flow))[1])

    async def fail() -> None:
        raise ConnectionRefusedError

    table.add(line.flow)
    table.open(line.flow, fail())
    await asyncio.sleep(0)
    await table.close()
    await asyncio.sleep(0)
    assert [type(failure) for failure in ends] == [ConnectionRefusedError]


async def test_connection_that_has_ended_leaves_nothing_to_the_collector(line: Line) -> None:
    line.client.send(b"HELO")
    line.cage._join(line.flow, Gate(lambda _: None, strict=False))
    assert line.sent() == b"HELO"
    gc.disable()
    try:
        pipes = [weakref.ref(pipe) for pipe in line.flow.pipes]
        line.client.shutdown(socket.SHUT_WR)
        line.server.shutdown(socket.SHUT_WR)
        async with asyncio.timeout(seconds(10)):
            while not all(pipe.ended for pipe in line.flow.pipes):  # noqa: ASYNC110 # a turn or two
                await asyncio.sleep(0)
        line.flow.pipes.clear()
        await asyncio.sleep(0)
        assert [pipe() for pipe in pipes] == [None, None]
    finally:
        gc.enable()


async def test_connections_of_a_burst_take_turns_with_others(line: Line) -> None:
    address, port = line.far.getsockname()
    pairs = [socket.socketpair() for _ in range(3)]
    flows = [Flow(inner, IPv4Address(address), port, 7.0) for _, inner in pairs]
    for flow in flows:
        flow.client.setblocking(False)
        line.cage._begin(flow)
    assert [flow.recorded for flow in flows] == [True, False, False]
    async with asyncio.timeout(seconds(10)):
        while not all(flow.recorded for flow in flows):  # noqa: ASYNC110 # a turn or two
            await asyncio.sleep(0)
    for client, _ in pairs:
        client.close()


async def test_refusal_of_a_near_server_is_recorded_and_ends_the_connection_at_once(line: Line) -> None:
    line.far.close()
    client, inner = socket.socketpair()
    inner.setblocking(False)
    port = line.cage._rules.policy.exceptions[0].port
    line.cage._begin(Flow(inner, IPv4Address("127.0.0.1"), port, 0.0))
    async with asyncio.timeout(seconds(10)):
        record = json.loads(await asyncio.get_running_loop().sock_recv(line.trail, 65536))
    assert (record["type"], record["data"]["error"]) == ("net.connect", "econnrefused")
    assert client.recv(100) == b"" and not line.cage._flows._flows
    client.close()


async def test_connection_that_is_given_up_before_its_task_has_begun_is_closed(line: Line) -> None:
    client, inner = socket.socketpair()
    line.cage._fence.move(LOST)
    line.cage._begin(Flow(inner, IPv4Address("93.184.216.34"), 80, 0.0))
    await line.cage._flows.close()
    assert inner.fileno() < 0 and not line.cage._flows._flows
    client.close()


async def test_connection_that_is_given_up_under_way_is_on_record(line: Line) -> None:
    """A cage that ends as it connects has perhaps been heard by whom it may reach."""
    pairs = [socket.socketpair() for _ in range(2)]
    admitted, waiting = (Flow(inner, IPv4Address("93.184.216.34"), 80, 0.0) for _, inner in pairs)
    admitted.rule = "93.184.216.34:80"
    for flow in (admitted, waiting):
        line.cage._flows.open(flow, asyncio.sleep(3600))
    await line.cage._flows.close()
    line.cage._records.flush(everything=True)
    line.audit.flush()
    (record,) = map(json.loads, line.trail.recv(65536).splitlines())
    data = record["data"]
    assert (record["type"], data["verdict"], data["error"]) == ("net.connect", "failed", "cage ended")
    for client, _ in pairs:
        client.close()


@pytest.mark.parametrize("turns", range(4))
async def test_bytes_that_come_while_another_broker_takes_over_are_not_lost(line: Line, turns: int) -> None:
    client, inner = socket.socketpair()
    inner.setblocking(False)
    flow = Flow(inner, IPv4Address("93.184.216.34"), 443, 0.0, name="a.com")

    async def compare() -> None:
        await line.cage._first_bytes.read(flow, line.cage._first_bytes.gate(flow))

    line.cage._flows.open(flow, compare())
    for _ in range(3):  # it waits for bytes from then on
        await asyncio.sleep(0)
    client.send(b"\x16\x03\x01")
    for _ in range(turns):
        await asyncio.sleep(0)
    departure = Departure()
    (state,) = await line.cage._flows.pass_on(departure)
    with socket.socket(fileno=departure._fds.release_all()[state.client]) as taken:
        taken.setblocking(False)
        got = to_bytes(state.first)
        with contextlib.suppress(BlockingIOError):
            got += taken.recv(100)
    assert got == b"\x16\x03\x01"
    client.close()


async def test_bytes_that_are_there_go_out_behind_the_record_without_another_turn(line: Line) -> None:
    line.client.send(b"HELO")
    line.cage._join(line.flow)
    assert line.sent() == b"HELO"


async def test_answer_that_is_there_reaches_the_client_without_another_turn(line: Line) -> None:
    line.client.setblocking(False)
    line.server.send(b"220 ready")
    line.cage._join(line.flow)
    assert line.client.recv(100) == b"220 ready"


async def test_client_that_has_ended_before_its_first_byte_hears_the_server(line: Line) -> None:
    line.client.shutdown(socket.SHUT_WR)
    line.cage._join(line.flow)
    assert line.sent() == b""
    line.server.send(b"220 ready")
    line.client.setblocking(False)
    async with asyncio.timeout(seconds(10)):
        assert await asyncio.get_running_loop().sock_recv(line.client, 100) == b"220 ready"


async def test_bytes_that_are_there_pass_the_gate(line: Line) -> None:
    line.client.send(b"GET / HTTP/1.1\r\n")
    line.cage._join(line.flow, Gate(lambda _: None, strict=False))
    with pytest.raises(BlockingIOError):
        line.sent()
    line.client.send(b"Host: a.com\r\n\r\n")
    async with asyncio.timeout(seconds(10)):
        passed = await asyncio.get_running_loop().sock_recv(line.server, 100)
    assert passed == b"GET / HTTP/1.1\r\nHost: a.com\r\n\r\n"


async def test_connection_whose_first_bytes_are_refused_as_it_opens_ends_once(line: Line) -> None:
    client, inner = socket.socketpair()
    inner.setblocking(False)
    client.send(b"GET / HTTP/1.1\r\nHost: b.com\r\n\r\n")
    flow, ends = line.flow, list[BaseException | None]()
    flow.client.close()
    flow.client = inner

    def refuse(_: Hello) -> None:
        raise Denied(DenialRule.HOST_MISMATCH)

    def end(flow: Flow, failure: BaseException | None) -> None:
        ends.append(failure)
        flow.release(orderly=False)
        table.remove(flow)

    async def join() -> None:
        up, down = flow.join(Scratch(), Fence(), Turns(), end)
        up.guard(Gate(refuse, strict=False), down)
        flow.begin(Turns())

    table = FlowTable(1, end)
    table.open(flow, join(), at_once=True)
    assert [type(failure) for failure in ends] == [Denied]
    client.close()
