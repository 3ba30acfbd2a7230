"""Events leave for the log once they are on disk, and not later."""

from __future__ import annotations

import asyncio
import os
import threading
from pathlib import Path

import pytest

from host.cluster.entries import Event
from host.database import wal
from host.database.store import Store
from isolator.errors import UnavailableError
from tests.cluster.hosts import Cluster


class Disk:
    """Syncs that wait until they may end; ``error`` is what they end with."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.begun, self.may_end, self.count = threading.Event(), threading.Event(), 0
        self.error: OSError | None = None
        sync = os.fdatasync

        def slow(fd: int) -> None:
            self.count += 1
            self.begun.set()
            assert self.may_end.wait(30)
            if self.error is not None:
                raise self.error
            sync(fd)

        monkeypatch.setattr(os, "fdatasync", slow)

    @staticmethod
    def by_thread(monkeypatch: pytest.MonkeyPatch) -> None:
        """Have stores that are opened from now on sync in their thread, which ``Disk`` holds up."""

        def none(_: int) -> None:
            raise OSError("not in this test")

        monkeypatch.setattr(wal, "FileSync", none)


async def test_what_is_committed_is_waited_for_with_the_sync_that_is_under_way(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Disk.by_thread(monkeypatch)
    database, disk = Store(tmp_path / "db"), Disk(monkeypatch)
    await database.durable()  # there is nothing to wait for
    assert disk.count == 0
    written = asyncio.create_task(database.run(lambda _: None))
    await asyncio.to_thread(disk.begun.wait, 30)
    waiting = asyncio.create_task(database.durable())
    later = asyncio.create_task(database.run(lambda _: None))
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    behind = asyncio.create_task(database.durable())
    await asyncio.sleep(0)
    assert not any(task.done() for task in (written, waiting, later, behind))
    disk.may_end.set()
    await asyncio.gather(written, waiting, later, behind)
    assert disk.count == 2, "one for each commit, none for those who only wait"
    await database.close()


async def test_sync_that_fails_is_an_error_for_those_who_wait(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fatal: list[str] = []
    Disk.by_thread(monkeypatch)
    database, disk = Store(tmp_path / "db", fatal=fatal.append), Disk(monkeypatch)
    disk.error = OSError(5, "Input/output error")
    written = asyncio.create_task(database.run(lambda _: None))
    await asyncio.to_thread(disk.begun.wait, 30)
    waiting = asyncio.create_task(database.durable())
    await asyncio.sleep(0)
    disk.may_end.set()
    for task in (written, waiting):
        with pytest.raises(UnavailableError, match="cannot be synced"):
            await task
    assert fatal
    disk.error = None
    await database.close()


async def test_no_event_is_sent_before_it_is_on_disk_and_its_sync_is_the_only_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Disk.by_thread(monkeypatch)
    cluster = Cluster(tmp_path, hosts=1)
    await cluster.start()
    await cluster.passes(5)
    host, disk = cluster.hosts[0], Disk(monkeypatch)

    def sent() -> int:
        return sum(one.subject.startswith("iso.ev.") for one in cluster.servers.messages)

    emitted = asyncio.create_task(host.database.run(lambda db: host.node.emit(db, Event("one"))))
    await asyncio.to_thread(disk.begun.wait, 30)
    for _ in range(50):
        await asyncio.sleep(0)
    assert sent() == 0 and not emitted.done()
    disk.may_end.set()
    await emitted
    async with asyncio.timeout(30):
        while not sent():  # noqa: ASYNC110 # a log in memory, which wakes nobody
            await asyncio.sleep(0.001)
    assert disk.count == 1
    await cluster.stop()
