"""Processes of the daemon's services."""

from __future__ import annotations

import contextlib
import os
import resource
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from isolator.broker import hardening
from isolator.errors import UnavailableError
from isolator.ipc.channel import Channel
from isolator.layers.cgroup.subtree import Subtree, find_hierarchies
from isolator.linux.child import Child
from isolator.recovery.journal import Journal
from isolator.supervisor.service import ChildProcess, ServiceSpec, Ways
from isolator.supervisor.zygote import Zygote, Zygotes
from tests.support.descriptors import open_descriptors, opened_since

SPEC = ServiceSpec("shown", "tests.supervisor.forked", 64998, 64997)
WAITS = ServiceSpec("shown", "tests.supervisor.waits", 64998, 64997)


@pytest.fixture
def subtree() -> Iterator[Subtree]:
    own = find_hierarchies().unified
    assert own is not None
    made = Subtree(own / f"isolator-test-{os.getpid()}", {}, frozenset())
    made.unified.mkdir()
    yield made
    made.unified.rmdir()


async def test_nothing_is_left_of_a_process_that_cannot_be_put_into_its_group(subtree: Subtree, tmp_path: Path) -> None:
    forked = []

    class Removed(Zygote):
        """Somebody removes the empty group while the process is forked."""

        async def fork(self, spec: ServiceSpec, descriptors: Mapping[str, int]) -> Child:
            forked.append(await super().fork(spec, descriptors))
            (leaf,) = subtree.unified.glob("service.*")
            leaf.rmdir()
            return forked[-1]

    nobody: Any = None
    descriptors = open_descriptors()
    with contextlib.closing(Journal(tmp_path / "journal")) as journal:
        service = ChildProcess(SPEC, Zygotes(), subtree, journal, nobody)
        zygote = Removed()
        try:
            await zygote.ready()
            with pytest.raises(FileNotFoundError):
                await service.spawn(zygote, {})
        finally:
            await zygote.end()
        assert not journal.open
        with pytest.raises(ChildProcessError):  # it is reaped
            os.waitpid(forked[0].pid, os.WNOHANG)
    assert not opened_since(descriptors)


async def test_service_that_is_needed_is_started_once_and_again_until_it_is_up(
    subtree: Subtree, tmp_path: Path
) -> None:
    failed: list[str] = []
    health: Any = SimpleNamespace(
        does_not_start=lambda _, error: failed.append(str(error)), is_up=lambda _: None, ended=lambda *_, **__: None
    )

    async def introduce(_: Channel) -> None:
        if len(failed) < 2:
            raise UnavailableError("shown", f"not up after {len(failed)} failures", "wait")

    with contextlib.closing(Journal(tmp_path / "journal")) as journal:
        service = ChildProcess(WAITS, Zygotes(), subtree, journal, health)
        service.ways = Ways(introduce)
        assert not service.begun and service.current is None
        service.need()
        service.need()
        channel = await service.wait_up()
        assert service.begun and service.starts == 3 and not channel.closed.is_set()
        assert [error.count(f"not up after {number} failures") for number, error in enumerate(failed)] == [1, 1]
        assert len(list(subtree.unified.glob("service.*"))) == 1, "a process that did not come up is left"
        await service.stop()
        assert not journal.open


async def test_service_that_was_stopped_before_it_was_needed_is_not_started(subtree: Subtree, tmp_path: Path) -> None:
    nobody: Any = None
    with contextlib.closing(Journal(tmp_path / "journal")) as journal:
        service = ChildProcess(WAITS, Zygotes(), subtree, journal, nobody)
        await service.stop()
        service.need()
        assert not service.begun


async def test_descriptors_of_a_process_that_cannot_be_begun_are_closed(subtree: Subtree, tmp_path: Path) -> None:
    """It is tried again every few seconds, for as long as it takes."""
    nobody: Any = None
    with contextlib.closing(Journal(tmp_path / "journal")) as journal:
        service = ChildProcess(WAITS, Zygotes(), subtree, journal, nobody)
        given = os.memfd_create("given")
        limits = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (given, limits[1]))
        try:
            with pytest.raises(OSError, match="Too many open files"):
                await service.spawn(nobody, {"given": given})
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, limits)
        with pytest.raises(OSError, match="Bad file descriptor"):
            os.fstat(given)


def test_filter_that_cannot_be_compiled_leaves_no_descriptor(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(*_: object) -> bytes:
        raise OSError

    monkeypatch.setattr(hardening, "compiled_rules", failing)
    before = open_descriptors()
    with pytest.raises(OSError):
        hardening.filter_file(tmp_path)
    assert not opened_since(before)
