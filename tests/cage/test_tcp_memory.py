"""Memory that TCP connections of no process hold beside every cap: who holds much is ended, and nobody else."""

from __future__ import annotations

import asyncio
import functools
import re
import socket
from collections.abc import Iterator
from mmap import PAGESIZE
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from isolator.cage import tcp_memory
from isolator.ipc.messages import Origin
from isolator.layers.network import namespace
from isolator.linux import netlink, netns
from isolator.policy.model import NetworkPolicy
from tests.support.timeouts import seconds

CAP = 64 << 20


@pytest.fixture
def network() -> Iterator[namespace.CageNetwork]:
    made = namespace.make(NetworkPolicy(mode="none"))
    yield made
    namespace.release(made)


def fill(network: namespace.CageNetwork, address: str, port: int, connections: int) -> list[socket.socket]:
    """Connections to a port of a cage's own, each as full as it gets; all but the last are closed.

    Returns the listener, and the last one's end.
    """

    def work() -> list[socket.socket]:
        family = socket.AF_INET6 if ":" in address else socket.AF_INET
        listener = socket.socket(family)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 20)
        listener.bind((address, port))
        listener.listen(connections)
        for left in reversed(range(connections)):
            client = socket.create_connection((address, port))
            client.setblocking(False)
            try:
                while True:
                    client.send(bytes(1 << 16))
            except BlockingIOError:
                pass
            if left:
                client.close()
        return [listener, client]

    return netns.in_network(network.netns_fd, work)


@pytest.mark.parametrize("address", ["127.0.0.1", "::1"])
def test_buffers_of_connections_that_nobody_accepts_are_found(network: namespace.CageNetwork, address: str) -> None:
    assert namespace.tcp_memory_of_nobody(network) == 0
    listener, client = fill(network, address, 80, 40)
    with listener, client:
        held = namespace.tcp_memory_of_nobody(network)
        assert held > 40 * 100_000
        but_these = functools.partial(netlink.tcp_memory_of_nobody, but_port=80)
        others = netns.in_network(network.netns_fd, but_these)
        assert held - others > 40 * 100_000, "the broker's are not the cage's"
        accepted = [listener.accept()[0] for _ in range(40)]
        left = namespace.tcp_memory_of_nobody(network)
        assert held - left > 40 * 100_000, "but for what the closed ends have not sent"
        for one in accepted:
            one.close()
    assert namespace.tcp_memory_of_nobody(network) == 0


class Holder:
    """A run with a network, and the cause of its end."""

    def __init__(self, network: namespace.CageNetwork | None, *, started: bool = True) -> None:
        policy = SimpleNamespace(resources=SimpleNamespace(memory=CAP))
        self.processes = SimpleNamespace(lasts=True)
        spec = SimpleNamespace(leaf="x.1", policy=policy)
        self.cage: Any = SimpleNamespace(started=started, processes=self.processes, network=network, spec=spec)
        self.ended = asyncio.Event()

    def terminate(self, cause: str, origin: Origin) -> None:
        assert (cause, origin) == (tcp_memory.CAUSE, Origin.PLUGIN)
        assert not self.ended.is_set(), "it is being ended"
        self.ended.set()
        self.processes.lasts = False


async def test_cage_that_holds_more_than_its_share_is_ended_once_much_is_in_use(
    network: namespace.CageNetwork, monkeypatch: pytest.MonkeyPatch
) -> None:
    looks, low = asyncio.Queue[None](), False

    def is_low() -> bool:
        looks.put_nowait(None)
        return low

    monkeypatch.setattr(tcp_memory, "is_much_in_use", is_low)
    monkeypatch.setattr(tcp_memory, "INTERVAL", 0.001)
    quiet = namespace.make(NetworkPolicy(mode="none"))
    gone = namespace.make(NetworkPolicy(mode="none"))
    namespace.release(gone)
    listener, client = fill(network, "127.0.0.1", 80, 60)
    bad, good = Holder(network), Holder(quiet)
    runs = [Holder(None, started=False), Holder(gone), good, bad]
    looking = asyncio.create_task(tcp_memory.keep_tcp_memory(lambda: runs))
    try:
        with listener, client:
            async with asyncio.timeout(seconds(20)):
                for _ in range(3):
                    await looks.get()
                assert not bad.ended.is_set()
                low = True
                await bad.ended.wait()
                for _ in range(3):
                    await looks.get()
        assert not good.ended.is_set()
    finally:
        looking.cancel()
        namespace.release(quiet)


@pytest.mark.parametrize(("connections", "pages", "much"), [(10, 499, False), (10, 505, True), (1000, 0, True)])
def test_much_is_in_use_when_half_of_the_first_value_is(
    connections: int, pages: int, much: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A thousand connections without a byte are some 600 pages."""
    shown = re.sub(r"alloc \d+ mem \d+", f"alloc {connections} mem {pages}", Path("/proc/net/sockstat").read_text())
    assert f"alloc {connections} mem {pages}" in shown
    monkeypatch.setattr(tcp_memory, "read_file", lambda path: shown if "sockstat" in path else "1020 2000 3000")
    monkeypatch.setattr(tcp_memory, "_calm", tcp_memory._calm.__wrapped__)
    assert tcp_memory.is_much_in_use() is much


def test_a_first_value_that_the_kernel_does_not_show_is_looked_for_once_and_taken_from_the_memory(
    network: namespace.CageNetwork, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As in a network of the daemon's own, once a second."""
    looked: list[str] = []
    read = tcp_memory.read_file

    def noted(path: str) -> str:
        looked.append(path)
        return read(path)

    monkeypatch.setattr(tcp_memory, "read_file", noted)
    monkeypatch.setattr(tcp_memory, "_calm", functools.cache(tcp_memory._calm.__wrapped__))
    setting = Path("/proc/sys/net/ipv4/tcp_mem")  # absent if these tests are in a network of their own, too

    def look() -> tuple[list[bool], int]:
        return [tcp_memory.is_much_in_use() for _ in range(3)], tcp_memory._calm()

    much, taken = netns.in_network(network.netns_fd, look)
    assert much == [False] * 3
    assert looked.count("/proc/sys/net/ipv4/tcp_mem") == 1
    memory = int(re.findall(r"MemTotal: +(\d+)", Path("/proc/meminfo").read_text())[0]) * 1024 // PAGESIZE
    shown = int(setting.read_text().split()[0]) if setting.exists() else memory // 16 // 4 * 3
    assert taken == pytest.approx(shown, rel=0.1)


def test_a_connection_that_nobody_accepts_counts_without_a_byte(network: namespace.CageNetwork) -> None:
    def work() -> list[socket.socket]:
        listener = socket.create_server(("127.0.0.1", 80), backlog=200)
        for _ in range(100):
            socket.create_connection(("127.0.0.1", 80)).close()
        return [listener]

    (listener,) = netns.in_network(network.netns_fd, work)
    with listener:
        assert namespace.tcp_memory_of_nobody(network) >= 100 * netlink.TCP_SOCKET
