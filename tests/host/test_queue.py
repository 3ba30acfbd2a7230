"""Embedded queue and its database: durable, bounded, one fsync for many, and the faults of storage."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import os
import shutil
import sqlite3
import subprocess
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path

import pytest

from host.database import wal
from host.database.store import CHECKPOINT_COMMITS, Store
from host.queue import rows
from host.queue.interface import RETRY_BACKOFF, Delivery, Event, EventRow, NewEvent, Result, Subscriber
from host.queue.sqlite import SqliteQueue
from isolator.audit.client import Moment
from isolator.errors import IsolatorError, UnavailableError
from isolator.ipc.formats import TABLES
from isolator.linux.aio import FileSync


def _event(name: str = "e", **more: object) -> NewEvent:
    return NewEvent("deploy.completed", f'{{"n":"{name}"}}', **more)  # type: ignore[arg-type]


@pytest.fixture
async def store(tmp_path: Path) -> AsyncIterator[Store]:
    opened = Store(tmp_path / "host.db")
    yield opened
    await opened.close()


async def test_many_accepts_share_few_syncs(store: Store) -> None:
    queue = SqliteQueue(store)
    await asyncio.gather(*(queue.accept(_event(str(n)), [Subscriber("p", "k")]) for n in range(1000)))
    assert store.read(lambda db: db.execute("SELECT count(*) FROM deliveries").fetchone()[0]) == 1000
    assert store.syncs <= 20


@pytest.mark.parametrize(("together", "at_once"), [(1, [1]), (3, [0, 0, 0])])
async def test_event_that_comes_alone_is_committed_in_its_turn(store: Store, together: int, at_once: list[int]) -> None:
    queue, loop = SqliteQueue(store), asyncio.get_running_loop()
    before, commits, over = store.commits, list[int](), loop.create_future()
    rests = list[bool]()

    def emit() -> None:
        queue.submit(_event(), [], lambda *_: over.done() or over.set_result(None))
        store.commit_alone()
        commits.append(store.commits - before)
        rests.append(not loop._ready)  # type: ignore[attr-defined]

    for _ in range(together):
        loop.call_soon(emit)
    await over
    assert (commits, store.commits - before) == (at_once, 1)
    assert rests == [together == 1] * together, "the loop turns once more before the disk has its turn"


async def test_commit_that_fails_is_tried_again_once_however_many_events_come_alone(store: Store) -> None:
    queue, loop = SqliteQueue(store), asyncio.get_running_loop()
    accepted = list[object]()
    with contextlib.closing(sqlite3.connect(store.path, isolation_level=None)) as other:
        other.execute("BEGIN IMMEDIATE")
        for _ in range(3):
            queue.submit(_event(), [], lambda one, _: accepted.append(one))
            store.commit_alone()
            await asyncio.sleep(0)
        due = [timer for timer in loop._scheduled if not timer.cancelled()]  # type: ignore[attr-defined]
        assert [timer._callback for timer in due] == [store.commit]
        other.execute("ROLLBACK")
    await store.run(lambda _: None)
    assert len(accepted) == 3 and None not in accepted


async def test_answer_that_fails_keeps_no_other_emitter_from_its_own(store: Store) -> None:
    failures: list[object] = []
    asyncio.get_running_loop().set_exception_handler(lambda _, context: failures.append(context["exception"]))
    queue, answers = SqliteQueue(store), list[object]()
    broken = RuntimeError("broken")

    def fail(_: object, __: object) -> None:
        raise broken

    queue.submit(_event("a"), [Subscriber("p", "k")], fail)
    queue.submit(_event("b"), [Subscriber("p", "k")], lambda accepted, _: answers.append(accepted))
    assert (await queue.consumer("p").take()).seq == 1
    assert len(answers) == 1
    assert failures == [broken]


async def test_accepted_event_is_answered_then_recorded_then_dispatched(store: Store) -> None:
    steps: list[str] = []
    queue = SqliteQueue(store, on_accepted=lambda *_: steps.append("recorded"))
    take = asyncio.create_task(queue.consumer("p").take())
    take.add_done_callback(lambda _: steps.append("dispatched"))
    queue.submit(_event(), [Subscriber("p", "k")], lambda *_: steps.append("answered"))
    await take
    assert steps == ["answered", "recorded", "dispatched"]


async def test_records_of_events_of_one_sync_share_a_moment(store: Store) -> None:
    moments: list[Moment] = []
    queue = SqliteQueue(store, on_accepted=lambda _, __, at: moments.append(at))
    for _ in range(2):
        await asyncio.gather(*(queue.accept(_event(), [Subscriber("p", "k")]) for _ in range(3)))
    assert len(moments) == 6 and len(set(moments)) == 2
    assert moments == sorted(moments)


async def test_listing_has_a_bound_and_says_what_it_leaves_out(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    queue = SqliteQueue(store)
    for name in ("old", "new"):
        await queue.accept(_event(name), [Subscriber("p", "k")])
        queue.consumer("p").term(await queue.consumer("p").take(), Result("dead", reply="x" * 100))
    await store.run(lambda _: None)  # what was submitted before is on disk
    assert [one.cut for one in await queue.list_events()] == [False, False]
    assert [(one.payload, one.cut) for one in await queue.list_events(brief=True)] == [({}, True)] * 2
    monkeypatch.setattr(rows, "LISTED", 100)
    new, old = await queue.list_events()
    assert (new.payload, new.deliveries[0].reply, new.cut) == ({"n": "new"}, "x" * 100, False)
    assert (old.payload, old.deliveries[0].reply, old.cut) == ({}, None, True)
    assert [one.reply for one in await queue.list_dead()] == ["x" * 100, None]


async def test_event_accepted_during_a_removal_is_not_for_the_namesake(store: Store) -> None:
    queue = SqliteQueue(store)
    queue.consumer("p")
    accept = asyncio.create_task(queue.accept(_event(), [Subscriber("p", "k")]))
    await asyncio.sleep(0)
    await queue.purge("p")
    accepted = await accept
    assert queue.consumer("p").depth == 0
    assert queue.store.read(lambda db: rows.end_unfinished(db, "p", 0, 1)) == []
    assert queue.show(accepted.event.id).deliveries == ()


async def test_replay_during_a_removal_is_not_for_the_namesake(store: Store) -> None:
    queue = SqliteQueue(store)
    accepted = await queue.accept(_event(), [Subscriber("p", "k")])
    queue.consumer("p").term(await queue.consumer("p").take(), Result("dead"))
    replay = asyncio.create_task(queue.replay(accepted.event.id))
    await asyncio.sleep(0)
    await queue.purge("p")
    assert await replay == []
    assert queue.consumer("p").depth == 0


async def test_expired_delivery_has_its_event_also_after_a_restart(tmp_path: Path) -> None:
    store = Store(tmp_path / "host.db")
    accepted = await SqliteQueue(store).accept(_event(ttl=0), [Subscriber("p", None)])
    await store.close()
    store = Store(tmp_path / "host.db")
    expired: asyncio.Future[Delivery] = asyncio.get_running_loop().create_future()
    take = asyncio.create_task(SqliteQueue(store, on_expired=expired.set_result).consumer("p").take())
    delivery = await expired
    assert delivery.event is not None
    assert delivery.event.id == accepted.event.id
    take.cancel()
    await store.close()


async def test_wait_for_many_deliveries_reads_their_rows_when_all_have_ended(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    queue, shown = SqliteQueue(store), 0
    plugins = [f"p{number}" for number in range(20)]
    accepted = await queue.accept(_event(), [Subscriber(name, "k") for name in plugins])
    show = queue.show

    def count(event_id: str) -> EventRow:
        nonlocal shown
        shown += 1
        return show(event_id)

    monkeypatch.setattr(queue, "show", count)
    waiting = asyncio.create_task(queue.wait(accepted.event.id, timeout=30))
    for name in plugins:
        delivery = await queue.consumer(name).take()
        queue.consumer(name).nak(delivery, Result("retry"), delay=0.0)
        queue.consumer(name).ack(await queue.consumer(name).take(), Result("ok"))
        await store.committed()
    assert {one.state for one in (await waiting).deliveries} == {"ok"}
    assert shown <= 3


async def test_wait_does_not_wait_for_a_plugin_that_is_removed(store: Store) -> None:
    queue = SqliteQueue(store)
    accepted = await queue.accept(_event(), [Subscriber("p", "k"), Subscriber("q", "k")])
    waiting = asyncio.create_task(queue.wait(accepted.event.id, timeout=30))
    await asyncio.sleep(0)
    queue.consumer("p").ack(await queue.consumer("p").take(), Result("ok"))
    await queue.purge("q")
    assert [(one.plugin, one.state) for one in (await waiting).deliveries] == [("p", "ok")]


class _Syncs:
    """The syncs of a store that is made from now on: by the kernel, or by the helper thread where that has none."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self._monkeypatch = monkeypatch

    def hold(self) -> Callable[[], None]:
        raise NotImplementedError

    def fail(self) -> None:
        raise NotImplementedError


class _ByKernel(_Syncs):
    def hold(self) -> Callable[[], None]:
        held: list[FileSync] = []
        real = FileSync.begin

        def begin(sync: FileSync) -> None:
            held.append(sync)

        def release() -> None:
            for one in held:
                real(one)

        self._monkeypatch.setattr(FileSync, "begin", begin)
        return release

    def fail(self) -> None:
        real = FileSync.end
        self._monkeypatch.setattr(FileSync, "end", lambda one: (real(one), OSError(5, "Input/output error"))[1])


class _ByThread(_Syncs):
    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        super().__init__(monkeypatch)

        def none(_: FileSync, __: int) -> None:
            raise OSError(38, "Function not implemented")

        monkeypatch.setattr(FileSync, "__init__", none)

    def hold(self) -> Callable[[], None]:
        released, real = threading.Event(), os.fdatasync
        self._monkeypatch.setattr(os, "fdatasync", lambda fd: (released.wait(10), real(fd))[1])
        return released.set

    def fail(self) -> None:
        def fail(_: int) -> None:
            raise OSError(5, "Input/output error")

        self._monkeypatch.setattr(os, "fdatasync", fail)


@pytest.fixture(params=[_ByKernel, _ByThread])
def syncs(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> _Syncs:
    made: _Syncs = request.param(monkeypatch)
    return made


async def test_acceptance_waits_for_the_sync(syncs: _Syncs, tmp_path: Path) -> None:
    store = Store(tmp_path / "host.db")
    release = syncs.hold()
    queue = SqliteQueue(store)
    accept = asyncio.create_task(queue.accept(_event(), [Subscriber("p", "k")]))
    take = asyncio.create_task(queue.consumer("p").take())
    await asyncio.sleep(0.1)
    assert not accept.done()
    assert not take.done(), "nothing is dispatched before it is safe"
    release()
    accepted = await accept
    assert (await take).event == accepted.event
    await store.close()


async def test_a_store_that_closes_reports_the_sync_that_is_under_way(syncs: _Syncs, tmp_path: Path) -> None:
    store = Store(tmp_path / "host.db")
    accept = asyncio.create_task(SqliteQueue(store).accept(_event(), []))
    await asyncio.sleep(0)
    await store.close()
    assert (await accept).plugins == ()


async def test_a_store_that_closes_waits_for_a_disk_that_does_not_answer_and_leaves_it_its_log(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fatal: list[str] = []
    store = Store(tmp_path / "host.db", fatal=fatal.append)
    monkeypatch.setattr(wal, "CLOSING", 0.01)
    release = _ByThread(monkeypatch).hold()
    await store.close()
    release()
    await asyncio.to_thread(store._wal._thread.join)
    await asyncio.sleep(0)  # what the thread has reported
    assert not fatal
    os.close(store._wal.fd)


async def test_a_log_is_as_large_from_the_start_as_it_gets_between_two_checkpoints(store: Store) -> None:
    before = store.path.with_name("host.db-wal").stat().st_size
    queue = SqliteQueue(store)
    for number in range(50):
        await queue.accept(_event(str(number)), [Subscriber("p", "k")])
    assert store.path.with_name("host.db-wal").stat().st_size == before == wal.BEGIN


async def test_a_failed_sync_is_fatal_and_fails_the_acceptance(
    syncs: _Syncs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fatal: list[str] = []
    store = Store(tmp_path / "host.db", fatal=fatal.append)
    syncs.fail()
    with pytest.raises(UnavailableError, match="cannot be synced"):
        await SqliteQueue(store).accept(_event(), [Subscriber("p", "k")])
    assert "sync failed" in fatal[0]
    monkeypatch.undo()
    await store.close()


async def test_waiting_deliveries_are_there_again_after_a_restart(tmp_path: Path) -> None:
    store = Store(tmp_path / "host.db")
    queue = SqliteQueue(store)
    ids = [(await queue.accept(_event(str(n)), [Subscriber("p", "k")])).event.id for n in range(3)]
    consumer = queue.consumer("p")
    first = await consumer.take()
    await queue.sent([first])
    consumer.ack(first, Result("ok"))
    second = await consumer.take()
    await queue.sent([second])
    await store.close()

    store = Store(tmp_path / "host.db")
    queue = SqliteQueue(store)
    assert queue.consumer("p").depth == 2
    states = [queue.show(i).deliveries[0].state for i in ids]
    await asyncio.sleep(0)
    assert states[0] == "ok"
    assert states[2] == "queued"
    # The second was in flight: an attempt, and it holds back the third until its back-off is over.
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(queue.consumer("p").take(), 0.2)
    again = await asyncio.wait_for(queue.consumer("p").take(), 5)
    assert again.event is not None
    assert (again.event.id, again.attempts) == (ids[1], 1)
    await store.close()


async def test_a_dedupe_key_gives_the_first_event(store: Store) -> None:
    queue = SqliteQueue(store)
    one, two, other = await asyncio.gather(
        *(queue.accept(_event(dedupe_key=key), [Subscriber("p", "k")]) for key in ("x", "x", "y"))
    )
    three = await queue.accept(_event(dedupe_key="x"), [Subscriber("p", "k")])
    assert one.event.id == two.event.id == three.event.id != other.event.id
    assert (one.duplicate, two.duplicate, three.duplicate) == (False, True, True)
    assert queue.consumer("p").depth == 2
    assert queue.consumer("p").reserved == 0


async def test_a_full_queue_is_visible_and_replayable(store: Store) -> None:
    queue = SqliteQueue(store, limit=3)
    accepted = await asyncio.gather(*(queue.accept(_event(), [Subscriber("p", "k")]) for _ in range(5)))
    assert [bool(a.overflowed) for a in accepted] == [False] * 3 + [True] * 2
    dead = await queue.list_dead()
    assert [d.detail for d in dead] == ["queue_full"] * 2
    consumer = queue.consumer("p")
    consumer.ack(await consumer.take(), Result("ok"))
    assert await queue.replay(dead[0].event_id) == ["p"]
    assert queue.consumer("p").depth == 3


async def test_delivery_that_is_final_stays_final(store: Store) -> None:
    queue = SqliteQueue(store)
    accepted = await queue.accept(_event(), [Subscriber("p", "k")])
    consumer = queue.consumer("p")
    delivery = await consumer.take()
    consumer.ack(delivery, Result("ok"))
    consumer.term(delivery, Result("dead"))
    consumer.nak(delivery, Result("retry"), delay=0.0)
    consumer.release(delivery)
    await store.committed()
    assert (consumer.depth, queue.show(accepted.event.id).deliveries[0].state) == (0, "ok")


async def test_term_of_a_delivery_that_waits_lets_the_next_of_its_key_go(store: Store) -> None:
    queue = SqliteQueue(store)
    first, second = [(await queue.accept(_event(), [Subscriber("p", "k")])).event for _ in range(2)]
    consumer = queue.consumer("p")
    delivery = await consumer.take()
    consumer.nak(delivery, Result("retry"), delay=600.0)
    take = asyncio.create_task(consumer.take())
    await asyncio.sleep(0)
    assert not take.done()
    consumer.term(delivery, Result("quarantined"))
    assert (await take).event == second
    await store.committed()
    assert queue.show(first.id).deliveries[0].state == "quarantined"


async def test_payloads_beyond_the_window_are_read_back(store: Store) -> None:
    queue = SqliteQueue(store)
    await asyncio.gather(*(queue.accept(_event(str(n)), [Subscriber("p", None)]) for n in range(5000)))
    consumer = queue.consumer("p")
    for number in range(5000):
        delivery = await consumer.take()
        assert delivery.event is not None
        assert delivery.event.payload == f'{{"n":"{number}"}}'
        consumer.ack(delivery, Result("ok"))


def held() -> int:
    """Characters of the payloads that this process has in memory."""
    gc.collect()
    return sum(len(item.payload) for item in gc.get_objects() if isinstance(item, Event))


async def test_deliveries_that_wait_for_their_retry_hold_no_payload(store: Store) -> None:
    queue, size, count = SqliteQueue(store), 8000, 400
    event = NewEvent("deploy.completed", f'{{"n":"{"x" * size}"}}')
    consumer, waits = queue.consumer("p"), []
    for number in range(count):
        await queue.accept(event, [Subscriber("p", str(number % 300))])
    for number in range(300):
        delivery = await consumer.take()
        if number % 3 == 2:
            consumer.release(delivery)
            delivery = await consumer.take()
        consumer.nak(delivery, Result("retry"), delay=60.0 if number % 2 else 0.01)
        waits.append(delivery)
        delivery = waits[-1]
    # Nothing waits but retries, and what their keys hold back: of these a few may be in memory, however many there are.
    assert held() < 200 * size
    assert all(delivery.id.startswith("ev_") for delivery in waits)
    now = asyncio.get_running_loop().time()  # of those that are due by now a few may have been read ahead
    assert all(delivery.event is None for delivery in waits if delivery.due > now)
    for _ in range(150):
        again = await consumer.take()
        assert again.event is not None
        assert again.event.payload == event.payload
        consumer.ack(again, Result("ok"))


async def test_large_payloads_wait_on_disk(store: Store) -> None:
    queue, size = SqliteQueue(store), 1 << 17
    event = NewEvent("deploy.completed", f'{{"n":"{"x" * size}"}}')
    consumer = queue.consumer("p")
    for _ in range(30):
        await queue.accept(event, [Subscriber("p", None)])
    assert held() < 12 * size
    for number in range(30):
        delivery = await consumer.take()
        assert delivery.event is not None
        assert held() < 12 * size, number
        consumer.nak(delivery, Result("retry"), delay=60.0)


async def test_delivery_whose_payload_cannot_be_read_now_is_taken_later(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    queue = SqliteQueue(store)
    accepted = await queue.accept(_event(), [Subscriber("p", "k")])
    consumer = queue.consumer("p")
    consumer.release(await consumer.take())

    def fail(*_: object) -> None:
        raise sqlite3.OperationalError("disk I/O error")

    with monkeypatch.context() as patched:
        patched.setattr(store, "read", fail)
        with pytest.raises(sqlite3.OperationalError):
            await consumer.take()
    assert (await consumer.take()).event == accepted.event


async def test_an_expired_event_is_not_delivered(store: Store) -> None:
    expired: list[int] = []
    queue = SqliteQueue(store, on_expired=lambda delivery: expired.append(delivery.seq))
    old = await queue.accept(_event(ttl=0.05), [Subscriber("p", "k")])
    new = await queue.accept(_event(), [Subscriber("p", "k")])
    await asyncio.sleep(0.1)
    delivery = await queue.consumer("p").take()
    assert delivery.seq == new.event.seq
    assert expired == [old.event.seq]
    await queue.wait(old.event.id, timeout=1)
    assert queue.show(old.event.id).deliveries[0].state == "expired"


async def test_the_database_stays_bounded(store: Store) -> None:
    queue = SqliteQueue(store, keep_events=200, keep_dead=50)
    consumer = queue.consumer("p")
    for round_ in range(15):
        await asyncio.gather(*(queue.accept(_event(), [Subscriber("p", None)]) for _ in range(200)))
        for number in range(200):
            end, state = (consumer.term, "dead") if number % 2 else (consumer.ack, "ok")
            end(await consumer.take(), Result(state))  # type: ignore[arg-type]
        assert consumer.depth == 0, round_
    count = store.read(lambda db: db.execute("SELECT count(*) FROM events").fetchone()[0])
    dead = store.read(lambda db: db.execute("SELECT count(*) FROM deliveries WHERE state='dead'").fetchone()[0])
    assert count <= 1500
    assert dead <= 600


async def test_one_old_dead_letter_does_not_keep_everything_behind_it(store: Store) -> None:
    queue = SqliteQueue(store, keep_events=100)
    consumer = queue.consumer("p")
    dead = await queue.accept(_event(), [Subscriber("p", None)])
    consumer.term(await consumer.take(), Result("dead"))
    for _ in range(14):
        await asyncio.gather(*(queue.accept(_event(), [Subscriber("p", None)]) for _ in range(1000)))
        for _ in range(1000):
            consumer.ack(await consumer.take(), Result("ok"))
    count = store.read(lambda db: db.execute("SELECT count(*) FROM events").fetchone()[0])
    assert count <= 2200
    assert queue.show(dead.event.id).deliveries[0].state == "dead"


async def test_a_newer_database_is_refused_and_unharmed(tmp_path: Path) -> None:
    path = tmp_path / "host.db"
    store = Store(path)
    await store.close()
    with sqlite3.connect(path) as db:
        db.execute(f"PRAGMA user_version={TABLES + 1}")
    before = path.read_bytes()
    with pytest.raises(IsolatorError, match="newer version"):
        Store(path)
    assert path.read_bytes() == before


@pytest.mark.parametrize("damage", ["garbage", "link"])
async def test_a_damaged_database_is_one_clear_line(tmp_path: Path, damage: str) -> None:
    path = tmp_path / "host.db"
    if damage == "garbage":
        path.write_bytes(b"this is not a database" * 100)
    else:
        (tmp_path / "target").write_bytes(b"")
        path.symlink_to(tmp_path / "target")
    with pytest.raises(IsolatorError, match=r"host\.db"):
        Store(path)


async def test_a_lock_held_by_somebody_delays_and_loses_nothing(store: Store) -> None:
    queue = SqliteQueue(store)
    other = sqlite3.connect(store.path, isolation_level=None)
    other.execute("BEGIN IMMEDIATE")
    accept = asyncio.create_task(queue.accept(_event(), [Subscriber("p", "k")]))
    await asyncio.sleep(0.3)
    assert store.blocked is not None
    assert not accept.done()
    other.execute("ROLLBACK")
    other.close()
    await asyncio.wait_for(accept, 5)
    assert store.blocked is None


@contextlib.contextmanager
def _largest_log(store: Store) -> Iterator[list[int]]:
    """The largest size of the write-ahead log after any commit; the list's only item."""
    largest, apply = [0], store.commit

    def commit() -> None:
        apply()
        largest[0] = max(largest[0], os.stat(f"{store.path}-wal").st_size)

    store.commit = commit  # type: ignore[method-assign]
    yield largest


async def _outcomes_alone(queue: SqliteQueue, count: int) -> None:
    """Write that many outcomes, each in a transaction of its own, while no event is accepted."""
    await queue.accept(_event("x" * 3000), [Subscriber("p", None)])
    consumer = queue.consumer("p")
    for _ in range(count):
        delivery = await consumer.take()
        await queue.sent([delivery])
        consumer.nak(delivery, Result("retry", reply="r" * 3000), delay=0.0)
        await queue.store.committed()
        await asyncio.sleep(0)


async def test_log_is_bounded_also_while_nothing_is_accepted(store: Store) -> None:
    with _largest_log(store) as largest:
        await _outcomes_alone(SqliteQueue(store), 3000)
    assert 0 < largest[0] < wal.HIGH + (2 << 20)


async def test_log_is_bounded_also_while_a_checkpoint_takes_long(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(wal, "HIGH", 8 << 20)
    store = Store(tmp_path / "host.db")
    release = _ByThread(monkeypatch).hold()
    with _largest_log(store) as largest:
        writing = asyncio.create_task(_outcomes_alone(SqliteQueue(store), 1000))
        while not writing.done() and not store._held:  # noqa: ASYNC110 # a commit wakes nobody
            await asyncio.sleep(0)
        release()
        await writing
    assert wal.HIGH < largest[0] < wal.HIGH + (64 << 10)
    await store.close()


async def test_log_is_bounded_also_while_each_answer_brings_the_next_write(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(wal, "HIGH", 1 << 20)
    store, left, ended = Store(tmp_path / "host.db"), iter(range(400)), asyncio.Event()

    def write(db: sqlite3.Connection) -> None:
        db.execute("INSERT OR REPLACE INTO kv VALUES ('p', 'k', ?, NULL)", ("x" * 8000,))

    def go_on(_: object, __: object) -> None:  # a sync is begun before a checkpoint that is due can be
        if next(left, None) is None:
            ended.set()
        else:
            store.submit(write, go_on, durable=True)

    with _largest_log(store) as largest:
        go_on(None, None)
        await asyncio.wait_for(ended.wait(), 60)
    assert largest[0] < wal.HIGH + (64 << 10)
    await store.close()


async def test_events_wait_for_no_checkpoint_that_is_due_while_another_takes_long(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    queue, begun, released = SqliteQueue(store), threading.Event(), threading.Event()

    def hold() -> None:  # the end of a checkpoint
        begun.set()
        released.wait()

    store._reserve.release()
    monkeypatch.setattr(store._reserve, "hold", hold)
    try:
        async with asyncio.timeout(60):
            while not begun.is_set():
                await queue.accept(_event(), [])
            for _ in range(2 * CHECKPOINT_COMMITS):
                await queue.accept(_event(), [])
    finally:
        released.set()


async def test_log_does_not_fill_a_small_disk(small_disk: Path) -> None:
    store = Store(small_disk / "host.db")
    with _largest_log(store) as largest:
        await _outcomes_alone(SqliteQueue(store), 1500)
    assert store.blocked is None
    assert 0 < largest[0] < 1 << 20
    await store.close()


def _put(store: Store, key: str, value: str) -> None:
    store.submit(lambda db: db.execute("REPLACE INTO kv VALUES('p', ?, ?, NULL)", (key, value)))


async def test_closing_writes_all_also_in_the_middle_of_a_checkpoint(tmp_path: Path) -> None:
    for number in range(3):
        store, filler = Store(tmp_path / "host.db"), 0
        while store._syncing or not store._held:  # the log is moved into the database, and commits wait for it
            if not store._held:
                _put(store, f"filler{filler}", "x" * 500_000)
                filler += 1
            await asyncio.sleep(0)
        _put(store, f"last{number}", "")
        assert await store.close()
    store = Store(tmp_path / "host.db")
    assert store.read(lambda db: db.execute("SELECT count(*) FROM kv WHERE key LIKE 'last%'").fetchone()[0]) == 3
    await store.close()


async def test_closing_counts_nothing_that_is_submitted_while_it_closes(store: Store) -> None:
    _put(store, "k", "")
    closing = asyncio.create_task(store.close())
    while not closing.done():
        store.submit(lambda _: None, lambda _, __: None)
        await asyncio.sleep(0.0005)
    assert await closing


async def test_disk_that_is_full_when_the_daemon_starts_is_made_room_on_by_the_reserve(small_disk: Path) -> None:
    store = Store(small_disk / "host.db")
    queue = SqliteQueue(store)
    accepted = await queue.accept(_event("x" * 30_000), [Subscriber("p", "k")])
    copies = {name: (small_disk / name).read_bytes() for name in ("host.db", "host.db-wal")}
    await store.close()
    for name, data in copies.items():  # as a kill leaves them
        (small_disk / name).write_bytes(data)
    with (small_disk / "filler").open("wb", buffering=0) as file, pytest.raises(OSError, match="No space"):
        while True:
            file.write(b"x" * 4096)
    store = Store(small_disk / "host.db")
    queue = SqliteQueue(store)
    delivery = await queue.consumer("p").take()
    assert delivery.id == f"{accepted.event.id}.p"
    await queue.sent([delivery])
    queue.consumer("p").ack(delivery, Result("ok"))
    await store.committed()
    await store.close()


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    folder = tmp_path / "disk"
    folder.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(folder)], check=True)
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


async def test_delivery_is_not_sent_before_its_attempt_is_on_record(store: Store) -> None:
    queue = SqliteQueue(store)
    accepted = await queue.accept(_event(), [Subscriber("p", "k")])
    consumer = queue.consumer("p")
    delivery = await consumer.take()
    with contextlib.closing(sqlite3.connect(store.path, isolation_level=None)) as other:
        other.execute("BEGIN IMMEDIATE")
        sent = asyncio.create_task(queue.sent([delivery]))
        await asyncio.sleep(0.05)
        assert store.blocked is not None
        assert not sent.done()
        other.execute("ROLLBACK")
    await asyncio.wait_for(sent, 5)
    assert queue.show(accepted.event.id).deliveries[0].attempts == 1


async def test_write_of_whoever_is_told_of_a_failure_comes_behind_those_that_are_kept(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("host.database.store.GIVE_UP", -1.0)
    written, told = list[str](), asyncio.Event()
    with contextlib.closing(sqlite3.connect(store.path, isolation_level=None)) as other:
        other.execute("BEGIN IMMEDIATE")

        def failed(_: object, error: Exception | None) -> None:
            assert error is not None
            other.execute("ROLLBACK")
            store.submit(lambda _: written.append("behind"))
            with contextlib.suppress(StopIteration):  # at once, as attempts are counted
                store.committed().send(None)
            told.set()

        store.submit(lambda _: written.append("kept"))
        store.submit(lambda _: written.append("given up"), failed)
        await asyncio.wait_for(told.wait(), 5)
        await store.committed()
    assert written == ["kept", "behind"]


async def test_a_full_disk_refuses_events_keeps_outcomes_and_recovers(small_disk: Path) -> None:
    store = Store(small_disk / "host.db")
    queue = SqliteQueue(store)
    accepted = await queue.accept(_event(), [Subscriber("p", "k")])
    consumer = queue.consumer("p")
    delivery = await consumer.take()
    await queue.sent([delivery])
    filler = small_disk / "filler"
    with filler.open("wb", buffering=0) as file, pytest.raises(OSError, match="No space"):
        while True:
            file.write(b"x" * 4096)
    consumer.ack(delivery, Result("ok"))
    with pytest.raises(UnavailableError, match="cannot be written"):
        await queue.accept(_event("x" * 600_000), [Subscriber("p", "k")])
    filler.unlink()
    await asyncio.wait_for(store.unblocked.wait(), 5)
    assert queue.show(accepted.event.id).deliveries[0].state == "ok"
    await queue.accept(_event(), [Subscriber("p", "k")])
    await store.close()


async def test_a_power_cut_at_any_byte_of_the_log_starts_again_with_a_prefix(tmp_path: Path) -> None:
    store = Store(tmp_path / "host.db")
    queue = SqliteQueue(store)
    ids = [(await queue.accept(_event(str(n)), [Subscriber("p", "k")])).event.id for n in range(4)]
    image = (tmp_path / "host.db").read_bytes()
    log = (tmp_path / "host.db-wal").read_bytes()
    await store.close()
    used = min(len(log), len(log.rstrip(b"\0")) + 4120)  # zeros may end the last frame, too
    for cut in [*range(0, used, 997), used]:
        folder = tmp_path / "cut"
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        (folder / "host.db").write_bytes(image)
        (folder / "host.db-wal").write_bytes(log[:cut])
        again = Store(folder / "host.db")
        found = again.read(lambda db: [row[0] for row in db.execute("SELECT id FROM events ORDER BY seq")])
        assert found == ids[: len(found)]
        SqliteQueue(again)
        await again.close()
    assert found == ids


def test_the_back_off_grows_to_ten_minutes() -> None:
    for attempts, expected in ((1, 1), (2, 2), (3, 4), (10, 512), (11, 600), (100, 600)):
        for _ in range(50):
            assert expected * 0.8 <= RETRY_BACKOFF.after(attempts - 1) <= expected * 1.2


async def test_wait_that_begins_right_after_the_outcome_sees_it(store: Store) -> None:
    queue = SqliteQueue(store)
    accepted = await queue.accept(_event(), [Subscriber("p", "k")])
    consumer = queue.consumer("p")
    delivery = await consumer.take()
    await queue.sent([delivery])
    consumer.ack(delivery, Result("ok"))  # written in the loop's next turn
    async with asyncio.timeout(5):  # not wait_for: a task of its own would begin after that turn
        row = await queue.wait(accepted.event.id, timeout=30)
    assert [d.state for d in row.deliveries] == ["ok"]
