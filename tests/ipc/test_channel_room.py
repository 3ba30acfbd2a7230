"""A channel in a process that has no descriptor free: what needs one waits or is refused, and nothing else suffers."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import resource
from collections.abc import Iterator

import pytest

from isolator.errors import IsolatorError
from isolator.ipc.body import by_op
from isolator.ipc.channel import Channel, pair, send_packet
from isolator.ipc.messages import EnsureRun, NewAuditSocket, Running
from tests.support.descriptors import open_descriptors
from tests.support.timeouts import seconds


def _take_every_descriptor() -> list[int]:
    """Open /dev/null until no descriptor is free in this process."""
    taken = []
    try:
        while True:
            taken.append(os.open("/dev/null", os.O_RDONLY))
    except OSError:
        return taken


@contextlib.contextmanager
def _few_descriptors() -> Iterator[None]:
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(map(int, os.listdir("/proc/self/fd"))) + 16, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)


async def test_notification_waits_until_its_descriptors_find_room(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    looked = asyncio.Event()
    listen = Channel._listen
    monkeypatch.setattr(Channel, "_listen", lambda channel: (looked.set(), listen(channel)))
    got: asyncio.Future[list[int]] = asyncio.get_running_loop().create_future()
    calls: list[str] = []

    async def take(_: NewAuditSocket, fds: list[int]) -> None:
        got.set_result(list(fds))
        fds.clear()

    async def ensure(request: EnsureRun) -> Running:
        calls.append(request.name)
        return Running(run="r", pid=1)

    before = len(open_descriptors())
    mine, theirs = pair()
    with _few_descriptors():
        asked = Channel(mine)
        serving = Channel(theirs, by_op(NewAuditSocket.on_fds(take), EnsureRun.on(ensure)))
        null = os.open("/dev/null", os.O_RDONLY)
        asked.tell(NewAuditSocket(), fds=[null])
        behind = asyncio.create_task(asked.ask(EnsureRun(name="behind"), timeout=20))
        taken = _take_every_descriptor()
        looked.clear()
        await looked.wait()  # once more: it was looked at in vain before
        assert not got.done() and not calls, "what comes behind it waits, too"
        os.close(taken.pop())
        (fd,) = await got
        assert (await behind).run == "r"
        assert caplog.messages == ["no descriptor is free to receive what peer sent; it waits"]
        for left in (*taken, fd, null):
            os.close(left)
    asked.close()
    serving.close()
    await asyncio.sleep(0)
    assert len(open_descriptors()) == before


async def test_last_words_of_a_peer_that_reads_nothing_wait_for_their_descriptors_too() -> None:
    got: asyncio.Future[list[int]] = asyncio.get_running_loop().create_future()

    async def take(_: NewAuditSocket, fds: list[int]) -> None:
        got.set_result(list(fds))
        fds.clear()

    mine, theirs = pair()
    with _few_descriptors():
        serving = Channel(mine, by_op(NewAuditSocket.on_fds(take)))
        null = os.open("/dev/null", os.O_RDONLY)
        send_packet(theirs, json.dumps({"op": NewAuditSocket.op}).encode(), [null])
        theirs.close()
        taken = _take_every_descriptor()
        serving.tell(EnsureRun(name="x"))
        for _ in range(5):
            await asyncio.sleep(0)
        assert not serving.closed.is_set()
        os.close(taken.pop())
        async with asyncio.timeout(seconds(20)):
            (fd,) = await got
            await serving.closed.wait()
        for left in (*taken, fd, null):
            os.close(left)


async def test_request_whose_descriptors_find_no_room_is_refused_at_once() -> None:
    async def take(_: NewAuditSocket, fds: list[int]) -> None:
        raise AssertionError("the handler was called")

    mine, theirs = pair()
    with _few_descriptors():
        asked, serving = Channel(mine), Channel(theirs, by_op(NewAuditSocket.on_fds(take)))
        null = os.open("/dev/null", os.O_RDONLY)
        asking = asyncio.create_task(asked.ask(NewAuditSocket(), fds=[null], timeout=20))
        await asyncio.sleep(0)  # it is sent
        taken = _take_every_descriptor()
        with pytest.raises(IsolatorError, match="no descriptor is free"):
            await asking
        for fd in (*taken, null):
            os.close(fd)
    asked.close()
    serving.close()
