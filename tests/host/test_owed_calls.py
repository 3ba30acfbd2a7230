"""Calls of the control socket, and the loss of the database: on record once, wherever the host is killed."""

from __future__ import annotations

import asyncio
import contextlib
import sqlite3
from pathlib import Path
from typing import Any

import pytest

from host.database.store import Store
from host.queue.owed import UNKNOWN, Debts
from isolator.audit.client import AuditClient
from isolator.audit.schema import ControlCalled
from isolator.errors import IsolatorError
from isolator.ipc import messages
from tests.host.fake_supervisor import Daemon
from tests.host.test_owed import LATER, settled

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


async def test_calls_do_not_pile_up_before_a_database_that_cannot_be_written(tmp_path: Path) -> None:
    store, nobody = Store(tmp_path / "host.db", fatal=lambda _: None), AuditClient(None)
    debts, called = Debts(store, nobody, tmp_path), ControlCalled(verb="v", uid=0, pid=1, role=None, verdict=UNKNOWN)
    with contextlib.closing(sqlite3.connect(store.path, isolation_level=None)) as db:
        db.execute("BEGIN IMMEDIATE")
        for _ in range(100):
            debts.begin(called, None)
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
