"""Start of attempts: counted and on record before anything is sent, together, and whoever is killed in between."""

from __future__ import annotations

import asyncio
import contextlib
import json
import shutil
import sqlite3
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from host.database.store import Store
from host.delivery.attempts import Attempts
from host.intake.intake import EventRecords
from host.queue.interface import Delivery, Event, NewEvent, Result, Subscriber
from host.queue.sqlite import SqliteQueue
from host.queue.states import States
from isolator.audit.client import AuditClient
from isolator.ipc.channel import pair
from tests.audit.any_record import any_record
from tests.host.fake_supervisor import Daemon
from tests.support import sidecars
from tests.support.timeouts import seconds

EVENT = {"project_id": "p1", "deployment_id": "d2", "url": "https://a.example", "duration_ms": 5}
NAMES = ["a", "b", "c"]


@pytest.fixture
async def store(tmp_path: Path) -> AsyncIterator[Store]:
    opened = Store(tmp_path / "host.db")
    yield opened
    await opened.close()


@dataclass(eq=False)
class Begun:
    """An attempt of a delivery."""

    delivery: Delivery
    send: Callable[[], None]
    run: str = "run"
    request: bytes = b"request"

    def listen(self) -> None:
        """Await nothing."""


def _unprepared(_: Event) -> None:
    """Prepare nothing."""


async def _taken(queue: SqliteQueue) -> list[Delivery]:
    await queue.accept(NewEvent("deploy.completed", "{}"), [Subscriber(name, None) for name in NAMES])
    return [await queue.consumer(name).take() for name in NAMES]


def _rows(store: Store) -> dict[str, tuple[str, int]]:
    """State and attempts by plugin, as another process finds them on disk."""
    with contextlib.closing(sqlite3.connect(store.path)) as other:
        found = other.execute("SELECT plugin, state, attempts FROM deliveries ORDER BY plugin")
        return {plugin: (state, attempts) for plugin, state, attempts in found}


async def test_attempts_of_one_turn_share_a_transaction_and_a_packet_and_are_recorded_before_they_are_sent(
    store: Store,
) -> None:
    queue = SqliteQueue(store)
    ours, theirs = pair()
    attempts = Attempts(queue, AuditClient(ours), wait_for_trail=True)
    all_sent = asyncio.Event()
    found: list[tuple[int, list[str]]] = []
    theirs.setblocking(False)

    def send() -> None:
        if not found:
            lines = [json.loads(line) for line in theirs.recv(1 << 16).splitlines()]
            found.append((store.commits, [line["plugin"] for line in lines]))
            assert len({(line["time"], line["mono"]) for line in lines}) == 1, "they begin at one moment"
            assert list(_rows(store).values()) == [("in_flight", 1)] * 3
        else:
            all_sent.set()

    deliveries, before = await _taken(queue), store.commits
    for delivery in deliveries:
        attempts.begin(Begun(delivery, send))
    await asyncio.wait_for(all_sent.wait(), seconds(5))
    assert found == [(before + 1, NAMES)]
    with pytest.raises(BlockingIOError):
        theirs.recv(1)
    await attempts.close()
    theirs.close()


async def test_waiting_worker_sends_in_the_turn_after_the_event_is_safe_and_answered(store: Store) -> None:
    queue = SqliteQueue(store, on_ready=lambda: attempts.schedule())  # noqa: PLW0108 # it does not exist yet
    ours, theirs = pair()
    attempts = Attempts(queue, AuditClient(ours), wait_for_trail=True)
    sent: list[str] = []

    async def work(name: str) -> None:
        delivery = await queue.consumer(name).take()
        attempts.begin(Begun(delivery, lambda: sent.append(name)))

    workers = [asyncio.create_task(work(name)) for name in NAMES]
    await asyncio.sleep(0)
    answered: asyncio.Future[None] = asyncio.get_running_loop().create_future()
    subscribers = [Subscriber(name, None) for name in NAMES]
    queue.submit(NewEvent("deploy.completed", "{}"), subscribers, lambda _, __: answered.set_result(None))
    await answered
    assert sent == []
    await asyncio.sleep(0)
    assert sent == NAMES
    await asyncio.gather(*workers)
    await attempts.close()
    theirs.close()


async def test_taker_that_needs_no_wait_sends_in_the_turn_of_its_event_whose_record_goes_with_the_attempts(
    store: Store,
) -> None:
    ours, theirs = pair()
    audit = AuditClient(ours)

    def ready() -> None:
        attempts.begin_gathered()

    queue = SqliteQueue(store, on_accepted=EventRecords(audit.record).accepted, on_ready=ready)
    attempts = Attempts(queue, audit, wait_for_trail=True)
    theirs.setblocking(False)
    packets: list[list[tuple[str, str | None]]] = []
    sent: list[str] = []

    def begin(delivery: Delivery) -> bool:
        def send() -> None:
            with contextlib.suppress(BlockingIOError):
                records = [json.loads(line) for line in theirs.recv(1 << 16).splitlines()]
                packets.append([(record["type"], record["plugin"]) for record in records])
            assert {attempts for _, attempts in _rows(store).values()} == {1}
            sent.append(delivery.plugin)

        attempts.begin(Begun(delivery, send))
        return True

    takers = [asyncio.create_task(queue.consumer(name).take(lambda _: _unprepared, begin)) for name in NAMES]
    await asyncio.sleep(0)
    next_turn: asyncio.Future[list[str]] = asyncio.get_running_loop().create_future()

    def answer(_: object, __: object) -> None:
        assert sent == []
        asyncio.get_running_loop().call_soon(lambda: next_turn.set_result([*sent]))

    queue.submit(NewEvent("deploy.completed", "{}"), [Subscriber(name, None) for name in NAMES], answer)
    assert await next_turn == NAMES
    assert packets == [[("event.accepted", None), *(("event.dispatched", name) for name in NAMES)]]
    assert not any(taker.done() for taker in takers)
    for taker in takers:
        taker.cancel()
    await attempts.close()
    theirs.close()


async def test_end_of_a_delivery_wakes_its_taker_only_where_another_may_go(store: Store) -> None:
    queue, subscribers = SqliteQueue(store), [Subscriber("a", "key")]
    consumer = queue.consumer("a")
    await queue.accept(NewEvent("deploy.completed", "{}"), subscribers)
    first = await consumer.take()
    taking = asyncio.create_task(consumer.take())
    await asyncio.sleep(0)
    waiter = consumer._waiter
    consumer.ack(first, Result("ok"))
    assert waiter is not None and not waiter.done()
    for _ in range(2):
        await queue.accept(NewEvent("deploy.completed", "{}"), subscribers)
    second = await asyncio.wait_for(taking, seconds(5))
    taking = asyncio.create_task(consumer.take())
    await asyncio.sleep(0)
    assert not taking.done(), "it is of the same key"
    consumer.ack(second, Result("ok"))
    assert (await asyncio.wait_for(taking, seconds(5))).seq == second.seq + 1


async def test_delivery_is_not_sent_before_the_kernel_has_its_record(store: Store) -> None:
    queue = SqliteQueue(store)
    ours, theirs = pair()
    audit = AuditClient(ours)
    attempts = Attempts(queue, audit, wait_for_trail=True)
    sent: list[str] = []
    deliveries = await _taken(queue)
    while not audit._send_blocked:  # fill the socket
        audit.record(any_record("net.query", text="x" * 10_000))
        audit.flush()
    for delivery in deliveries:
        attempts.begin(Begun(delivery, lambda name=delivery.plugin: sent.append(name)))
    await asyncio.sleep(0.1)
    assert sent == []
    assert {attempt for _, attempt in _rows(store).values()} == {1}
    theirs.setblocking(False)
    while len(sent) < 3:
        with contextlib.suppress(BlockingIOError):
            theirs.recv(1 << 20)
        await asyncio.sleep(0)
    assert sent == NAMES
    await attempts.close()
    theirs.close()


async def test_attempt_of_a_taker_that_waits_is_counted_with_the_event(store: Store) -> None:
    queue = SqliteQueue(store)
    consumers = {name: queue.consumer(name) for name in NAMES}
    takes = {
        name: asyncio.create_task(consumer.take(lambda _, at_once=name != "a": _unprepared if at_once else None))
        for name, consumer in consumers.items()
    }
    await asyncio.sleep(0)
    await queue.accept(NewEvent("deploy.completed", "{}"), [Subscriber(name, None) for name in NAMES])
    assert _rows(store) == {
        "a": ("queued", 0),
        "b": ("in_flight", 1),
        "c": ("in_flight", 1),
    }
    first, second, third = [await task for task in takes.values()]
    commits = store.commits
    await queue.sent([second])
    assert (second.attempts, store.commits) == (1, commits)
    await queue.sent([first])
    assert (first.attempts, store.commits) == (1, commits + 1)
    consumers["c"].release(third)  # it could not be sent after all: nothing was tried
    assert third.attempts == 0
    await store.committed()
    assert _rows(store) == {
        "a": ("in_flight", 1),
        "b": ("in_flight", 1),
        "c": ("queued", 0),
    }
    again = await consumers["c"].take()
    await queue.sent([again])
    assert _rows(store)["c"] == ("in_flight", 1)


async def test_delivery_has_the_last_of_its_states_in_one_transaction(store: Store) -> None:
    queue = SqliteQueue(store)
    first, second, third = await _taken(queue)
    for delivery in (first, second, third):
        delivery.attempts = 1
    states = States()
    states.begin([first, second])
    states.end(first, Result("ok", "ok"), 0.0)
    states.end(third, Result("retry", "busy", "not now"), 7.0)
    states.begin([third])
    for _ in range(2):  # a transaction may be tried again
        await store.run(states.write)
        found = store.rows("SELECT plugin, state, attempts, due, status, detail FROM deliveries ORDER BY plugin")
        assert found == [
            ("a", "ok", 1, 0.0, "ok", None),
            ("b", "in_flight", 1, 0.0, None, None),
            ("c", "in_flight", 1, 0.0, None, None),
        ]


async def test_taker_that_prepares_knows_whether_its_delivery_is_the_only_one_of_its_event(store: Store) -> None:
    queue, told = SqliteQueue(store), list[bool]()
    for names in (["a"], ["a", "b"]):
        take = asyncio.create_task(queue.consumer("a").take(lambda alone: told.append(alone) or _unprepared))
        await asyncio.sleep(0)
        await queue.accept(NewEvent("deploy.completed", "{}"), [Subscriber(name, None) for name in names])
        queue.consumer("a").ack(await take, Result("ok"))
    assert told == [True, False]


async def test_a_duplicate_counts_nothing(store: Store) -> None:
    queue = SqliteQueue(store)
    consumer = queue.consumer("a")
    event = NewEvent("deploy.completed", "{}", dedupe_key="once")
    take = asyncio.create_task(consumer.take(lambda _: _unprepared))
    await asyncio.sleep(0)
    await queue.accept(event, [Subscriber("a", None)])
    assert (await queue.accept(event, [Subscriber("a", None)])).duplicate
    delivery = await take
    await queue.sent([delivery])
    assert _rows(store)["a"] == ("in_flight", 1)


DIES = """
import os, signal
from isolator.audit.client import AuditClient
flushed = AuditClient.flushed
async def killed(self):
    if os.path.exists({armed!r}):
        {records_first}
        os.kill(os.getpid(), signal.SIGKILL)
    await flushed(self)
AuditClient.flushed = killed
"""


@pytest.mark.parametrize("key", [{}, {"dedupe_key": "once"}], ids=["counted with the event", "counted after it"])
@pytest.mark.parametrize("records_first", ["pass", "await flushed(self)"], ids=["unrecorded", "recorded"])
async def test_host_killed_between_count_and_send_loses_no_event_and_sends_none_uncounted(
    daemon: Daemon, records_first: str, key: dict[str, str]
) -> None:
    await daemon.kill_host()
    armed, seen = daemon.root / "armed", daemon.root / "seen"
    daemon.first = DIES.format(armed=str(armed), records_first=records_first)
    seen.touch()
    seen.chmod(0o666)
    await daemon.start_host()
    note = f'open({str(seen)!r}, "a").write(os.environ["PLUGIN_NAME"] + " " + params["_meta"]["id"] + "\\n")'
    answer = "if id is not None:\n    send(id=id, result={'status': 'ok'})"
    for number in range(3):
        daemon.add(f"oneshot-{number}", sidecars.oneshot(f"{note}\nreturn {{}}"))
        script = sidecars.stream(f"{note}\n{answer}")
        daemon.add(f"stream-{number}", script, transport={"mode": "stream"})
    await daemon.outcome(await daemon.emit())
    seen.write_text("")
    armed.touch()
    with contextlib.suppress(OSError, ValueError):  # the answer may or may not come before the host dies
        await daemon.ask("event.emit", name="deploy.completed", payload=EVENT, **key)
    assert daemon.host is not None
    await asyncio.wait_for(daemon.host.wait(), seconds(10))
    assert seen.read_text() == ""
    armed.unlink()
    assert daemon.channel is not None
    daemon.channel.close()
    copy = shutil.copytree(daemon.paths.host_lib, daemon.root / "copy")  # the host itself is to recover the log
    with contextlib.closing(sqlite3.connect(copy / "host.db")) as found:
        stood = found.execute("SELECT plugin, state, attempts FROM deliveries WHERE seq=2").fetchall()
    counted = {plugin: attempts for plugin, _, attempts in stood}
    assert len(counted) == 6
    assert {(state, attempts) for _, state, attempts in stood} <= {("in_flight", 1), ("queued", 0)}
    assert set(counted.values()) == {1} or (key and 1 in counted.values())
    await daemon.start_host()
    (event, _) = (await daemon.ask("event.list"))["events"]
    row = await daemon.outcome(event)
    assert {d["plugin"]: (d["state"], d["attempts"]) for d in row["deliveries"]} == {
        plugin: ("ok", attempts + 1) for plugin, attempts in counted.items()
    }
    assert sorted(seen.read_text().splitlines()) == [f"{plugin} {event['id']}" for plugin in sorted(counted)]
    # Those that did not begin in the turn in which it died have no record of their first attempt.
    records = [r for r in daemon.of_type("event.dispatched") if r["event_id"] == event["id"]]
    recorded = {(r["plugin"], r["data"]["attempt"]) for r in records}
    assert len(recorded) == len(records)
    again = {(plugin, attempts + 1) for plugin, attempts in counted.items()}
    lost = recorded - again
    assert again <= recorded
    assert lost <= {(plugin, 1) for plugin, attempts in counted.items() if attempts}
    assert bool(lost) == (records_first != "pass")
