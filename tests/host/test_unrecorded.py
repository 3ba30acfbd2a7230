"""Records of accepted events: each is made once, wherever the host is killed between its answer and them."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest

from host.cluster.delivery.queue import ClusterQueue
from host.cluster.entries import EventRef
from host.cluster.store import make_tables
from host.composition.cluster import accepted_here
from host.database.store import Store
from host.intake.unrecorded import unrecorded
from host.queue.beside_trail import Compared
from host.queue.interface import NewEvent, Subscriber
from host.queue.owed import Owed
from host.queue.sqlite import SqliteQueue
from tests.host.fake_supervisor import Daemon
from tests.host.test_owed import SILENT, owes, settled
from tests.support import sidecars

KILLED = """
import os
from host.intake.intake import EventRecords
real = EventRecords.accepted
def accepted(self, event, *more):
    if "last" not in event.payload or {behind}:
        real(self, event, *more)
        self._record.__self__.flush()
    if "last" in event.payload:
        os.kill(os.getpid(), 9)
EventRecords.accepted = accepted
"""
ACCEPTS = sidecars.oneshot('return {"status": "ok"}')


async def kill_after_answer(daemon: Daemon, *, behind: bool = False) -> dict[str, Any]:
    """Have an event answered, and the host killed before its record, or behind it; returns the answer."""
    await daemon.kill_host()
    daemon.first = KILLED.format(behind=behind)
    await daemon.start_host()
    await daemon.emit()
    event = await daemon.emit(project_id="last")
    assert daemon.host is not None and daemon.channel is not None
    await daemon.host.wait()
    daemon.channel.close()
    await daemon.until(lambda: len(daemon.of_type("event.accepted")) == 1 + behind)
    daemon.first = ""
    return event


def accepted(daemon: Daemon, event: dict[str, Any]) -> list[dict[str, Any]]:
    return [record for record in daemon.of_type("event.accepted") if record["event_id"] == event["id"]]


async def test_event_whose_host_was_killed_behind_its_answer_is_on_record_before_its_delivery(daemon: Daemon) -> None:
    daemon.add("one", ACCEPTS)
    event = await kill_after_answer(daemon)
    daemon.write_trail(daemon.paths.audit_log)
    await daemon.start_host()
    row = await daemon.outcome(event)
    await settled(daemon)
    (record,) = accepted(daemon, event)
    data = record["data"]
    assert (record["plugin"], record["delivery_id"]) == (None, None)
    assert (data["event"], data["subject"], data["by"], data["plugins"]) == (
        "deploy.completed",
        "last",
        "uid:0",
        ["one"],
    )
    assert data["number"] == 2 and data["accepted_at"] < record["time"]
    sent = next(one for one in daemon.of_type("event.dispatched") if one["event_id"] == event["id"])
    assert daemon.records.index(record) < daemon.records.index(sent)
    assert [one["state"] for one in row["deliveries"]] == ["ok"]


async def test_event_is_on_record_before_a_host_that_was_put_in_place_delivers_it(daemon: Daemon) -> None:
    daemon.add("one", ACCEPTS)
    await daemon.ask("plugin.pause", name="one")
    event = await kill_after_answer(daemon)
    daemon.write_trail(daemon.paths.audit_log)
    daemon.audit_acks = False
    await daemon.start_host()
    await owes(daemon)
    daemon.first = "import host.composition.host as composed; composed.OWED = 600.0"
    await daemon.exchange_host()
    await daemon.ask("plugin.resume", name="one")
    for _ in range(3):
        await daemon.ask("plugin.list")
    assert not daemon.ensured, "nothing is sent before the trail has told what it lacks"
    daemon.acknowledge()
    await daemon.outcome(event)
    (record,) = accepted(daemon, event)
    sent = next(one for one in daemon.of_type("event.dispatched") if one["event_id"] == event["id"])
    assert daemon.records.index(record) < daemon.records.index(sent)


async def test_event_whose_record_was_handed_over_gets_no_other_one(daemon: Daemon) -> None:
    event = await kill_after_answer(daemon, behind=True)
    daemon.write_trail(daemon.paths.audit_log)
    await daemon.start_host()
    await settled(daemon)
    (record,) = accepted(daemon, event)
    assert "accepted_at" not in record["data"]


async def test_event_whose_record_is_on_its_way_to_the_trail_gets_no_other_one(daemon: Daemon) -> None:
    event = await kill_after_answer(daemon, behind=True)
    last = daemon.records.pop()
    daemon.write_trail(daemon.paths.audit_log)
    daemon.audit_acks = False
    await daemon.start_host()
    await owes(daemon)
    daemon.records.insert(1, last)
    daemon.write_trail(daemon.paths.audit_log)
    daemon.acknowledge()
    await settled(daemon)
    (record,) = accepted(daemon, event)
    assert "accepted_at" not in record["data"]


async def test_event_is_on_record_once_although_the_next_host_is_killed_too(daemon: Daemon) -> None:
    event = await kill_after_answer(daemon)
    daemon.write_trail(daemon.paths.audit_log)
    daemon.audit_acks = False
    await daemon.start_host()
    await owes(daemon)
    later = await daemon.emit()
    await daemon.until(lambda: accepted(daemon, later))
    await daemon.kill_host()
    assert not accepted(daemon, event)
    daemon.write_trail(daemon.paths.audit_log)
    daemon.audit_acks = True
    await daemon.start_host()
    await daemon.until(lambda: accepted(daemon, event))
    await settled(daemon)
    assert len(accepted(daemon, event)) == len(accepted(daemon, later)) == 1
    assert (
        "accepted_at" in accepted(daemon, event)[0]["data"] and "accepted_at" not in accepted(daemon, later)[0]["data"]
    )


async def test_event_that_was_delivered_is_on_record_all_the_same(shared_dir: Path) -> None:
    daemon = Daemon(shared_dir, config={"audit": {"disk_full": "continue"}})
    try:
        await daemon.start()
        daemon.add("one", ACCEPTS)
        await daemon.deliver()
        await daemon.kill_host()
        daemon.write_trail(daemon.paths.audit_log)
        daemon.first = SILENT
        await daemon.start_host()
        event = await daemon.emit()
        assert [one["state"] for one in (await daemon.outcome(event))["deliveries"]] == ["ok"]
        await daemon.kill_host()
        daemon.first = ""
        await daemon.start_host()
        await daemon.until(lambda: accepted(daemon, event))
        await settled(daemon)
        (record,) = accepted(daemon, event)
        assert record["data"]["plugins"] == ["one"] and record["data"]["accepted_at"]
    finally:
        await daemon.stop()


def described(found: list[Owed]) -> list[tuple[str, str | None, int | None]]:
    return [(one.record.TYPE, one.plugin, one.record.data.get("number")) for one in found]


async def test_delivery_without_room_is_owed_with_its_event_and_behind_it(tmp_path: Path) -> None:
    store = Store(tmp_path / "host.db")
    queue = SqliteQueue(store, limit=1)
    for _ in range(3):
        await queue.accept(NewEvent("deploy.completed", "{}"), [Subscriber("one", None), Subscriber("two", None)])
    await queue.purge("two")
    dead = ("event.dead", "one", None)
    found = store.read(lambda db: unrecorded(db, Compared(recorded=2)))
    assert described(found) == [dead, ("event.accepted", None, 3), dead]
    assert found[1].record.data["plugins"] == ["one"] and found[1].id == found[2].event_id
    assert not store.read(lambda db: unrecorded(db, Compared(recorded=0, since=time.time() + 60)))
    await store.close()


@pytest.mark.parametrize(
    "harm",
    ["accepted=1e300", "accepted='soon'", "accepted=X'00'", "payload=X'ff'", "by=X''", "name=X'00'", "subject=X''"],
)
async def test_event_whose_row_is_damaged_keeps_no_other_from_its_record(tmp_path: Path, harm: str) -> None:
    store = Store(tmp_path / "host.db")
    queue = SqliteQueue(store)
    for _ in range(2):
        await queue.accept(NewEvent("deploy.completed", "{}"), [])
    await store.run(lambda db: db.execute(f"UPDATE events SET {harm} WHERE seq=1"))
    found = store.read(lambda db: unrecorded(db, Compared(recorded=0)))
    assert described(found) == [("event.accepted", None, 2)]
    await store.close()


async def test_event_that_another_host_of_the_cluster_accepted_is_not_owed(tmp_path: Path) -> None:
    store = Store(tmp_path / "host.db")
    assert store.read(accepted_here) == ""
    queue = ClusterQueue(store, host="a")
    await store.run(lambda db: make_tables(db, "a", 1))
    queue.emit = lambda db, entry: EventRef("a", 1, db.execute("SELECT count(*) FROM events").fetchone()[0])
    for _ in range(2):
        await queue.accept(NewEvent("deploy.completed", "{}"), [])
    await store.run(lambda db: db.execute("UPDATE cluster_events SET host='b' WHERE seq=1"))
    found = store.read(lambda db: unrecorded(db, Compared(recorded=0), accepted_here(db)))
    assert described(found) == [("event.accepted", None, 2)]
    await store.close()
