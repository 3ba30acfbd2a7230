"""When the writer reads a socket by which few records come, and what its thread for the files promises."""

from __future__ import annotations

import asyncio
import threading
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from isolator.audit import writer as module
from isolator.audit.commits import FileThread
from isolator.audit.log import Trail
from tests.audit.any_record import any_record
from tests.audit.own_writer import written


async def test_quiet_socket_is_read_with_the_next_commit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_REST", 3600.0)
    async with written(tmp_path) as (_, client):
        for number in range(3):
            client.record(any_record("event.accepted"), event_id=str(number))
            await client.durable()


@pytest.mark.parametrize(("burst", "rest"), [(0, module._REST), (1100, 3600.0)])
async def test_socket_is_read_while_the_disk_does_not_answer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, burst: int, rest: float
) -> None:
    """After a moment; without one if its sender has just sent many records."""
    monkeypatch.setattr(module, "_REST", rest)
    answers, commit = threading.Event(), Trail.commit

    def late(trail: Trail, batches: Any) -> None:
        answers.wait()
        commit(trail, batches)

    monkeypatch.setattr(Trail, "commit", late)
    async with written(tmp_path) as (writer, client):
        try:
            for number in range(burst):
                client.record(any_record("event.accepted"), event_id=str(number))
            for number in range(burst, burst + 3):
                client.record(any_record("event.accepted"), event_id=str(number), urgent=True)
                while writer._sources[0].received <= number:  # noqa: ASYNC110 # a timer of the writer's has to come
                    await asyncio.sleep(0)
            assert client.acked == 0
        finally:
            answers.set()
        await client.durable()


async def test_next_commit_waits_while_few_records_come_until_somebody_waits_for_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_LULL", 3600.0)
    monkeypatch.setattr(module, "_REST", 3600.0)
    async with written(tmp_path) as (writer, client):
        for number in range(3):
            client.record(any_record("event.accepted"), event_id=str(number))
            await client.flushed()
            await writer.flush()
        await client.durable()
        assert writer._trail.seq == client.acked == 3


async def test_next_commit_comes_soon_while_many_records_come(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_LULL", 3600.0)
    async with written(tmp_path) as (writer, client):
        for number in range(3):
            for _ in range(module._LULL_RECORDS):
                client.record(any_record("event.accepted"), event_id=str(number))
            if not number:
                await client.flushed()
                await writer.flush()
            await client.durable()


async def test_thread_gives_results_and_errors_in_order_and_ends_after_its_last_call() -> None:
    thread, free, called = FileThread(), threading.Event(), list[int]()

    def call(number: int) -> int:
        free.wait()
        called.append(number)
        return 6 // number

    async with asyncio.timeout(20):
        first, failing, given_up, last = [thread.call(partial(call, number)) for number in (2, 0, 3, 1)]
        given_up.cancel()
        free.set()
        assert (await first, await last) == (3, 6) and called == [2, 0, 3, 1]
        with pytest.raises(ZeroDivisionError):
            await failing
    thread.close()
    assert not [one for one in threading.enumerate() if one.name == "commit"]
