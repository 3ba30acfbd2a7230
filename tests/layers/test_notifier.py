"""Answers to calls that a filter hands over: what one cage may have the supervisor do for it."""

from __future__ import annotations

import asyncio
import functools
import os
import socket
from collections.abc import Iterator

import pytest

from isolator.base.pacing import TokenBucket
from isolator.layers.seccomp import notifier
from isolator.layers.seccomp.layer import compile_profile
from isolator.linux import seccomp
from tests.system.daemon import wait_for


@pytest.fixture
def asker() -> Iterator[tuple[int, int]]:
    """The listener of a process that opens sockets of netlink without end, and a pipe with a byte for each."""
    mine, theirs = socket.socketpair()
    told, tell = os.pipe()
    program = compile_profile("default")
    if (child := os.fork()) == 0:
        try:
            listener = seccomp.load_filter(program, listener=True)
            socket.send_fds(theirs, [b"x"], [listener])
            os.close(listener)
            mine.close()
            while True:
                socket.socket(notifier.AF_NETLINK, socket.SOCK_RAW, notifier.NETLINK_ROUTE).close()
                os.write(tell, b"x")
        finally:
            os._exit(1)
    theirs.close()
    os.close(tell)
    _, (listener,), _, _ = socket.recv_fds(mine, 1, 1)
    yield listener, told
    os.kill(child, 9)
    os.waitpid(child, 0)
    mine.close()
    os.close(told)


async def test_sockets_that_are_lent_count_for_the_work_that_they_are(
    asker: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Time stands still for the cage's share of answers: what was there at once is all that it has."""
    monkeypatch.setattr(notifier, "TokenBucket", functools.partial(TokenBucket, clock=lambda: 0.0))
    listener, told = asker
    answering = notifier.SeccompNotifier()
    try:
        cage = answering.watch(listener, lambda denied: None)
        assert isinstance(cage, notifier._Watched)
        await asyncio.to_thread(wait_for, lambda: cage.paused)
        assert len(os.read(told, 4096)) == notifier.ANSWERS_PER_SECOND // notifier.LENDING
    finally:
        answering.close()
