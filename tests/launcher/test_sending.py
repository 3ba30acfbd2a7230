"""Orders to a launcher that does not read at the moment: each waits, and each is sent, or fails when it has died."""

from __future__ import annotations

import asyncio
import errno
import os
import socket
from collections.abc import AsyncIterator

import pytest

from isolator.errors import UnavailableError
from isolator.ipc.packet import pair, send_packet
from isolator.launcher import client
from isolator.launcher.client import Launcher


class _Process:
    """A launcher that the test plays."""

    pid = os.getpid()

    def wait(self, timeout: float | None = None) -> None:
        """Do nothing: the process has ended."""

    def kill(self) -> None:
        """Do nothing: the process has ended."""


@pytest.fixture
async def slow() -> AsyncIterator[tuple[Launcher, socket.socket, list[asyncio.Task[None]]]]:
    """A launcher whose socket is full, its end of that, and two orders that wait for it."""
    mine, theirs = pair()
    theirs.setblocking(False)
    group = os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC)
    launcher = Launcher((_Process(), mine), adopted=True)
    waiting: list[asyncio.Task[None]] = []
    while len(waiting) < 2:
        order = asyncio.create_task(launcher.keep("cage", group))
        for _ in range(3):
            await asyncio.sleep(0)
        if not order.done():
            waiting.append(order)
    yield launcher, theirs, waiting
    launcher.dismiss()
    theirs.close()
    os.close(group)


Slow = tuple[Launcher, socket.socket, list[asyncio.Task[None]]]


async def test_every_order_that_waits_is_sent_once_there_is_room(slow: Slow) -> None:
    launcher, theirs, waiting = slow
    first, second = waiting
    first.cancel()  # of one that is given up no other hears
    third = asyncio.create_task(launcher.keep("cage", 0))
    await asyncio.sleep(0)
    while True:
        try:
            _, fds, _, _ = socket.recv_fds(theirs, 4096, 1)
        except BlockingIOError:
            break
        for fd in fds:
            os.close(fd)
    await asyncio.wait_for(asyncio.gather(second, third), 60)


async def test_orders_that_wait_fail_when_the_launcher_dies(slow: Slow) -> None:
    launcher, theirs, waiting = slow
    theirs.close()
    for order in waiting:
        with pytest.raises(UnavailableError, match="died"):
            await asyncio.wait_for(order, 60)
    assert launcher.closed.is_set()


async def test_launcher_that_has_not_come_up_is_not_handed_over() -> None:
    """An heir, which takes it for ready, would take its first word for the answer to an order."""
    mine, theirs = pair()
    launcher = Launcher((_Process(), mine))
    assert launcher.unsettled
    theirs.send(b'{"ready": true}')
    alive = asyncio.create_task(launcher.alive())
    await asyncio.sleep(0)
    theirs.send(theirs.recv(4096))
    await alive
    assert not launcher.unsettled
    launcher.dismiss()
    theirs.close()


async def test_last_answer_of_a_launcher_that_has_died_is_taken_although_an_order_found_it_dead() -> None:
    """It has parked a process, which is this one's child to reap."""
    mine, theirs = pair()
    launcher = Launcher((_Process(), mine), adopted=True)
    parked = asyncio.create_task(launcher.parked())
    await asyncio.sleep(0)
    pidfd = os.pidfd_open(os.getpid())
    send_packet(theirs, b'{"pid": 7}', [pidfd])
    os.close(pidfd)
    theirs.close()
    with pytest.raises(UnavailableError, match="died"):
        await launcher.forgotten("cage")
    clone = await asyncio.wait_for(parked, 60)
    assert clone.pid == 7
    os.close(clone.pidfd)
    await asyncio.wait_for(launcher.closed.wait(), 60)


async def test_order_that_cannot_be_sent_is_no_end_of_the_launcher() -> None:
    """Which would be that of all its cages; here for a descriptor that is none."""
    mine, theirs = pair()
    launcher = Launcher((_Process(), mine), adopted=True)
    gone = os.dup(mine.fileno())
    os.close(gone)
    with pytest.raises(UnavailableError, match="the order cannot be sent: Bad file descriptor"):
        await launcher.keep("cage", gone)
    assert not launcher.closed.is_set()
    await launcher.forgotten("cage")
    assert theirs.recv(4096) == b'{"forget": "cage"}'
    launcher.dismiss()
    theirs.close()


async def test_order_for_which_the_kernel_has_no_memory_is_sent_later(monkeypatch: pytest.MonkeyPatch) -> None:
    short = [OSError(errno.ENOBUFS, "No buffer space available")] * 3

    def sent(sock: socket.socket, packet: bytes, fds: list[int]) -> None:
        if short:
            raise short.pop()
        send_packet(sock, packet, fds)

    monkeypatch.setattr(client, "send_packet", sent)
    monkeypatch.setattr(client, "_SHORT_SECONDS", 0.0, raising=False)
    mine, theirs = pair()
    launcher = Launcher((_Process(), mine), adopted=True)
    await launcher.forgotten("cage")
    assert theirs.recv(4096) == b'{"forget": "cage"}' and not launcher.closed.is_set()
    launcher.dismiss()
    theirs.close()
