"""The accept loop: keeps to its budget, rests without descriptors instead of failing, ends when it is closed."""

from __future__ import annotations

import asyncio
import gc
import os
import resource
import socket
from collections.abc import Iterator

import pytest

from isolator.base.pacing import TokenBucket
from isolator.ipc.accept_loop import HOLD, PAUSE, AcceptLoop
from tests.support.timeouts import seconds


@pytest.fixture
def listener() -> Iterator[socket.socket]:
    with socket.create_server(("127.0.0.1", 0), backlog=16) as made:
        yield made


@pytest.fixture
def clients(listener: socket.socket) -> Iterator[list[socket.socket]]:
    """Eight connections that wait in the backlog."""
    made = [socket.create_connection(listener.getsockname()) for _ in range(8)]
    yield made
    for client in made:
        client.close()


class Accepted(list[socket.socket]):
    """Collects connections; ``reached`` waits for a number of them."""

    def __init__(self) -> None:
        super().__init__()
        self._more = asyncio.Event()

    def add(self, connection: socket.socket, peer: object) -> None:
        self.append(connection)
        self._more.set()

    async def reached(self, count: int) -> None:
        async with asyncio.timeout(20):
            while len(self) < count:
                self._more.clear()
                await self._more.wait()

    def close(self) -> None:
        for connection in self:
            connection.close()


async def turns(count: int = 5) -> None:
    """Let the event loop do what is due."""
    for _ in range(count):
        await asyncio.sleep(0)


async def test_waiting_connections_are_accepted_and_do_not_block(
    listener: socket.socket, clients: list[socket.socket]
) -> None:
    accepted = Accepted()
    loop = AcceptLoop(listener, accepted.add)
    await accepted.reached(8)
    assert {connection.getpeername() for connection in accepted} == {client.getsockname() for client in clients}
    assert not any(connection.getblocking() for connection in accepted)
    loop.close()
    accepted.close()


async def test_connections_that_are_dear_to_accept_leave_time_for_other_work(
    listener: socket.socket, clients: list[socket.socket], monkeypatch: pytest.MonkeyPatch
) -> None:
    used, rests, accepted = 0.0, [], Accepted()

    def accept(connection: socket.socket, peer: object) -> None:
        nonlocal used
        used += 0.6 * HOLD
        accepted.add(connection, peer)

    monkeypatch.setattr("isolator.ipc.accept_loop.time.thread_time", lambda: used)
    loop = AcceptLoop(listener, accept)
    real = loop._rest
    monkeypatch.setattr(loop, "_rest", lambda pause: (rests.append((len(accepted), pause)), real(pause)))
    await accepted.reached(8)
    await turns()
    assert rests == [(2, PAUSE), (4, PAUSE), (6, PAUSE), (8, PAUSE)]
    loop.close()
    accepted.close()


async def test_connections_beyond_the_budget_wait_in_the_backlog_and_are_accepted_later(
    listener: socket.socket, clients: list[socket.socket]
) -> None:
    accepted = Accepted()
    # A clock that stands still: the burst, then one connection on credit.
    loop = AcceptLoop(listener, accepted.add, budget=TokenBucket(100.0, 3.0, clock=lambda: 0.0))
    await accepted.reached(1)
    assert len(accepted) == 4
    await accepted.reached(8)
    loop.close()
    accepted.close()


async def test_lack_of_descriptors_is_a_rest_not_an_end(listener: socket.socket, clients: list[socket.socket]) -> None:
    gc.collect()  # or what an earlier test has left may free a descriptor meanwhile
    accepted, filler = Accepted(), [os.open("/dev/null", os.O_RDONLY)]
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(map(int, os.listdir("/proc/self/fd"))) + 1, hard))
    try:
        with pytest.raises(OSError, match="Too many open files"):
            while True:
                filler.append(os.dup(filler[0]))
        loop = AcceptLoop(listener, accepted.add)
        await turns()
        assert not accepted
    finally:
        for fd in filler:
            os.close(fd)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    await accepted.reached(8)
    loop.close()
    accepted.close()


async def test_peers_are_told_of_the_lack_of_descriptors_and_the_log_once(
    listener: socket.socket, clients: list[socket.socket], caplog: pytest.LogCaptureFixture
) -> None:
    accepted, filler = Accepted(), [os.open("/dev/null", os.O_RDONLY)]
    loop = AcceptLoop(listener, accepted.add, refuse=lambda connection: connection.send(b"none left"))
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(map(int, os.listdir("/proc/self/fd"))) + 1, hard))
    try:
        with pytest.raises(OSError, match="Too many open files"):
            while True:
                filler.append(os.dup(filler[0]))
        for client in clients[:2]:
            client.setblocking(False)
            async with asyncio.timeout(seconds(20)):
                assert await asyncio.get_running_loop().sock_recv(client, 100) == b"none left"
        assert not accepted
    finally:
        for fd in filler:
            os.close(fd)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    await accepted.reached(6)
    assert len([r for r in caplog.records if "no connection can be accepted" in r.message]) == 1
    loop.close()
    accepted.close()


async def test_closed_loop_accepts_nothing_more_even_while_it_rests(
    listener: socket.socket, clients: list[socket.socket]
) -> None:
    accepted = Accepted()
    loop = AcceptLoop(listener, accepted.add, budget=TokenBucket(100.0, 1.0, clock=lambda: 0.0))
    await accepted.reached(1)
    count = len(accepted)
    loop.close()
    loop.close()
    await asyncio.sleep(0.05)  # longer than the rest
    assert len(accepted) == count
    assert listener.fileno() == -1
    accepted.close()


async def test_loop_that_is_closed_by_its_callback_ends(listener: socket.socket, clients: list[socket.socket]) -> None:
    accepted = Accepted()

    def once(connection: socket.socket, peer: object) -> None:
        accepted.add(connection, peer)
        loop.close()

    loop = AcceptLoop(listener, once)
    await accepted.reached(1)
    await turns()
    assert len(accepted) == 1
    accepted.close()
