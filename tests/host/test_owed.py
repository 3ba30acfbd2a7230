"""Records of what an operator changed: each is made once, wherever the host is killed between the change and them."""

from __future__ import annotations

import asyncio
import contextlib
import json
import sqlite3
from collections.abc import Awaitable
from pathlib import Path
from typing import Any

import pytest

from host.database.store import Store
from host.queue.owed import Debts
from isolator.audit import client
from isolator.audit.client import AuditClient
from isolator.audit.schema import PluginPaused, PluginResumed
from isolator.errors import IsolatorError, UnavailableError
from isolator.ipc import messages
from isolator.ipc.messages import PluginState
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
SILENT = """
from isolator.audit.client import AuditClient
AuditClient.flush = lambda self: None
"""
"""Nothing reaches the audit process: what the host has of records dies with it."""
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
    daemon.first = KILLED.format(behind=False, change=3 if verb == "event.retry" else 2)
    await daemon.start_host()
    params = await begin(daemon, kind, verb)
    if verb == "event.retry":
        await daemon.ask("plugin.pause", name="one")  # it goes on waiting once retried, so both change it
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


class Session:
    """One connection to the control socket: what was staged lasts as long as it."""

    def __init__(self, daemon: Daemon) -> None:
        self._path = str(daemon.paths.control_socket)

    async def __aenter__(self) -> Session:
        self._reader, self._writer = await asyncio.open_unix_connection(self._path)
        return self

    async def __aexit__(self, *_: object) -> None:
        self._writer.close()

    async def ask(self, verb: str, **params: Any) -> dict[str, Any]:
        """The answer of one verb; raises ValueError when the connection ends without it."""
        self._writer.write(json.dumps({"jsonrpc": "2.0", "id": 1, "method": verb, "params": params}).encode() + b"\n")
        answer = json.loads(await self._reader.readline())
        return dict(answer.get("result") or answer)


def write_package(folder: Path, version: str = "1.0.0") -> Path:
    folder.mkdir(exist_ok=True)
    manifest = {
        "name": "one", "version": version, "api_version": "1", "binary": "./main.py", "hooks": ["deploy.completed"],
        "config_schema": CONFIG,
    }  # fmt: skip
    (folder / "plugin.json").write_text(json.dumps(manifest))
    (folder / "main.py").write_text(LATER)
    return folder


async def register(session: Session, folder: Path, verb: str, **more: Any) -> dict[str, Any]:
    """Stage a package, and register it or update the plugin with it, with a value of its config."""
    found = {"update": "one"} if verb == "plugin.update" else {}
    staged = await session.ask("plugin.stage", path=str(folder), **found)
    return await session.ask(verb, token=staged["token"], config={"colour": "red"}, **more)


IN_THE_ASKING = """
import os
from host.lifecycle.supervisor_link import SupervisorLink
real = SupervisorLink.ask
async def ask(self, request, *args):
    if request.op == {op!r}:
        os.kill(os.getpid(), 9)
    return await real(self, request, *args)
SupervisorLink.ask = ask
"""


@pytest.mark.parametrize("at", ["values stored", "before the record", "behind the record"])
@pytest.mark.parametrize("verb", ["plugin.commit", "plugin.update"])
async def test_config_that_comes_with_a_plugin_is_on_record_once(
    daemon: Daemon, tmp_path: Path, verb: str, at: str
) -> None:
    folder = write_package(tmp_path / "one")
    if verb == "plugin.update":
        async with Session(daemon) as session:
            staged = await session.ask("plugin.stage", path=str(folder))
            await session.ask("plugin.commit", token=staged["token"])
        write_package(folder, "2.0.0")
    await daemon.kill_host()
    behind = at == "behind the record"
    op = messages.CommitPlugin.op if verb == "plugin.commit" else messages.UpdatePlugin.op
    daemon.first = IN_THE_ASKING.format(op=op) if at == "values stored" else KILLED.format(behind=behind, change=1)
    await daemon.start_host()
    async with Session(daemon) as session:
        with pytest.raises(ValueError):
            await register(session, folder, verb)
    assert daemon.host is not None and daemon.channel is not None
    await daemon.host.wait()
    daemon.channel.close()
    await daemon.poll(lambda: len(daemon.of_type("config.changed")) == behind)
    daemon.write_trail(daemon.paths.audit_log)

    daemon.first = ""
    await daemon.start_host()
    await daemon.until(lambda: daemon.of_type("config.changed"))
    await settled(daemon)
    (record,) = daemon.of_type("config.changed")
    known = {} if verb == "plugin.update" and at == "values stored" else {"waits": False}
    assert record["plugin"] == "one" and record["data"] == {"names": ["colour"], "by": "uid:0", **known}


@pytest.mark.parametrize("verb", ["plugin.commit", "plugin.update"])
async def test_config_of_a_version_that_was_not_taken_over_is_not_on_record(
    daemon: Daemon, tmp_path: Path, verb: str
) -> None:
    folder = write_package(tmp_path / "one")
    async with Session(daemon) as session:
        if verb == "plugin.update":
            staged = await session.ask("plugin.stage", path=str(folder))
            await session.ask("plugin.commit", token=staged["token"])
            write_package(folder, "2.0.0")
        daemon.registrar.refuses = True
        assert "error" in await register(session, folder, verb)
    await settled(daemon)
    assert not daemon.of_type("config.changed")


TURNS_MEANWHILE = """
import asyncio
from host.lifecycle.lifecycle import PluginLifecycle
from host.queue.owed import Change
turned, turn, restate = asyncio.Event(), PluginLifecycle.turn, Change.restate
def turns(self, told):
    turn(self, told)
    turned.set()
async def restates(self, **more):
    await turned.wait()
    await restate(self, **more)
PluginLifecycle.turn, Change.restate = turns, restates
"""
"""The news behind the answer to an update come while the record of its config is written."""


async def test_news_of_a_plugin_that_come_while_its_config_is_noted_are_not_undone(
    daemon: Daemon, tmp_path: Path
) -> None:
    await daemon.kill_host()
    daemon.first = TURNS_MEANWHILE
    await daemon.start_host()
    channel, folder = daemon.channel, write_package(tmp_path / "one")
    assert channel is not None
    turned = messages.PluginTurned(
        name="one", state=PluginState.DISABLED, error="it ended", run=None, pid=None, started_at=None, ready=False,
        restarts=5, on_trial=False,
    )  # fmt: skip

    async def update(request: messages.UpdatePlugin) -> messages.UpdatedPlugin:
        asyncio.get_running_loop().call_soon(channel.tell, turned)
        return await daemon.registrar._update(request)

    channel.handle(*messages.UpdatePlugin.on(update))
    async with Session(daemon) as session:
        await register(session, folder, "plugin.commit")
        write_package(folder, "2.0.0")
        assert "plugin" in await register(session, folder, "plugin.update")
    (shown,) = [one for one in (await daemon.ask("plugin.list"))["plugins"] if one["name"] == "one"]
    assert (shown["version"], shown["error"]) == ("2.0.0", "it ended")


async def test_events_that_a_removed_plugin_never_had_are_on_record_as_dead(daemon: Daemon) -> None:
    await daemon.kill_host()
    daemon.first = KILLED.format(behind=False, change=1)
    await daemon.start_host()
    daemon.add("one", LATER)
    events = [await daemon.emit() for _ in range(3)]
    with pytest.raises(ValueError):
        await daemon.ask("plugin.remove", name="one")
    assert daemon.host is not None and daemon.channel is not None
    await daemon.host.wait()
    daemon.channel.close()
    assert not daemon.of_type("event.dead")
    daemon.write_trail(daemon.paths.audit_log)

    daemon.first = ""
    await daemon.start_host()
    await daemon.until(lambda: len(daemon.of_type("event.dead")) >= len(events))
    daemon.add("one", LATER)
    await daemon.outcome(await daemon.emit(), timeout=0.0)
    await settled(daemon)
    dead = daemon.of_type("event.dead")
    assert [one["event_id"] for one in dead] == [one["id"] for one in events]
    assert {(one["plugin"], one["data"]["reason"]) for one in dead} == {("one", "the plugin was removed")}


async def test_loss_of_the_database_is_on_record_although_the_next_host_is_killed(daemon: Daemon) -> None:
    await daemon.kill_host()
    for path in daemon.paths.host_lib.glob(f"{daemon.paths.host_database.name}*"):
        path.unlink()
    daemon.audit_acks = False
    daemon.first = SILENT
    await daemon.start_host()
    await owes(daemon)
    await daemon.kill_host()
    daemon.write_trail(daemon.paths.audit_log)
    daemon.first, daemon.audit_acks = "", True
    await daemon.start_host()
    await daemon.until(lambda: daemon.of_type("config.changed"))
    await settled(daemon)
    (record,) = daemon.of_type("config.changed")
    assert record["data"]["lost"] and record["plugin"] is None


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


@pytest.mark.parametrize("undone", [False, True], ids=["restated", "undone"])
async def test_what_could_not_be_restated_or_undone_is_on_record_as_it_was_noted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, undone: bool
) -> None:
    monkeypatch.setattr("host.database.store.GIVE_UP", 0.0)
    store, audit = Store(tmp_path / "host.db"), AuditClient(None)
    debts = Debts(store, audit, tmp_path)
    ours, theirs = pair()
    theirs.setblocking(False)
    audit.reconnect(ours)

    async def fail(work: Awaitable[None]) -> None:
        """Have work's transaction find the database full behind it."""
        task = asyncio.ensure_future(work)
        await asyncio.sleep(0)
        store.submit(fill, lambda _, error: None)
        await task

    def fill(db: sqlite3.Connection) -> None:
        db.execute(f"PRAGMA max_page_count={db.execute('PRAGMA page_count').fetchone()[0]}")
        db.execute("CREATE TABLE full AS SELECT randomblob(1000000)")

    with contextlib.ExitStack() as stack:
        if undone:
            stack.enter_context(pytest.raises(UnavailableError, match="full"))
        with debts.of_config("one", ["colour"], "uid:0") as change:
            await store.run(change.note)
            await fail(store.run(change.drop) if undone else change.restate(waits=True))
    store.read(lambda db: db.execute("PRAGMA max_page_count=1000000"))
    async with asyncio.timeout(seconds(20)):
        (line,) = (await asyncio.get_running_loop().sock_recv(theirs, 65536)).split(b"\n")
        assert json.loads(line)["data"] == {"names": ["colour"], "by": "uid:0"}
        theirs.send(json.dumps({"acked": 1}).encode())
        while store.rows("SELECT id FROM owed"):  # noqa: ASYNC110 # no event tells
            await asyncio.sleep(0.01)
    theirs.close()
    audit.close()
    await store.close()


async def settled(daemon: Daemon) -> None:
    """Wait until nothing is owed any more."""
    with contextlib.closing(sqlite3.connect(f"file:{daemon.paths.host_database}?mode=ro", uri=True)) as db:
        await daemon.poll(lambda: not db.execute("SELECT 1 FROM owed").fetchall())


async def owes(daemon: Daemon) -> None:
    """Wait until the host has written down what it owes."""
    with contextlib.closing(sqlite3.connect(f"file:{daemon.paths.host_database}?mode=ro", uri=True)) as db:
        await daemon.poll(lambda: db.execute("SELECT 1 FROM owed").fetchall())
