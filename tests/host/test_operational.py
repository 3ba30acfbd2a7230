"""Operational events: made of the trail, once for each begin of a condition, never about who receives them."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from host.database.store import Store
from host.events import Catalogue
from host.intake import operational
from host.intake.intake import EventIntake
from host.intake.operational import OperationalEvents
from host.plugins.registry import Registry
from host.queue.accepting import Answer
from host.queue.interface import NewEvent, Result, Subscriber
from host.queue.sqlite import SqliteQueue
from isolator.audit.client import AuditClient
from isolator.audit.record import Incoming, spell
from isolator.errors import UnavailableError, UsageError
from isolator.ipc.messages import PluginState, RegisteredEntry
from tests.host.fake_supervisor import Daemon
from tests.support.timeouts import seconds

OURS = tuple(kind.name for kind in Catalogue() if kind.name.startswith("isolator."))
SECRET = "s3cr3t of another plugin"


class Watched:
    """A queue with a source of operational events, and a trail that the test writes."""

    def __init__(self, folder: Path) -> None:
        self.folder, self._written = folder, 0
        self.time = "2000-01-31T12:00:00.000000Z"
        self.trail = folder / "trail"
        self.trail.mkdir(exist_ok=True)
        self.write("host.started")
        self.open()

    def open(self) -> None:
        self.store = Store(self.folder / "host.db")
        self.audit = AuditClient(None)
        self.audit.blocked = None
        catalogue = Catalogue()
        self.registry = Registry(catalogue, self.store)
        self.queue = SqliteQueue(self.store, limit=10)
        intake = EventIntake(catalogue, self.registry, self.queue, self.audit, wait_for_trail=False)
        for name in ("one", "two"):
            self.add(name, OURS)
        self.add("plain", ("deploy.completed",))
        self.source = OperationalEvents(self.trail, self.audit, self.store, self.registry, self.queue, intake)

    def add(self, name: str, hooks: tuple[str, ...]) -> None:
        manifest = {"name": name, "version": "1.0.0", "api_version": "1", "binary": "./a", "hooks": list(hooks)}
        entry = RegisteredEntry(
            name=name, version="1.0.0", digest="0" * 64, state=PluginState.STOPPED, run=None, pid=None, uid=None,
            started_at="", restarts=0, effective=None, effective_digest=None, manifest=manifest, ready=False,
        )  # fmt: skip
        self.registry.put(entry)

    def write(self, kind: str, plugin: str | None = None, event: str | None = None, **data: Any) -> None:
        self._written += 1
        line, _ = spell(self._written, Incoming(self.time, kind, plugin, event_id=event, data=data), "0" * 64)
        with (self.trail / "audit.jsonl").open("ab") as file:
            file.write(line if line.endswith(b"\n") else line + b"\n")

    async def close(self) -> None:
        self.source.close()
        await self.store.close()

    async def events(self, count: int, *, read: bool = True) -> list[tuple[str, dict[str, Any], list[str]]]:
        """Name, payload and receivers of operational events, oldest first, once there are so many and all is read."""
        async with asyncio.timeout(seconds(20)):
            while True:
                found = [e for e in await self.queue.list_events() if e.name.startswith("isolator.")]
                if len(found) >= count and (not read or self.source._seq == self._written):
                    break
                await asyncio.sleep(0.01)
        return [(e.name, e.payload, [d.plugin for d in e.deliveries]) for e in reversed(found)]


@pytest.fixture
async def watched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Watched]:
    monkeypatch.setattr(operational, "BEAT", 0.01)
    opened = Watched(tmp_path)
    await opened.events(0)
    yield opened
    await opened.close()


async def test_each_kind_goes_to_those_who_are_granted_it_and_never_to_whom_it_is_about(watched: Watched) -> None:
    watched.write("plugin.failed", "plain", reason=SECRET)
    watched.write("plugin.failed", "one", reason=SECRET)
    watched.write("plugin.pending", "two", version="2.0.0", differences=[SECRET])
    watched.write("net.denied", "plain", rule="names", name=SECRET, address="192.0.2.1", port=25)
    watched.write("syscall.denied", "plain", call="ptrace", count=3)
    watched.write("api.called", "plain", method="kv.get", verdict="granted", permission="kv")
    watched.write("event.dead", "plain", "ev_1", reason=SECRET, attempts=12)
    found = await watched.events(6)
    assert [(name, payload["plugin"], to) for name, payload, to in found] == [
        ("isolator.plugin.failed", "plain", ["one", "two"]),
        ("isolator.plugin.failed", "one", ["two"]),
        ("isolator.update.pending", "two", ["one"]),
        ("isolator.denied", "plain", ["one", "two"]),
        ("isolator.denied", "plain", ["one", "two"]),
        ("isolator.delivery.dead", "plain", ["one", "two"]),
    ]
    assert [payload["kind"] for name, payload, _ in found if name == "isolator.denied"] == ["connection", "call"]
    assert found[-1][1]["event_id"] == "ev_1"
    assert SECRET not in json.dumps(found) and "192.0.2.1" not in json.dumps(found)


async def test_only_the_begin_of_a_condition_is_an_event(watched: Watched) -> None:
    for _ in range(3):
        watched.write("net.denied", "plain", rule="names", name="a", port=25)
        watched.write("event.dead", "plain", "ev_1", reason="", attempts=1)
    assert len(await watched.events(2)) == 2
    watched.write("event.response", "plain", "ev_2", outcome="ok")
    watched.write("event.quarantined", "plain", "ev_3", reason="", attempts=2)
    watched.write("plugin.updated", "plain", old="", new="", version="2.0.0")
    watched.write("net.denied", "plain", rule="names", name="a", port=25)
    found = (await watched.events(4))[2:]
    assert [(name, payload.get("state")) for name, payload, _ in found] == [
        ("isolator.delivery.dead", "quarantined"), ("isolator.denied", None),
    ]  # fmt: skip


async def test_operational_event_that_is_given_up_makes_no_other(watched: Watched) -> None:
    watched.write("plugin.failed", "plain", reason="")
    await watched.events(1)
    (event,) = [e for e in await watched.queue.list_events() if e.name == "isolator.plugin.failed"]
    watched.write("event.dead", "one", event.id, reason="", attempts=12)
    assert len(await watched.events(1)) == 1


async def test_full_queue_is_an_event_once_until_it_has_emptied(watched: Watched) -> None:
    new, to = NewEvent("deploy.completed", "{}"), [Subscriber("plain", None)]
    accepted = [await watched.queue.accept(new, to) for _ in range(8)]
    (first,) = await watched.events(1)
    assert (first[0], first[1]["depth"], first[1]["limit"], first[2]) == ("isolator.queue.high", 8, 10, ["one", "two"])
    for one in accepted[:2]:
        await watched.queue.end(one.event.id, None, Result("skipped"))
    for _ in range(2):
        await watched.queue.accept(new, to)
    watched.write("host.started")
    assert len(await watched.events(1)) == 1, "it has not fallen below half"


async def test_blocked_trail_is_an_event(watched: Watched) -> None:
    watched.audit.blocked = "the disk is full"
    found = await watched.events(1)
    assert [(name, to) for name, _, to in found] == [("isolator.audit.blocked", ["one", "two"])]
    assert "disk" not in json.dumps(found)


async def test_nothing_is_lost_or_repeated_over_a_restart(watched: Watched) -> None:
    watched.write("net.denied", "plain", rule="names", name="a", port=25)
    await watched.events(1)
    await watched.close()
    watched.write("net.denied", "plain", rule="names", name="b", port=25)
    watched.write("plugin.failed", "plain", reason="")
    watched.open()
    assert [name for name, _, _ in await watched.events(2)] == ["isolator.denied", "isolator.plugin.failed"]
    # As after a kill between an event and its mark.
    await watched.close()
    store = Store(watched.folder / "host.db")
    await store.run(lambda db: db.execute("UPDATE operational SET seq=1, standing='[]'"))
    await store.close()
    watched.open()
    assert [name for name, _, _ in await watched.events(2)] == ["isolator.denied", "isolator.plugin.failed"]


@pytest.mark.parametrize("blocked", [None, "the disk is full"])
async def test_receiver_hears_of_all_from_its_grant_on_however_late_the_first_look_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, blocked: str | None
) -> None:
    monkeypatch.setattr(operational, "BEAT", 0.01)
    watched = Watched(tmp_path)  # which has not looked yet
    watched.write("plugin.failed", "plain", reason="before the grant")
    watched.time = "2100-01-31T12:00:00.000000Z"
    watched.audit.blocked = blocked
    watched.write("plugin.failed", "plain", reason="")
    for _ in range(4000):  # a busy host, between two looks
        watched.write("event.accepted")
    watched.time = "2000-01-31T12:00:00.000000Z"
    watched.write("host.started")  # of another process, and late
    if blocked is not None:
        await watched.events(1, read=False)
        watched.audit.blocked = None
    about = [(name, payload.get("record")) for name, payload, _ in await watched.events(1)]
    assert [one for one in about if one[0] != "isolator.audit.blocked"] == [("isolator.plugin.failed", 3)]
    await watched.close()


async def test_event_that_was_not_accepted_is_emitted_again(watched: Watched, monkeypatch: pytest.MonkeyPatch) -> None:
    refused, submit = asyncio.Event(), SqliteQueue.submit

    def refuse_once(queue: SqliteQueue, new: NewEvent, to: list[Subscriber], done: Answer) -> None:
        if refused.is_set():
            submit(queue, new, to, done)
        else:
            refused.set()
            done(None, UnavailableError("the queue", "the disk is full", "make room"))

    monkeypatch.setattr(SqliteQueue, "submit", refuse_once)
    watched.write("event.dead", "plain", "ev_1", reason="", attempts=1)
    watched.write("plugin.failed", "plain", reason="")
    names = [name for name, _, _ in await watched.events(2)]
    assert sorted(names) == ["isolator.delivery.dead", "isolator.plugin.failed"]


async def test_nobody_else_emits_or_registers_them(daemon: Daemon) -> None:
    with pytest.raises(UsageError, match="the daemon's own"):
        await daemon.ask("event.emit", name="isolator.denied", payload={"plugin": "x", "kind": "api", "record": 1})
    schema = {"type": "object", "properties": {"a": {"type": "string"}}}
    for name in ("isolator.denied", "isolator.mine"):
        with pytest.raises(UsageError, match="the daemon's own"):
            await daemon.ask("event.register", name=name, schema=schema)


@pytest.mark.parametrize("step", ["before the event", "behind the event"])
@pytest.mark.parametrize("kind", ["isolator.queue.high", "isolator.audit.blocked"])
async def test_what_no_record_tells_of_is_one_event_when_the_host_is_killed_beside_it(
    watched: Watched, monkeypatch: pytest.MonkeyPatch, kind: str, step: str
) -> None:
    reached, emit = asyncio.Event(), OperationalEvents._emit

    async def emit_and_hang(self: OperationalEvents, found: Any) -> None:
        if step == "behind the event":
            await emit(self, found)
        reached.set()
        await asyncio.Event().wait()

    with monkeypatch.context() as killed:
        killed.setattr(OperationalEvents, "_emit", emit_and_hang)
        if kind == "isolator.audit.blocked":
            watched.audit.blocked = "the disk is full"
        else:
            for _ in range(8):
                await watched.queue.accept(NewEvent("deploy.completed", "{}"), [Subscriber("plain", None)])
        async with asyncio.timeout(seconds(20)):
            await reached.wait()
        await watched.close()
    watched.write("host.started")  # the trail has gone on meanwhile
    watched.open()
    for _ in range(2):  # one look, and the next one
        await watched.events(1)
        watched.write("host.started")
    assert [name for name, _, _ in await watched.events(1)] == [kind]
