"""Writes of the log that the disk gets ahead of their sync."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from host.database import wal
from host.database.store import Store
from host.queue.interface import NewEvent
from host.queue.sqlite import SqliteQueue
from isolator.linux.aio import FileSync
from tests.host.syncs import noted_steps, unheard
from tests.support.timeouts import seconds


@pytest.fixture
async def store(tmp_path: Path) -> AsyncIterator[Store]:
    opened = Store(tmp_path / "host.db")
    yield opened
    await opened.close()


@pytest.fixture
def steps(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    monkeypatch.setattr(wal, "AVOID", 1000.0)
    return noted_steps(monkeypatch)


async def _accept(queue: SqliteQueue) -> None:
    await queue.accept(NewEvent("deploy.completed", "{}"), [])


async def test_event_that_comes_alone_is_written_ahead_of_its_sync(store: Store, steps: list[str]) -> None:
    queue = SqliteQueue(store)
    await _accept(queue)
    await _accept(queue)
    assert steps == ["write_out", "begin"] * 2


async def test_events_behind_a_sync_are_written_by_the_next_one(store: Store, steps: list[str]) -> None:
    queue = SqliteQueue(store)
    with unheard(store):
        first = asyncio.create_task(_accept(queue))
        await asyncio.sleep(0)  # it is submitted
        await asyncio.sleep(0)  # it is committed
        assert steps == ["write_out", "begin"]
        others = [asyncio.create_task(_accept(queue)) for _ in range(3)]
        await asyncio.sleep(0)
        await asyncio.sleep(0)
    await asyncio.gather(first, *others)
    assert steps == ["write_out", "begin", "begin"]


async def test_disk_that_takes_its_time_is_given_nothing_ahead_for_a_while(
    store: Store, steps: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    loop, queue, delay = asyncio.get_running_loop(), SqliteQueue(store), [2 * wal.DELAY]
    clock, real, noted = [0.0], loop.time, FileSync.write_out

    def slow(sync: FileSync) -> None:
        noted(sync)
        clock[0] += delay[0]

    monkeypatch.setattr(FileSync, "write_out", slow)
    monkeypatch.setattr(loop, "time", lambda: real() + clock[0])
    await _accept(queue)
    await _accept(queue)
    assert steps == ["write_out", "begin", "begin"]
    delay[0] = 0.0
    clock[0] += wal.AVOID
    await _accept(queue)
    assert steps[3:] == ["write_out", "begin"]


async def test_who_waits_for_the_disk_while_a_full_one_is_given_room_is_answered(store: Store) -> None:
    await _accept(SqliteQueue(store))
    store._rescue()
    async with asyncio.timeout(seconds(20)):
        await store.durable()
