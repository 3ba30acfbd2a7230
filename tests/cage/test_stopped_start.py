"""A start that is stopped comes to its end at once, whichever process it waits for hangs, and leaves nothing."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import secrets
import signal
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from isolator.cage import warm_pool
from isolator.cage.cage import Cage, Stdio
from isolator.cage.warm_pool import Spare
from isolator.errors import ConfinementError
from isolator.ipc.packet import pair, receive_packet, send_packet
from isolator.launcher.client import Launcher
from isolator.layers.ledger import EVERY_LAYER
from isolator.layers.network import namespace as network_layer
from isolator.layers.stopwatch import Stopwatch
from isolator.linux.descriptors import close_all
from isolator.linux.readable import readable
from isolator.paths import Paths
from isolator.policy.host import HostConfig
from isolator.standalone.session import StandaloneSession, run_spec
from tests.support.cage_fixture import leaves, policy
from tests.support.descriptors import none_free
from tests.support.timeouts import seconds


@pytest.fixture
async def session(shared_dir: Path) -> AsyncIterator[StandaloneSession]:
    async with StandaloneSession(Paths.of(shared_dir)) as session:
        yield session
        await session.runtime.pool.close()
        assert all(name == "subtree" for name in session.runtime.journal.open)
    assert not leaves(shared_dir)


@contextlib.asynccontextmanager
async def _cage(
    session: StandaloneSession, *argv: str, cage_type: type[Cage] = Cage, **further: Any
) -> AsyncIterator[Cage]:
    null = os.open("/dev/null", os.O_RDWR)
    try:
        uid = session.lease(HostConfig()).uid
        spec = run_spec(session.paths, policy(), list(argv), secrets.token_hex(5), uid, [])
        async with (
            asyncio.timeout(seconds(15)),  # less than a cage has to be built in
            cage_type(spec, session.runtime, Stdio(null, null, null), **further) as cage,
        ):
            yield cage
    finally:
        os.close(null)


async def _parked(session: StandaloneSession) -> int:
    """Have a process parked; its pid."""
    session.runtime.pool.begin(EVERY_LAYER)
    await session.runtime.pool.filled()
    assert session.runtime.pool._waiting is not None
    return (await session.runtime.pool._waiting).pid


@contextlib.contextmanager
def _hanging(pid: int) -> Iterator[None]:
    os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGCONT)


async def test_start_is_stopped_that_waits_for_room_at_a_launcher_that_hangs(
    session: StandaloneSession, monkeypatch: pytest.MonkeyPatch
) -> None:
    stop, launcher = asyncio.Event(), session.runtime.launcher
    keep = Launcher.keep

    async def full(self: Launcher, cage: str, cgroup: int) -> None:
        with contextlib.suppress(BlockingIOError):
            while True:
                send_packet(self._sock, b'{"forget": "nothing"}')
        asyncio.get_running_loop().call_soon(stop.set)
        await keep(self, cage, cgroup)

    monkeypatch.setattr(Launcher, "keep", full)
    await _parked(session)
    with _hanging(launcher.pid):
        async with _cage(session, "true") as cage:
            assert not await cage.start(stop)
            await cage.release()


async def test_start_is_stopped_whose_parked_process_hangs(
    session: StandaloneSession, monkeypatch: pytest.MonkeyPatch
) -> None:
    stop = asyncio.Event()
    monkeypatch.setattr(Cage, "_wait_caged", _after(stop, Cage._wait_caged))
    with _hanging(await _parked(session)):
        async with _cage(session, "true") as cage:
            assert not await cage.start(stop)
            await cage.release()


def _after(stop: asyncio.Event, work: Any) -> Any:
    async def with_stop(*arguments: Any) -> Any:
        stop.set()
        return await work(*arguments)

    return with_stop


async def test_start_is_stopped_whose_network_nobody_takes(session: StandaloneSession) -> None:
    """As the broker does not that hangs."""
    stop = asyncio.Event()

    async def hang(_: network_layer.CageNetwork) -> None:
        stop.set()
        await asyncio.Event().wait()

    async with _cage(session, "true", handover=hang) as cage:
        assert not await cage.start(stop)
        await cage.release()


async def test_start_is_stopped_whose_first_process_hangs_before_its_exec(session: StandaloneSession) -> None:
    """Nobody can tell whether it has come to that: the end is one of a program that was stopped."""
    stop = asyncio.Event()

    class Hangs(Cage):
        async def _execute(self, stop: asyncio.Event) -> None:
            os.kill(self.pid, signal.SIGSTOP)
            asyncio.get_running_loop().call_later(0.01, stop.set)
            await super()._execute(stop)

    async with _cage(session, "true", cage_type=Hangs) as cage:
        assert await cage.start(stop)
        assert (await cage.wait()).cause == "stopped"


async def test_start_is_removed_whose_first_process_is_known_by_its_pid_alone(session: StandaloneSession) -> None:
    """No descriptor is free for its pidfd, and it has left the parked process's group, to wait for its exec."""
    pids: list[int] = []

    class Late(Cage):
        async def _wait_caged(self, spare: Spare, mark: Stopwatch) -> None:
            await readable(spare.link.fileno())
            packet, fds = receive_packet(spare.link, peek=True)
            close_all(fds)
            pids.append(json.loads(packet)["pid"])
            while os.getpgid(pids[0]) == spare.pid:  # noqa: ASYNC110 # nothing tells of it
                await asyncio.sleep(0.001)
            with none_free():
                await super()._wait_caged(spare, mark)

    async with _cage(session, "true", cage_type=Late) as cage:
        with pytest.raises(OSError, match="truncated packet"):
            await cage.start()
        await cage.release()
        with pytest.raises(ProcessLookupError):
            os.kill(pids[0], 0)


async def test_start_that_was_stopped_before_runs_nothing(session: StandaloneSession) -> None:
    stop = asyncio.Event()
    stop.set()
    async with _cage(session, "true") as cage:
        assert not await cage.start(stop) and not cage.started


async def test_spare_whose_process_hangs_is_removed(session: StandaloneSession) -> None:
    with _hanging(await _parked(session)):
        async with asyncio.timeout(seconds(15)):
            await session.runtime.pool.close()


async def test_process_that_says_nothing_as_it_is_parked_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(warm_pool, "_PARK_SECONDS", seconds(0.1))
    link, silent = pair()
    with link, silent:
        link.setblocking(False)
        with pytest.raises(ConfinementError, match="it has said nothing"):
            await warm_pool._parked(cast(Any, SimpleNamespace(link=link, groups=None)))
