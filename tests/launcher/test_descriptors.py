"""Descriptors of the launcher: none is kept for a start that failed, and a full table refuses without an end."""

from __future__ import annotations

import os
import resource
import secrets
import signal
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from isolator.cage.cage import Cage, Stdio
from isolator.errors import ConfinementError
from isolator.ipc.channel import pair
from isolator.launcher import client
from isolator.launcher.client import Clone, Launcher
from isolator.layers.ledger import EVERY_LAYER
from isolator.linux.readable import readable
from isolator.paths import Paths
from isolator.policy.host import HostConfig
from isolator.standalone.session import StandaloneSession, run_spec
from tests.support.cage_fixture import leaves, policy
from tests.support.timeouts import seconds


@pytest.fixture
async def launcher() -> AsyncIterator[Launcher]:
    made = Launcher()
    yield made
    made.close()


async def _park(launcher: Launcher) -> None:
    """Park a process and let it end again."""
    link, theirs = pair()
    read, write = os.pipe()
    try:
        parked = await launcher.park(theirs.fileno(), write, layers=EVERY_LAYER)
    finally:
        link.close()
        theirs.close()
        os.close(read)
        os.close(write)
    await _ended(parked)


async def _ended(parked: Clone) -> None:
    await readable(parked.pidfd)
    os.close(parked.pidfd)
    os.waitpid(parked.pid, 0)


def _open(pid: int) -> int:
    return len(os.listdir(f"/proc/{pid}/fd"))


async def test_start_that_failed_before_its_clone_leaves_the_launcher_no_descriptor(shared_dir: Path) -> None:
    class Late(Cage):
        async def _confirmed(self, *args: object) -> None:
            raise ConfinementError("test", "given up before the clone")

    async with StandaloneSession(Paths.of(shared_dir)) as session:
        null = os.open("/dev/null", os.O_RDWR)
        found = []
        for _start in range(4):
            uid = session.lease(HostConfig()).uid
            spec = run_spec(session.paths, policy(), ["true"], secrets.token_hex(5), uid, [])
            async with Late(spec, session.runtime, Stdio(null, null, null)) as cage:
                with pytest.raises(ConfinementError, match="given up"):
                    await cage.start()
            for _ in range(2):  # what is sent from a task is on its way after the first, and read before the second
                await session.runtime.launcher.alive()
            found.append(_open(session.runtime.launcher.pid))
        os.close(null)
        assert len(set(found[1:])) == 1, found
    assert not leaves(shared_dir)


async def test_full_table_refuses_and_ends_nothing(launcher: Launcher) -> None:
    await _park(launcher)
    await launcher.alive()  # it has closed what it sent on
    _, hard = resource.prlimit(launcher.pid, resource.RLIMIT_NOFILE)
    assert _open(launcher.pid) == 4, "0, 1, 2 and its socket"
    for room in range(3):  # for neither, for one, for both of what a park sends, but not for the pidfd
        resource.prlimit(launcher.pid, resource.RLIMIT_NOFILE, (3 + room, hard))
        with pytest.raises(ConfinementError, match="Too many open files; allow the daemon more"):
            await _park(launcher)
    await launcher.keep("a cage", 0)
    await launcher.alive()
    resource.prlimit(launcher.pid, resource.RLIMIT_NOFILE, (hard, hard))
    await _park(launcher)
    assert not launcher.closed.is_set()


def _highest(pid: int) -> int:
    return max(map(int, os.listdir(f"/proc/{pid}/fd")))


async def test_pidfd_without_room_here_fails_that_start_alone(launcher: Launcher) -> None:
    await _park(launcher)
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    link, theirs = pair()
    read, write = os.pipe()
    resource.setrlimit(resource.RLIMIT_NOFILE, (_highest(os.getpid()), limits[1]))
    held = []
    try:
        while True:
            held.append(os.dup(0))
    except OSError:
        pass
    try:
        with pytest.raises(ConfinementError, match="Too many open files"):
            await launcher.park(theirs.fileno(), write, layers=EVERY_LAYER)
    finally:
        for fd in held:
            os.close(fd)
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
        link.close()
        theirs.close()
        os.close(read)
        os.close(write)
    await _park(launcher)


async def test_launcher_that_hangs_is_closed_all_the_same(launcher: Launcher, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client, "_END_SECONDS", seconds(0.2))
    await launcher.alive()
    os.kill(launcher.pid, signal.SIGSTOP)
    launcher.close()
    assert launcher._process.wait() == -signal.SIGKILL
