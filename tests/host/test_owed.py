"""Records of what an operator changed: each is made once, wherever the host is killed between the change and them."""

from __future__ import annotations

import asyncio
import contextlib
import json
import sqlite3
from pathlib import Path
from typing import Any

import pytest

from host.database.store import Store
from host.queue.owed import Debts
from isolator.audit import client
from isolator.audit.client import AuditClient
from isolator.audit.schema import PluginPaused, PluginResumed
from isolator.errors import IsolatorError, UnavailableError
from isolator.ipc.packet import pair
from tests.host.fake_supervisor import Daemon
from tests.support import sidecars
from tests.support.timeouts import seconds

KILLED = """
import os
from host.queue.owed import Debts
real, calls = Debts.pay, []
def pay(self, records):
    calls.append(records)
    if len(calls) < {change}:
        real(self, records)
        return self._audit.flush()
    if {behind}:
        real(self, records)
        self._audit.flush()
    os.kill(os.getpid(), 9)
Debts.pay = pay
"""
FAILS = """
from host.plugins.keyfile import KeyFile
saved, calls = KeyFile.save, []
def save(self, keys):
    calls.append(len(keys))
    if calls[-2:] == [2, 1]:
        raise OSError(28, "No space left on device")
    saved(self, keys)
KeyFile.save = save
"""
"""The old key of a rotation cannot be taken away."""
LATER = sidecars.oneshot('return {"status": "retry", "retry_after_ms": 600000}')
CONFIG = {"colour": {"type": "string"}}
REFUSES = sidecars.oneshot('return {"status": "rejected"}')


async def begin(daemon: Daemon, kind: str, verb: str) -> dict[str, Any]:
    """Bring a plugin and an event to where the change may come; returns the change's parameters."""
    daemon.add("one", REFUSES if kind == "event.replayed" else LATER, config_schema=CONFIG)
    if kind == "config.changed":
        if verb == "config.unset":
            await daemon.ask("config.set", name="one", config={"colour": "blue"})
        return (
            {"name": "one", "config": {"colour": "red"}} if verb == "config.set" else {"name": "one", "key": "colour"}
        )
    event = await daemon.emit()
    outcome = "rejected" if kind == "event.replayed" else "retry"
    await daemon.until(lambda: any(r["data"]["outcome"] == outcome for r in daemon.of_type("event.response")))
    if kind == "plugin.resumed":
        await daemon.ask("plugin.pause", name="one")
    if kind == "event.replayed":
        await daemon.outcome(event)
    return {"name": "one"} if kind.startswith("plugin.") else {"id": event["id"]}


@pytest.mark.parametrize("behind", [False, True], ids=["before the record", "behind the record"])
@pytest.mark.parametrize(
    ("kind", "verb"),
    [
        ("config.changed", "config.set"), ("event.skipped", "event.skip"),
        ("event.replayed", "event.replay"), ("plugin.paused", "plugin.pause"),
        pytest.param("config.changed", "config.unset", marks=pytest.mark.wide),
        pytest.param("event.cancelled", "event.cancel", marks=pytest.mark.wide),
        pytest.param("event.retried", "event.retry", marks=pytest.mark.wide),
        pytest.param("plugin.resumed", "plugin.resume", marks=pytest.mark.wide),
    ],
)  # fmt: skip
async def test_change_of_an_operator_is_on_record_once(daemon: Daemon, kind: str, verb: str, behind: bool) -> None:
    await daemon.kill_host()
    daemon.first = KILLED.format(behind=behind, change=2 if verb in ("plugin.resume", "config.unset") else 1)
    await daemon.start_host()
    params = await begin(daemon, kind, verb)
    with pytest.raises(ValueError):  # the connection ends without an answer
        await daemon.ask(verb, **params)
    assert daemon.host is not None and daemon.channel is not None
    await daemon.host.wait()
    daemon.channel.close()
    before = verb == "config.unset"
    await daemon.poll(lambda: len(daemon.of_type(kind)) == before + behind)
    daemon.write_trail(daemon.paths.audit_log)

    daemon.first = ""
    await daemon.start_host()
    await daemon.until(lambda: len(daemon.of_type(kind)) > before)
    await settled(daemon)
    (record,) = daemon.of_type(kind)[before:]
    assert record["plugin"] == "one" and record["data"]["by"] == "uid:0"
    if "id" in params:
        assert record["event_id"] == params["id"] and record["delivery_id"] == f"{params['id']}.one"


@pytest.mark.parametrize(("kind", "verb"), [("config.changed", "config.set"), ("event.retried", "event.retry")])
async def test_two_changes_at_once_that_say_the_same_are_both_on_record(daemon: Daemon, kind: str, verb: str) -> None:
    await daemon.kill_host()
    daemon.first = KILLED.format(behind=False, change=2)
    await daemon.start_host()
    params = await begin(daemon, kind, verb)
    reader, writer = await asyncio.open_unix_connection(str(daemon.paths.control_socket))
    asked = [json.dumps({"jsonrpc": "2.0", "id": n, "method": verb, "params": params}) for n in range(2)]
    writer.write("".join(f"{line}\n" for line in asked).encode())
    await reader.read()
    writer.close()
    assert daemon.host is not None and daemon.channel is not None
    await daemon.host.wait()
    daemon.channel.close()
    await daemon.poll(lambda: daemon.of_type(kind))
    daemon.write_trail(daemon.paths.audit_log)

    daemon.first = ""
    await daemon.start_host()
    await daemon.until(lambda: len(daemon.of_type(kind)) > 1)
    await settled(daemon)
    assert len(daemon.of_type(kind)) == 2


@pytest.mark.parametrize(("kind", "verb"), [("event.skipped", "event.skip"), ("event.retried", "event.retry")])
async def test_change_that_waits_for_the_disk_is_on_record_once_there_is_room(
    daemon: Daemon, kind: str, verb: str
) -> None:
    await daemon.kill_host()
    daemon.first = "from host.database import store\nstore.GIVE_UP = 0.2\n"
    await daemon.start_host()
    params = await begin(daemon, kind, verb)
    with contextlib.closing(sqlite3.connect(daemon.paths.host_database, isolation_level=None)) as db:
        db.execute("BEGIN IMMEDIATE")  # as little can be written as on a full disk
        with pytest.raises(UnavailableError, match="cannot be written"):
            await daemon.ask(verb, **params)
        assert not daemon.of_type(kind)
        db.execute("ROLLBACK")
    await daemon.until(lambda: daemon.of_type(kind))
    await settled(daemon)
    (record,) = daemon.of_type(kind)
    assert record["event_id"] == params["id"] and record["data"]["by"] == "uid:0"


async def test_change_that_fails_behind_its_transaction_is_on_record(daemon: Daemon) -> None:
    await daemon.kill_host()
    daemon.first = FAILS
    await daemon.start_host()
    await begin(daemon, "config.changed", "config.unset")
    with pytest.raises(IsolatorError, match="No space left"):
        await daemon.ask("config.rotate_key")
    await daemon.until(lambda: len(daemon.of_type("config.changed")) == 2)
    assert daemon.of_type("config.changed")[1]["data"] == {"names": [], "by": "uid:0", "rotated": 1}
    await settled(daemon)


async def test_record_for_which_there_is_no_room_is_owed_until_there_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(client, "MAX_PENDING", 3)
    store, audit = Store(tmp_path / "host.db"), AuditClient(None)
    debts = Debts(store, audit, tmp_path)
    for _ in range(3):
        audit.record(PluginPaused(by="uid:1"), plugin="one")
    with debts.of_plugin("one", lambda: PluginResumed(by="uid:0", seconds=1.0)) as change:
        await store.run(change.note)
    ours, theirs = pair()
    theirs.setblocking(False)
    audit.reconnect(ours)
    loop, got = asyncio.get_running_loop(), []
    async with asyncio.timeout(seconds(20)):
        while len(got) < 4:
            assert store.rows("SELECT id FROM owed"), "it is on no disk"
            got += [json.loads(line)["type"] for line in (await loop.sock_recv(theirs, 65536)).split(b"\n")]
            theirs.send(json.dumps({"acked": len(got)}).encode())
        while store.rows("SELECT id FROM owed"):  # noqa: ASYNC110 # no event tells
            await asyncio.sleep(0.01)
    assert got == ["plugin.paused"] * 3 + ["plugin.resumed"] and not audit.lost
    theirs.close()
    audit.close()
    await store.close()


async def settled(daemon: Daemon) -> None:
    """Wait until nothing is owed any more."""
    with contextlib.closing(sqlite3.connect(f"file:{daemon.paths.host_database}?mode=ro", uri=True)) as db:
        await daemon.poll(lambda: not db.execute("SELECT 1 FROM owed").fetchall())
