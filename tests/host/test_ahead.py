"""Requests that are made while their events are written: by whom, when, and what becomes of them."""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import AsyncIterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from host.channel import reply
from host.database.store import Store
from host.delivery.stream import StreamDelivery
from host.events import EventType
from host.queue import accepting
from host.queue.interface import Accepted, Delivery, Event, NewEvent, Prepare, Subscriber
from host.queue.sqlite import SqliteQueue
from host.schemas.shape import Record
from isolator.errors import UnavailableError
from isolator.linux.aio import FileSync
from tests.host.fake_supervisor import Daemon
from tests.host.syncs import noted_steps, unheard
from tests.support import sidecars
from tests.support.timeouts import seconds

NAMES = ["a", "b", "c"]
EVENT = {"project_id": "p1", "deployment_id": "d2", "url": "https://a.example", "duration_ms": 5}


@pytest.fixture
def steps(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    monkeypatch.setattr(accepting, "WRITING", 100.0)
    return noted_steps(monkeypatch)


@pytest.fixture
async def store(tmp_path: Path) -> AsyncIterator[Store]:
    opened = Store(tmp_path / "host.db", fatal=lambda _: None)
    yield opened
    await opened.close()


@contextlib.asynccontextmanager
async def _takers(queue: SqliteQueue, prepare: Prepare, sent: list[str]) -> AsyncIterator[None]:
    """Takers that wait, each of which sends one event."""

    def send(delivery: Delivery) -> bool:
        sent.append(delivery.plugin)
        return True

    takers = [asyncio.create_task(queue.consumer(name).take(lambda _: prepare, send)) for name in NAMES]
    await asyncio.sleep(0)
    yield
    for taker in takers:
        taker.cancel()
    await asyncio.gather(*takers, return_exceptions=True)


def _accept(queue: SqliteQueue, payload: str = "{}") -> asyncio.Task[Accepted]:
    event = NewEvent("deploy.completed", payload)
    return asyncio.create_task(queue.accept(event, [Subscriber(name, None) for name in NAMES]))


async def test_requests_are_prepared_once_the_disk_writes_and_before_the_sync(store: Store, steps: list[str]) -> None:
    queue, sent, prepared = SqliteQueue(store), list[str](), list[Event]()

    def prepare(event: Event) -> None:
        assert not sent
        steps.append("prepare")
        prepared.append(event)

    async with _takers(queue, prepare, sent):
        accepted = await _accept(queue)
    assert steps == ["write_out", "prepare", "prepare", "prepare", "begin"]
    assert prepared == [accepted.event] * 3
    assert sent == NAMES


async def test_no_more_is_prepared_than_the_disk_takes_time_for(
    store: Store, steps: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(accepting, "WRITING", 0.0)
    queue, sent = SqliteQueue(store), list[str]()
    async with _takers(queue, lambda _: steps.append("prepare"), sent):
        await _accept(queue)
    assert steps == ["write_out", "prepare", "begin"]
    assert sent == NAMES


async def test_long_request_is_not_prepared(store: Store, steps: list[str]) -> None:
    queue, sent = SqliteQueue(store), list[str]()
    async with _takers(queue, lambda _: steps.append("prepare"), sent):
        await _accept(queue, f'{{"project_id":"{"x" * accepting.LONG}"}}')
    assert steps == ["write_out", "begin"]
    assert sent == NAMES


async def test_nothing_is_prepared_for_an_event_behind_a_sync(store: Store, steps: list[str]) -> None:
    queue, sent = SqliteQueue(store), list[str]()
    async with _takers(queue, lambda _: steps.append("prepare"), sent):
        first = asyncio.create_task(queue.accept(NewEvent("deploy.completed", "{}"), []))
        await asyncio.sleep(0)  # it is submitted
        await asyncio.sleep(0)  # it is committed
        assert steps == ["write_out", "begin"]
        with unheard(store):
            second = _accept(queue)
            await asyncio.sleep(0)
            await asyncio.sleep(0)
        await asyncio.gather(first, second)
    assert steps == ["write_out", "begin", "begin"]
    assert sent == NAMES


async def test_request_that_cannot_be_prepared_keeps_no_event_from_its_plugins(store: Store, steps: list[str]) -> None:
    queue, sent = SqliteQueue(store), list[str]()

    def prepare(_: Event) -> None:
        steps.append("prepare")
        raise ValueError

    async with _takers(queue, prepare, sent):
        await _accept(queue)
    assert steps == ["write_out", "prepare", "prepare", "prepare", "begin"]
    assert sent == NAMES


async def test_what_was_prepared_is_not_sent_when_the_sync_fails(
    store: Store, steps: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    queue, sent = SqliteQueue(store), list[str]()
    real = FileSync.end

    def fails(sync: FileSync) -> OSError:
        real(sync)
        return OSError(5, os.strerror(5), "fdatasync")

    async with _takers(queue, lambda _: steps.append("prepare"), sent):
        monkeypatch.setattr(FileSync, "end", fails)
        with pytest.raises(UnavailableError, match="cannot be synced"):
            await _accept(queue)
        monkeypatch.setattr(FileSync, "end", real)
        await asyncio.sleep(0)
    assert steps == ["write_out", "prepare", "prepare", "prepare", "begin"]
    assert sent == []


@pytest.mark.parametrize(("major", "count"), [(1, 0), (2, 1)])
async def test_nothing_is_made_ahead_of_a_request_whose_payload_is_translated_for_its_plugin(
    monkeypatch: pytest.MonkeyPatch, major: int, count: int
) -> None:
    made: list[str] = []
    monkeypatch.setattr(reply, "params_text", lambda event, *_: made.append(event.id) or event.payload)
    absent: Any = None
    kind: Any = SimpleNamespace(get=lambda _: EventType("job.ended", Record("job.ended", {}), None, version=2))
    plugin: Any = SimpleNamespace(major=major, timeout=5.0)
    stream = StreamDelivery(absent, absent, kind, absent, str)
    stream.make_ahead(plugin, Event(1, f"of major {major}", "job.ended", "2026-01-01T00:00:00Z", 0.0, 1.0, "{}"))
    assert made == [f"of major {major}"] * count


NOTED = """
import os
from host.database import wal
from host.channel import reply
from host.queue import accepting
from isolator.linux.aio import FileSync
wal.DELAY = accepting.WRITING = 100.0
steps, end = os.open({steps!r}, os.O_WRONLY | os.O_APPEND), FileSync.end
def noted(step, real):
    def note(*words):
        os.write(steps, step.encode() + b" ")
        return real(*words)
    return note
def ended(sync):
    error = end(sync)
    return OSError(5, "of the test") if os.path.exists({armed!r}) else error
FileSync.write_out, FileSync.begin = noted("write", FileSync.write_out), noted("sync", FileSync.begin)
FileSync.end = ended
reply.params_text = noted("make", reply.params_text)
"""
"""Have a host note when it writes its log, makes requests and syncs; that fails once the file ``armed`` exists."""


async def test_what_requests_on_streams_share_is_made_while_their_event_is_written_and_none_is_sent_if_the_sync_fails(
    daemon: Daemon,
) -> None:
    await daemon.kill_host()
    steps, seen, armed = (daemon.root / name for name in ("steps", "seen", "armed"))
    for file in (steps, seen):
        file.touch()
        file.chmod(0o666)
    daemon.first = NOTED.format(steps=str(steps), armed=str(armed))
    await daemon.start_host()
    note = f'open({str(seen)!r}, "a").write(os.environ["PLUGIN_NAME"] + " " + params["_meta"]["id"] + "\\n")'
    answer = "if id is not None:\n    send(id=id, result={'status': 'ok'})"
    daemon.add("oneshot", sidecars.oneshot(f"{note}\nreturn {{}}"))
    daemon.add("stream", sidecars.stream(f"{note}\n{answer}"), transport={"mode": "stream"})

    async def deliver() -> list[str]:
        steps.write_text("")
        row = await daemon.outcome(await daemon.emit())
        assert [delivery["state"] for delivery in row["deliveries"]] == ["ok", "ok"]
        return steps.read_text().split()

    await deliver()  # both run from now on, and have been reached
    found = [await deliver()]
    while found[-1][:3] != ["write", "make", "sync"]:  # a taker waits again some turns after the outcome
        assert len(found) < 100, found
        found.append(await deliver())
    assert {took.count("make") for took in found} == {1}

    seen.write_text("")
    steps.write_text("")
    armed.touch()
    with contextlib.suppress(OSError, ValueError):  # the answer may or may not come before the host ends
        assert "error" in await daemon.answer("event.emit", {"name": "deploy.completed", "payload": EVENT})
    assert daemon.host is not None
    await asyncio.wait_for(daemon.host.wait(), seconds(10))
    assert steps.read_text().split()[:3] == ["write", "make", "sync"]
    assert seen.read_text() == ""
    armed.unlink()
    assert daemon.channel is not None
    daemon.channel.close()
    await daemon.start_host()
    (event, *_) = (await daemon.ask("event.list"))["events"]
    row = await daemon.outcome(event)
    assert [delivery["state"] for delivery in row["deliveries"]] == ["ok", "ok"]
    assert sorted(seen.read_text().splitlines()) == [f"{name} {event['id']}" for name in ("oneshot", "stream")]
