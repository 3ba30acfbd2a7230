"""What is made ahead of a start: used once, replaced when it cannot be used, and nothing of it is left."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import secrets
import select
import signal
from collections.abc import AsyncIterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from isolator.cage.cage import Cage, Stdio
from isolator.cage.parking import PREFIX
from isolator.cage.runtime import CageRuntime
from isolator.cage.warm_pool import Spare, WarmPool
from isolator.errors import ConfinementError
from isolator.ipc.channel import pair, send_packet
from isolator.launcher.client import Launcher
from isolator.layers.cgroup.leaf import Leaf
from isolator.layers.ledger import EVERY_LAYER
from isolator.layers.network import namespace as network_layer
from isolator.linux.descriptors import FdSet
from isolator.paths import Paths
from isolator.policy.host import HostConfig
from isolator.policy.model import NetworkPolicy
from isolator.recovery import daemon as recovery
from isolator.recovery.journal import Entry
from isolator.standalone.session import StandaloneSession, run_spec
from tests.support.cage_fixture import leaves, policy
from tests.support.descriptors import open_descriptors, opened_since


@pytest.fixture
async def session(shared_dir: Path) -> AsyncIterator[StandaloneSession]:
    async with StandaloneSession(Paths.of(shared_dir)) as session:
        yield session
    assert not leaves(shared_dir)


@contextlib.asynccontextmanager
async def _cage(session: StandaloneSession, *argv: str) -> AsyncIterator[Cage]:
    lease = session.lease(HostConfig())
    null = os.open("/dev/null", os.O_RDWR)
    try:
        spec = run_spec(session.paths, policy(), list(argv), secrets.token_hex(5), lease.uid, [])
        async with Cage(spec, session.runtime, Stdio(null, null, null)) as cage:
            yield cage
    finally:
        os.close(null)


async def _ahead(runtime: CageRuntime) -> int:
    """Have one made; its parked process."""
    runtime.pool.begin(EVERY_LAYER)
    await runtime.pool.filled()
    assert runtime.pool._waiting is not None
    return _pid((await runtime.pool._waiting).pidfd)


async def _take(session: StandaloneSession, network: NetworkPolicy) -> Spare:
    """One for a cage that does not come to be, in groups of its own, which are journalled no more if it has it."""
    journal, name = session.runtime.journal, f"_test.{secrets.token_hex(5)}"

    leaf = Leaf.under(session.runtime.subtree, name)

    def claimed() -> Leaf:
        journal.record(Entry(name, "leaf", tuple(map(str, leaf.folders()))))
        return leaf

    spare = await session.runtime.pool.take(EVERY_LAYER, network, claimed)
    journal.forget(name)
    return spare


def _pid(pidfd: int) -> int:
    lines = Path(f"/proc/self/fdinfo/{pidfd}").read_text().splitlines()
    return int(next(line.split()[1] for line in lines if line.startswith("Pid:")))


async def test_a_start_uses_what_was_made_ahead_once(session: StandaloneSession) -> None:
    await _ahead(session.runtime)
    assert session.runtime.pool._waiting is not None
    network = (await session.runtime.pool._waiting).network
    async with _cage(session, "true") as cage:
        await cage.start()
        assert cage.network is network
        assert session.runtime.pool._waiting is None
        assert (await cage.wait()).exit_code == 0


async def test_rules_of_the_last_taker_are_there_ahead_and_those_of_another_cage_replace_them(
    session: StandaloneSession,
) -> None:
    public = NetworkPolicy(mode="public")
    await (await _take(session, public)).release()
    await _ahead(session.runtime)
    assert session.runtime.pool._waiting is not None
    network = (await session.runtime.pool._waiting).network
    assert network is not None and network_layer.is_loaded(network, public)
    async with _cage(session, "true") as cage:
        own = cage.spec.policy.network
        assert not network_layer.is_loaded(network, own)
        await cage.start()
        assert cage.network is network and network_layer.is_loaded(network, own)


async def test_network_of_each_of_several_takers_at_once_has_its_own_rules(session: StandaloneSession) -> None:
    policies = [NetworkPolicy(mode="none"), NetworkPolicy(mode="public"), NetworkPolicy(mode="public", connects_open=7)]
    alone = await _take(session, policies[1])
    spares = await asyncio.gather(*(_take(session, policy) for policy in policies))
    try:
        assert alone.network is not None and not network_layer.is_loaded(alone.network, policies[1])
        for policy, spare in zip(policies[1:], spares[1:], strict=True):
            assert spare.network is not None and network_layer.is_loaded(spare.network, policy)
            network_layer.confirm(spare.network, policy)
    finally:
        for spare in (alone, *spares):
            await spare.release()


async def test_spare_without_groups_is_ready_too_once_it_waits(session: StandaloneSession) -> None:
    layers = EVERY_LAYER - {"cgroup", "network"}  # nothing else takes its time meanwhile
    for _ in range(10):
        session.runtime.pool.begin(layers)
        await session.runtime.pool.filled()
        spare = await session.runtime.pool.take(layers, NetworkPolicy(mode="none"), _no_leaf)
        try:
            mounts = Path(f"/proc/{spare.pid}/mountinfo").read_text()
            assert " /run/isolator " in mounts and " /sys/devices/system/cpu " in mounts, "its own view is made"
        finally:
            await spare.release()


def _no_leaf() -> Leaf:
    raise AssertionError("the one that waits fits")


async def test_a_parked_process_is_in_the_groups_but_not_in_a_cage(session: StandaloneSession) -> None:
    pid = await _ahead(session.runtime)
    groups = Path(f"/proc/{pid}/cgroup").read_text()
    if session.runtime.subtree.v1:
        assert f"/{PREFIX}" in groups
        assert any(name.startswith(PREFIX) for name in session.runtime.journal.open), "it is journalled"
    for kind in ("mnt", "ipc", "uts"):
        assert os.readlink(f"/proc/{pid}/ns/{kind}") != os.readlink(f"/proc/self/ns/{kind}")
    fds = {fd: os.readlink(f"/proc/{pid}/fd/{fd}") for fd in os.listdir(f"/proc/{pid}/fd")}
    held = {target.partition(":")[0] for fd, target in fds.items() if int(fd) > 2 and "landlock" not in target}
    assert held == {"pipe", "socket"} and len(fds) <= 6, (
        "its link, its status pipe, its ruleset; nothing of other cages"
    )


@pytest.mark.parametrize(
    ("file", "complaint"),
    [("/dev/full", "parked process: No space left"), ("/dev/null", "group is another, not /isolator")],
)
async def test_one_that_is_not_in_its_groups_is_refused(
    session: StandaloneSession, monkeypatch: pytest.MonkeyPatch, file: str, complaint: str
) -> None:
    if not session.runtime.subtree.v1:
        pytest.skip("on cgroup v2 a parked process is in no group of a cage")

    def elsewhere(_groups: Leaf, owner: FdSet) -> list[int]:
        return [owner.add(os.open(file, os.O_WRONLY | os.O_CLOEXEC))]

    monkeypatch.setattr(Leaf, "open_v1", elsewhere)
    async with _cage(session, "true") as cage:
        with pytest.raises(ConfinementError, match=complaint):
            await cage.start()
    assert all(name == "subtree" for name in session.runtime.journal.open)
    assert all(not list(folder.glob(f"{PREFIX}*")) for folder in session.runtime.subtree.folders())


async def test_one_whose_process_was_killed_is_not_used(session: StandaloneSession) -> None:
    pid = await _ahead(session.runtime)
    with os.fdopen(os.pidfd_open(pid), "rb") as pidfd:
        os.kill(pid, signal.SIGKILL)
        assert select.select([pidfd], [], [], 10)[0]
    async with _cage(session, "true") as cage:
        await cage.start()
        assert (await cage.wait()).exit_code == 0


async def test_one_whose_process_dies_at_the_last_moment_fails_the_start_and_leaves_nothing(
    session: StandaloneSession,
) -> None:
    pid = await _ahead(session.runtime)

    class Late(Cage):
        async def _confirmed(self, *args: object) -> None:
            raise ConfinementError("test", "given up before a word of the clone")

    os.kill(pid, signal.SIGSTOP)
    null = os.open("/dev/null", os.O_RDWR)
    try:
        spec = run_spec(session.paths, policy(), ["true"], secrets.token_hex(5), session.lease(HostConfig()).uid, [])
        async with Late(spec, session.runtime, Stdio(null, null, null)) as cage:
            with pytest.raises(ConfinementError, match="given up"):
                await cage.start()
            os.kill(pid, signal.SIGCONT)  # it reads the plan now, clones, and the clone has to be found
    finally:
        os.close(null)


async def test_a_start_that_is_cancelled_leaves_nothing(session: StandaloneSession) -> None:
    """At every await: the n-th turn of the event loop, until the start is quicker."""
    await _ahead(session.runtime)
    for turns in range(1, 400, 3):
        async with _cage(session, "sleep", "300") as cage:
            start = asyncio.create_task(cage.start())
            for _ in range(turns):
                await asyncio.sleep(0)
            done = start.done()
            start.cancel()
            await asyncio.wait([start])
        if done:
            break
    await session.runtime.pool.close()
    assert all(name == "subtree" for name in session.runtime.journal.open)


async def test_groups_of_a_cancelled_taker_are_journalled_until_they_are_gone(session: StandaloneSession) -> None:
    journal, subtree = session.runtime.journal, session.runtime.subtree

    def left() -> set[str]:
        return {one.name for folder in subtree.folders() for one in folder.glob("_test.*")}

    for turns in range(1, 200, 5):
        taking = asyncio.create_task(_take(session, NetworkPolicy()))
        for _ in range(turns):
            await asyncio.sleep(0)
        taking.cancel()
        await asyncio.wait([taking])
        if not taking.cancelled():
            await taking.result().release()
        assert left() <= journal.open.keys()
    await session.runtime.pool.close()
    assert not left() and all(name == "subtree" for name in journal.open)


async def test_link_to_a_parked_process_that_has_died_of_a_packet_is_written_to_without_an_error() -> None:
    link, its = pair()
    send_packet(link, b"unread")
    its.close()
    for _ in range(2):  # ECONNRESET, then EPIPE
        Spare.send(cast(Any, SimpleNamespace(link=link)), b"x", [])
    link.close()


async def test_start_that_nothing_was_made_ahead_for_is_in_its_own_groups_from_the_first(
    session: StandaloneSession, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Leaf, "rename_v1", lambda *_: pytest.fail("they had another name"))
    async with _cage(session, "true") as cage:
        await cage.start()
        assert (await cage.wait()).exit_code == 0
        assert [entry.kind for entry in session.runtime.journal.open.values()] == ["subtree", "leaf"]
        assert PREFIX not in Path(f"/proc/self/fd/{session.runtime.journal.descriptor}").read_text()


async def test_a_taker_that_is_cancelled_over_and_over_leaves_nothing(session: StandaloneSession) -> None:
    pool = session.runtime.pool
    await (await _take(session, NetworkPolicy())).release()
    before = open_descriptors()
    for turns in range(1, 400, 7):
        taking = asyncio.create_task(_take(session, NetworkPolicy()))
        for _ in range(turns):
            await asyncio.sleep(0)
        for _ in range(3):
            taking.cancel()
            await asyncio.sleep(0)
        await asyncio.wait([taking])
        if not taking.cancelled():
            await taking.result().release()
        await pool.close()
        pool.reopen()
        assert (turns, opened_since(before)) == (turns, set())
    assert all(name == "subtree" for name in session.runtime.journal.open)


async def test_one_that_comes_as_its_start_is_cancelled_is_reaped(session: StandaloneSession) -> None:
    await _ahead(session.runtime)
    launcher, loop, (link, its_link), (status, its_status) = (
        session.runtime.launcher, asyncio.get_running_loop(), pair(), os.pipe(),
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


async def test_it_is_not_used_with_another_launcher(session: StandaloneSession) -> None:
    await _ahead(session.runtime)
    session.runtime.launcher.close()
    session.runtime.launcher = Launcher()
    try:
        async with _cage(session, "true") as cage:
            await cage.start()
            assert (await cage.wait()).exit_code == 0
    finally:
        session.runtime.launcher.close()


async def test_a_network_without_rules_never_gets_a_process(
    session: StandaloneSession, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*args: object, **others: object) -> None:
        raise OSError("no rules today")

    monkeypatch.setattr(network_layer, "_load", broken)
    async with _cage(session, "true") as cage:
        with pytest.raises(ConfinementError, match="no rules today"):
            await cage.start()


@pytest.mark.parametrize(
    ("left_out", "complaint"), [("_load", "is not the one that was loaded"), ("load", "is that of another policy")]
)
async def test_rules_that_were_not_loaded_are_noticed(
    session: StandaloneSession, monkeypatch: pytest.MonkeyPatch, left_out: str, complaint: str
) -> None:
    await (await _take(session, NetworkPolicy(mode="public"))).release()
    monkeypatch.setattr(network_layer, left_out, lambda *args, **others: None)
    await _ahead(session.runtime)
    async with _cage(session, "true") as cage:
        with pytest.raises(ConfinementError, match=complaint):
            await cage.start()


async def test_what_a_killed_daemon_had_ready_is_found_and_named(session: StandaloneSession) -> None:
    runtime = session.runtime
    if not runtime.subtree.v1:
        pytest.skip("on cgroup v2 nothing of it is outside a process")
    groups = Leaf.under(runtime.subtree, f"{PREFIX}0123")
    groups.create_v1()
    entry = Entry(f"{PREFIX}0123", "spare", tuple(map(str, dict.fromkeys(groups.v1.values()))))
    try:
        found = recovery.find(session.paths, {entry.name: entry})
        assert [(left.kind, left.name) for left in found if left.name == entry.name] == [("spare", entry.name)]
    finally:
        groups.remove()


async def test_launcher_that_cannot_be_started_leaves_nothing_of_a_start(session: StandaloneSession) -> None:
    runtime = session.runtime

    def no_launcher() -> Launcher:
        raise BlockingIOError(errno.EAGAIN, "no process is left")

    pool = WarmPool(no_launcher, runtime.journal, runtime.subtree)
    before, leaf = open_descriptors(), Leaf.under(runtime.subtree, f"_test.{secrets.token_hex(5)}")
    with pytest.raises(BlockingIOError):
        await pool.take(EVERY_LAYER, NetworkPolicy(mode="none"), lambda: leaf)
    pool.begin(EVERY_LAYER)
    await pool.filled()
    assert not opened_since(before)
    assert not any(folder.exists() for folder in leaf.folders())
    assert not any(name.startswith(PREFIX) for name in runtime.journal.open)
