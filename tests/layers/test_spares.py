"""What is made ahead of a start: used once, replaced when it cannot be used, and nothing of it is left."""

from __future__ import annotations

import asyncio
import contextlib
import os
import secrets
import select
import signal
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from isolator import recovery
from isolator.errors import ConfinementError
from isolator.ipc import pair
from isolator.journal import Entry
from isolator.launch.client import Launcher
from isolator.layers import network as network_layer
from isolator.layers.cgroup import Leaf
from isolator.oneoff import Workshop, run_spec
from isolator.paths import Paths
from isolator.policy.hostconfig import HostConfig
from isolator.sandbox import EVERY_LAYER, Sandbox, Stdio, Tools
from isolator.spares import PREFIX
from tests.layers.lab import leaves, policy


@pytest.fixture
async def shop(shared_dir: Path) -> AsyncIterator[Workshop]:
    async with Workshop(Paths.of(shared_dir)) as shop:
        yield shop
    assert not leaves(shared_dir)


@contextlib.asynccontextmanager
async def _cage(shop: Workshop, *argv: str) -> AsyncIterator[Sandbox]:
    lease = shop.lease(HostConfig())
    null = os.open("/dev/null", os.O_RDWR)
    try:
        spec = run_spec(shop.paths, policy(), list(argv), secrets.token_hex(5), lease.uid, [])
        async with Sandbox(spec, shop.tools, Stdio(null, null, null)) as cage:
            yield cage
    finally:
        os.close(null)


async def _ahead(tools: Tools) -> int:
    """Have one made; its parked process."""
    tools.spares.begin(EVERY_LAYER)
    await tools.spares.filled()
    assert tools.spares._waiting is not None
    return _pid((await tools.spares._waiting).pidfd)


def _pid(pidfd: int) -> int:
    lines = Path(f"/proc/self/fdinfo/{pidfd}").read_text().splitlines()
    return int(next(line.split()[1] for line in lines if line.startswith("Pid:")))


async def test_a_start_uses_what_was_made_ahead_once(shop: Workshop) -> None:
    await _ahead(shop.tools)
    assert shop.tools.spares._waiting is not None
    network = (await shop.tools.spares._waiting).network
    async with _cage(shop, "true") as cage:
        await cage.start()
        assert cage.network is network
        assert shop.tools.spares._waiting is None
        assert (await cage.wait()).exit_code == 0


async def test_a_parked_process_is_in_the_groups_but_not_in_a_cage(shop: Workshop) -> None:
    pid = await _ahead(shop.tools)
    groups = Path(f"/proc/{pid}/cgroup").read_text()
    if shop.tools.subtree.v1:
        assert f"/{PREFIX}" in groups
        assert any(name.startswith(PREFIX) for name in shop.tools.journal.open), "it is journalled"
    for kind in ("mnt", "ipc", "uts"):
        assert os.readlink(f"/proc/{pid}/ns/{kind}") != os.readlink(f"/proc/self/ns/{kind}")
    fds = {fd: os.readlink(f"/proc/{pid}/fd/{fd}") for fd in os.listdir(f"/proc/{pid}/fd")}
    held = {target.partition(":")[0] for fd, target in fds.items() if int(fd) > 2 and "landlock" not in target}
    assert held == {"pipe", "socket"} and len(fds) <= 6, (
        "its link, its status pipe, its ruleset; nothing of other cages"
    )


async def test_one_whose_process_was_killed_is_not_used(shop: Workshop) -> None:
    pid = await _ahead(shop.tools)
    with os.fdopen(os.pidfd_open(pid), "rb") as pidfd:
        os.kill(pid, signal.SIGKILL)
        assert select.select([pidfd], [], [], 10)[0]
    async with _cage(shop, "true") as cage:
        await cage.start()
        assert (await cage.wait()).exit_code == 0


async def test_one_whose_process_dies_at_the_last_moment_fails_the_start_and_leaves_nothing(shop: Workshop) -> None:
    pid = await _ahead(shop.tools)

    class Late(Sandbox):
        async def _build(self, *args: object) -> None:
            raise ConfinementError("test", "given up before a word of the clone")

    os.kill(pid, signal.SIGSTOP)
    null = os.open("/dev/null", os.O_RDWR)
    try:
        spec = run_spec(shop.paths, policy(), ["true"], secrets.token_hex(5), shop.lease(HostConfig()).uid, [])
        async with Late(spec, shop.tools, Stdio(null, null, null)) as cage:
            with pytest.raises(ConfinementError, match="given up"):
                await cage.start()
            os.kill(pid, signal.SIGCONT)  # it reads the plan now, clones, and the clone has to be found
    finally:
        os.close(null)


async def test_a_start_that_is_cancelled_leaves_nothing(shop: Workshop) -> None:
    """At every await: the n-th turn of the event loop, until the start is quicker."""
    await _ahead(shop.tools)
    for turns in range(1, 400, 3):
        async with _cage(shop, "sleep", "300") as cage:
            start = asyncio.create_task(cage.start())
            for _ in range(turns):
                await asyncio.sleep(0)
            done = start.done()
            start.cancel()
            await asyncio.wait([start])
        if done:
            break
    assert all(name == "subtree" for name in shop.tools.journal.open)


async def test_one_that_comes_as_its_start_is_cancelled_is_reaped(shop: Workshop) -> None:
    await _ahead(shop.tools)
    launcher, loop, (link, its_link), (status, its_status) = (
        shop.tools.launcher, asyncio.get_running_loop(), pair(), os.pipe(),
    )  # fmt: skip
    before = _pidfds()
    parking = asyncio.create_task(launcher.park(its_link.fileno(), its_status, layers=frozenset()))

    def answered() -> None:
        launcher._readable()
        parking.cancel()  # before the task has had its turn

    loop.add_reader(launcher._sock, answered)
    with pytest.raises(asyncio.CancelledError):
        await parking
    loop.add_reader(launcher._sock, launcher._readable)
    its_link.close()
    os.close(its_status)
    link.close()
    assert await asyncio.to_thread(os.read, status, 1) == b"", "the parked process has ended"
    os.close(status)
    assert _pidfds() == before


def _pidfds() -> list[str]:
    links = (os.readlink(path) for path in Path("/proc/self/fd").iterdir() if path.is_symlink())
    return [target for target in links if "pidfd" in target]


async def test_it_is_not_used_with_another_launcher(shop: Workshop) -> None:
    await _ahead(shop.tools)
    shop.tools.launcher.close()
    shop.tools.launcher = Launcher()
    try:
        async with _cage(shop, "true") as cage:
            await cage.start()
            assert (await cage.wait()).exit_code == 0
    finally:
        shop.tools.launcher.close()


async def test_a_network_without_rules_never_gets_a_process(shop: Workshop, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*args: object, **others: object) -> None:
        raise ConfinementError("network", "no rules today")

    monkeypatch.setattr(network_layer, "load", broken)
    async with _cage(shop, "true") as cage:
        with pytest.raises(ConfinementError, match="no rules today"):
            await cage.start()


async def test_rules_that_were_not_loaded_are_noticed(shop: Workshop, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(network_layer, "load", lambda *args, **others: None)
    async with _cage(shop, "true") as cage:
        with pytest.raises(ConfinementError, match="ruleset"):
            await cage.start()


async def test_what_a_killed_daemon_had_ready_is_found_and_named(shop: Workshop) -> None:
    tools = shop.tools
    if not tools.subtree.v1:
        pytest.skip("on cgroup v2 nothing of it is outside a process")
    groups = Leaf.under(tools.subtree, f"{PREFIX}0123")
    groups.create_v1()
    entry = Entry(f"{PREFIX}0123", "leaf", tuple(map(str, dict.fromkeys(groups.v1.values()))))
    try:
        found = recovery.find(shop.paths, {entry.name: entry})
        assert [(left.kind, left.name) for left in found if left.name == entry.name] == [("spare", entry.name)]
    finally:
        groups.remove()
