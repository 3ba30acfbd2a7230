"""Calls of the control socket, and the loss of the database: on record once, wherever the host is killed."""

from __future__ import annotations

import asyncio
import contextlib
import sqlite3
from collections.abc import AsyncIterator, Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from host.database.store import Store
from host.queue.owed import UNKNOWN, Debts
from isolator.audit.client import AuditClient
from isolator.audit.schema import ControlCalled
from isolator.errors import IsolatorError, UnavailableError
from isolator.ipc import messages
from isolator.ipc.packet import pair
from tests.host.audit_fake import FakeAudit
from tests.host.fake_supervisor import Daemon
from tests.host.test_owed import LATER, settled
from tests.support.timeouts import seconds

IN_THE_CALL = """
import os
from host.lifecycle.supervisor_link import SupervisorLink
real = SupervisorLink.ask
async def ask(self, request, *args):
    answer = await real(self, request, *args)
    if request.op == {op!r}:
        os.kill(os.getpid(), 9)
    return answer
SupervisorLink.ask = ask
"""
"""The supervisor has done what was asked for, and nobody is told."""
BEHIND_THE_RECORD = """
import os
from host.control.connection import Connection
from isolator.audit.client import AuditClient
real = AuditClient.record
def record(self, record, **more):
    real(self, record, **more)
    if record.TYPE == "control.called":
        self.flush()
        os.kill(os.getpid(), 9)
AuditClient.record = record
"""
AS_IT_IS_MADE = """
import os
from host.database.store import Store
real = Store._open
def opens(self):
    real(self)
    os.kill(os.getpid(), 9)
Store._open = opens
"""


def called(daemon: Daemon, verb: str) -> list[dict[str, Any]]:
    return [one for one in daemon.of_type("control.called") if one["data"]["verb"] == verb]


@pytest.mark.parametrize(
    ("at", "verdict"), [(IN_THE_CALL.format(op=messages.StopRun.op), "unknown"), (BEHIND_THE_RECORD, "ok")],
    ids=["in the call", "behind the record"],
)  # fmt: skip
async def test_call_whose_host_is_killed_is_on_record_once(daemon: Daemon, at: str, verdict: str) -> None:
    await daemon.kill_host()
    daemon.first = at
    await daemon.start_host()
    daemon.add("one", LATER)
    with pytest.raises(ValueError):  # the connection ends without an answer
        await daemon.ask("plugin.stop", name="one")
    assert daemon.host is not None and daemon.channel is not None
    await daemon.host.wait()
    daemon.channel.close()
    await daemon.poll(lambda: len(called(daemon, "plugin.stop")) == (verdict == "ok"))
    daemon.write_trail(daemon.paths.audit_log)

    daemon.first = ""
    await daemon.start_host()
    await daemon.until(lambda: called(daemon, "plugin.stop"))
    await settled(daemon)
    (record,) = called(daemon, "plugin.stop")
    said = record["data"]
    assert (record["plugin"], said["uid"], said["role"], said["verdict"]) == ("one", 0, "operator", verdict)


async def test_call_that_the_next_host_begins_anew_is_on_record_once(daemon: Daemon) -> None:
    daemon.add("one", LATER)
    daemon.write_trail(daemon.paths.audit_log)
    daemon.starts_may_go_on.clear()
    call = asyncio.create_task(daemon.ask("plugin.start", name="one"))
    await daemon.until(lambda: daemon.ensured)
    await daemon.exchange_host()
    await daemon.until(lambda: len(daemon.ensured) == 2)
    daemon.starts_may_go_on.set()
    await call
    await settled(daemon)
    assert [one["data"]["verdict"] for one in called(daemon, "plugin.start")] == ["ok"]


async def test_calls_that_are_answered_are_owed_no_more_and_what_fails_has_its_code(daemon: Daemon) -> None:
    daemon.add("one", LATER)
    await daemon.ask("plugin.stop", name="one")
    with pytest.raises(IsolatorError):
        await daemon.ask("plugin.stop", name="other")
    await daemon.until(lambda: len(called(daemon, "plugin.stop")) == 2)
    await settled(daemon)
    assert [one["data"]["verdict"] for one in called(daemon, "plugin.stop")] == ["ok", "not_found"]


async def test_call_waits_for_no_database_that_cannot_be_written(daemon: Daemon) -> None:
    daemon.add("one", LATER)
    db = sqlite3.connect(daemon.paths.host_database, isolation_level=None)
    db.execute("BEGIN IMMEDIATE")
    await daemon.ask("plugin.stop", name="one")
    db.close()
    await daemon.until(lambda: called(daemon, "plugin.stop"))
    await settled(daemon)
    assert len(called(daemon, "plugin.stop")) == 1


CALLED = ControlCalled(verb="v", uid=0, pid=1, role=None, verdict=UNKNOWN)


class Process:
    """One process of a host, and what it owes; as it ends, what it has sent is on disk, and the rest is owed still."""

    def __init__(self, store: Store, trail: FakeAudit, folder: Path) -> None:
        ours, theirs = pair()
        trail.listen_to_audit(theirs)
        self.audit = AuditClient(ours)
        self.debts = Debts(store, self.audit, folder)
        self._store, self._trail, self._folder = store, trail, folder

    async def until_it_owes(self, number: int) -> None:
        await self._trail.poll(lambda: len(self._store.rows("SELECT id FROM owed")) == number)

    def write_trail(self) -> None:
        self._trail.write_trail(self._folder)

    def end(self) -> None:
        self.debts.close()
        self.audit.close()
        self._trail.close_audit()
        self.write_trail()


async def make_up(process: Process) -> None:
    """Let a process make what those before it have left, and end."""
    process.debts.find()
    await process.until_it_owes(0)
    process.end()


@pytest.fixture
async def processes(tmp_path: Path) -> AsyncIterator[tuple[FakeAudit, Callable[[], Process]]]:
    """The trail of a host, and what begins a process of it, which is ended before the next."""
    store, trail = Store(tmp_path / "host.db"), FakeAudit()
    yield trail, partial(Process, store, trail, tmp_path / "audit")
    await store.close()


async def test_of_two_calls_that_say_the_same_the_one_that_goes_on_is_on_record_once_its_host_is_killed(
    processes: tuple[FakeAudit, Callable[[], Process]],
) -> None:
    trail, begin = processes
    first = begin()
    ended, _ = first.debts.begin(CALLED, "one"), first.debts.begin(CALLED, "one")
    first.debts.end(ended, ControlCalled(verb="v", uid=0, pid=1, role=None, verdict="ok"), urgent=True)
    await first.until_it_owes(1)
    first.end()
    await make_up(begin())
    assert [one["data"]["verdict"] for one in trail.records] == ["ok", "unknown"]


async def test_of_two_calls_that_say_the_same_none_is_lost_with_a_host_that_is_killed_as_it_looks_for_them(
    processes: tuple[FakeAudit, Callable[[], Process]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    trail, begin = processes
    first = begin()
    trail.audit_acks = False
    ended, _ = first.debts.begin(CALLED, "one"), first.debts.begin(CALLED, "one")
    first.debts.end(ended, CALLED, urgent=True)
    await trail.poll(lambda: trail.records)
    first.end()
    trail.audit_acks = True
    second = begin()
    monkeypatch.setattr(second.debts, "pay", lambda _: None)  # it is killed before
    second.debts.find()
    await second.until_it_owes(1)
    second.end()
    await make_up(begin())
    assert len(trail.records) == 2


async def test_call_of_a_killed_host_is_on_record_although_the_next_has_one_that_says_the_same_as_it_looks_for_it(
    processes: tuple[FakeAudit, Callable[[], Process]],
) -> None:
    trail, begin = processes
    first = begin()
    first.debts.begin(CALLED, "one")
    first.end()
    trail.audit_acks = False
    second = begin()
    second.debts.find()
    second.debts.end(second.debts.begin(CALLED, "one"), CALLED, urgent=True)
    await trail.poll(lambda: trail.records)
    second.write_trail()
    trail.acknowledge()
    await second.until_it_owes(0)
    second.end()
    assert len(trail.records) == 2


async def test_of_two_calls_that_say_the_same_the_one_whose_record_is_lost_with_the_machine_is_made_again(
    processes: tuple[FakeAudit, Callable[[], Process]],
) -> None:
    """The record of the other is on disk, and stands for that one alone."""
    trail, begin = processes
    first = begin()
    trail.audit_acks = False
    one, other = first.debts.begin(CALLED, "one"), first.debts.begin(CALLED, "one")
    first.debts.end(one, CALLED, urgent=True)
    await trail.poll(lambda: len(trail.records) == 1)
    first.debts.end(other, CALLED, urgent=True)
    await trail.poll(lambda: len(trail.records) == 2)
    trail.tell_audit({"acked": 1})
    await first.until_it_owes(1)
    trail.records.pop()
    first.end()
    trail.audit_acks = True
    await make_up(begin())
    assert len(trail.records) == 2


async def test_record_that_could_not_be_forgotten_at_first_is_forgotten_with_the_next_and_not_made_again(
    processes: tuple[FakeAudit, Callable[[], Process]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    trail, begin = processes
    first, failed = begin(), asyncio.Event()

    async def fail(_: object) -> None:
        failed.set()
        monkeypatch.undo()
        raise UnavailableError("database", "the disk is full", "make room")

    monkeypatch.setattr(first.debts, "write", fail)
    first.debts.end(first.debts.begin(CALLED, "one"), CALLED, urgent=True)
    await asyncio.wait_for(failed.wait(), seconds(20))
    first.debts.end(first.debts.begin(CALLED, "one"), CALLED, urgent=True)
    await first.until_it_owes(0)
    first.end()
    second = begin()
    assert second.debts.find() is None
    second.end()
    assert len(trail.records) == 2


async def test_calls_do_not_pile_up_before_a_database_that_cannot_be_written(tmp_path: Path) -> None:
    store, nobody = Store(tmp_path / "host.db", fatal=lambda _: None), AuditClient(None)
    debts = Debts(store, nobody, tmp_path)
    with contextlib.closing(sqlite3.connect(store.path, isolation_level=None)) as db:
        db.execute("BEGIN IMMEDIATE")
        for _ in range(100):
            debts.begin(CALLED, None)
        assert len(store._ops) == 1, "each is tried again with every further one, for as long as that takes"
    debts.close()
    await store.close()


async def test_loss_of_the_database_is_on_record_although_its_host_is_killed_as_it_makes_one(daemon: Daemon) -> None:
    await daemon.kill_host()
    for path in daemon.paths.host_lib.glob(f"{daemon.paths.host_database.name}*"):
        path.unlink()
    daemon.first = AS_IT_IS_MADE
    with pytest.raises(IsolatorError):
        await daemon.start_host()
    assert daemon.channel is not None and daemon.host is not None
    await daemon.host.wait()
    daemon.channel.close()
    daemon.write_trail(daemon.paths.audit_log)

    daemon.first = ""
    await daemon.start_host()
    await daemon.until(lambda: daemon.of_type("config.changed"))
    await settled(daemon)
    (record,) = daemon.of_type("config.changed")
    assert record["data"]["lost"] and record["plugin"] is None
