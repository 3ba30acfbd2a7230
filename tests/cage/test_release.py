"""A removal of a cage that is broken off, or met by something else, leaves nothing once it has been repeated."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any, cast

import pytest

from isolator.cage import cage as cage_module
from isolator.layers.cgroup.leaf import Leaf
from isolator.layers.network.layer import Network
from tests.support.cage_fixture import cage, leaves
from tests.support.timeouts import seconds


async def test_removal_of_a_cage_that_was_taken_over_can_be_broken_off_and_repeated(
    shared_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing is left of its parked process then, which has another parent: 0 would be everybody's group."""
    async with cage(shared_dir, ["sleep", "60"]) as started:
        assert started.cage._spare is not None
        started.cage._spare.pid = 0
        real, reached = cage_module.empty, asyncio.Event()

        async def hang(_: Leaf) -> None:
            reached.set()
            await asyncio.Event().wait()

        monkeypatch.setattr(cage_module, "empty", hang)
        releasing = asyncio.create_task(started.cage.release())
        await reached.wait()
        releasing.cancel()
        await asyncio.wait([releasing])
        monkeypatch.setattr(cage_module, "empty", real)
        async with asyncio.timeout(seconds(20)):
            await started.cage.release()
        assert not started.session.runtime.journal.open.keys() & {started.cage.spec.leaf}
    assert not leaves(shared_dir)


class _Keeps:
    """A launcher that has no room for an order until it is told to."""

    def __init__(self) -> None:
        self.room, self.forgot = asyncio.Event(), list[str]()

    async def keep(self, cage: str, cgroup: int) -> None:
        await self.room.wait()

    def forget(self, cage: str) -> None:
        self.forgot.append(cage)


async def test_launcher_that_a_cage_is_given_to_as_it_is_removed_forgets_it(
    shared_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with cage(shared_dir, ["sleep", "60"]) as started:
        launcher = _Keeps()
        giving = asyncio.create_task(started.cage.be_kept_by(cast(Any, launcher)))
        await asyncio.sleep(0)
        monkeypatch.setattr(Network, "release", lambda _: launcher.room.set())  # its processes are killed by then
        await started.cage.release()
        await giving
        assert launcher.forgot == [started.cage.spec.leaf]
