"""Calls of tools that come to no answer: each that is on record as started has its end there."""

from __future__ import annotations

import asyncio
import contextlib
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from host.mcp.servers import Servers
from host.mcp.unended import end_of, unended
from isolator.audit.record import GENESIS, Incoming, spell
from isolator.errors import DeniedError, IsolatorError
from isolator.ipc.fence import Fence
from isolator.ipc.succession import Departure

CALL = {"tool": "t", "uid": 7, "arguments_sha256": "0" * 64}


class Audit:
    """A trail whose socket is full until ``room`` is set."""

    def __init__(self) -> None:
        self.made: list[tuple[str, str | None, str]] = []
        self.room, self.asked = asyncio.Event(), asyncio.Event()

    def record(self, record: Any, *, event_id: str, **_: Any) -> None:
        self.made.append((record.TYPE, record.data.get("outcome"), event_id))

    async def flushed(self) -> None:
        self.asked.set()
        await self.room.wait()


class Beginning:
    """A call of the user 7 whose record waits for room; ``sent``: what its server is sent."""

    def __init__(self) -> None:
        nobody: Any = None
        self.audit, self.sent, self.callers = Audit(), list[str](), {7}
        self.is_sent = asyncio.Event()
        effective = SimpleNamespace(callers=self.callers, tools=("t",))
        plugin = SimpleNamespace(name="srv", mode="mcp", effective=effective)
        registry = SimpleNamespace(get=lambda _: plugin, need=lambda _: plugin)
        self.servers = Servers(
            nobody, cast(Any, registry), cast(Any, self.audit), nobody, cast(Any, lambda _: lambda text: text),
            lambda _: contextlib.nullcontext(), cast(Any, SimpleNamespace(of=lambda _: Fence())), nobody,
        )  # fmt: skip
        session = SimpleNamespace(run="r1", era="2025-11-25", has_slot=True, new_id=lambda: "n1", write=self._write)

        async def allowed(*_: Any) -> Any:
            return session

        self.servers._allowed = allowed  # type: ignore[method-assign]

    def _write(self, number: str, *_: Any) -> None:
        self.sent.append(number)
        self.is_sent.set()

    async def begin(self) -> asyncio.Task[Any]:
        task = asyncio.create_task(self.servers.call("srv", "t", {}, 7, "k", None))
        await self.audit.asked.wait()
        return task

    def check_ended(self, outcome: str) -> None:
        (started, _, begun), (called, how, ended) = self.audit.made
        assert (started, called, how) == ("tool.started", "tool.called", outcome)
        assert begun == ended and not self.sent


@pytest.mark.parametrize("by", ["its caller", "its connection"])
async def test_call_that_is_cancelled_before_its_first_byte_has_its_end_on_record(by: str) -> None:
    beginning = Beginning()
    task = await beginning.begin()
    if by == "its caller":
        beginning.servers.cancel(7, "k")
        with pytest.raises(IsolatorError, match="was cancelled"):
            await task
    else:
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
    beginning.check_ended("cancelled")


async def test_call_that_the_policy_forbids_meanwhile_is_not_sent_and_has_its_end_on_record() -> None:
    beginning = Beginning()
    task = await beginning.begin()
    beginning.callers.clear()
    beginning.audit.room.set()
    with pytest.raises(DeniedError):
        await task
    beginning.check_ended("not_sent")


async def test_call_that_another_host_begins_anew_has_its_end_on_record_once() -> None:
    beginning = Beginning()
    task = await beginning.begin()
    beginning.servers.hold()
    assert beginning.servers.pass_on(Departure()).calls == ()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    beginning.check_ended("not_sent")


@pytest.mark.parametrize(
    ("goes_on", "ends"), [(False, ["cancelled"]), (True, [])], ids=["before it is handed on", "once it is handed on"]
)
async def test_call_whose_caller_goes_as_its_host_leaves_has_its_end_on_record(goes_on: bool, ends: list[str]) -> None:
    beginning = Beginning()
    task = await beginning.begin()
    beginning.audit.room.set()
    await beginning.is_sent.wait()
    beginning.servers.hold()
    if goes_on:
        assert [one.id for one in beginning.servers.pass_on(Departure()).calls] == [beginning.audit.made[0][2]]
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert [how for kind, how, _ in beginning.audit.made if kind == "tool.called"] == ends
    assert [one.id for one in beginning.servers.pass_on(Departure()).calls] == []


def trail(folder: Path, *records: tuple[str, str, str, str]) -> Path:
    """A trail of records, each a time of the day, a type, a source with its number, and an event."""
    prev, lines = GENESIS, []
    for seq, (time, kind, origin, event) in enumerate(records, 1):
        source, _, number = origin.partition(":")
        one = Incoming(f"2026-01-02T{time}.000000Z", kind, "srv", "r1", event, None, dict(CALL), source, number)
        line, prev = spell(seq, one, prev)
        lines.append(line)
    (folder / "audit.jsonl").write_bytes(b"".join(lines))
    return folder


def test_calls_of_killed_hosts_without_an_end_are_found(tmp_path: Path) -> None:
    found = unended(
        trail(
            tmp_path,
            ("10:00:00", "tool.started", "host:aaaaaaaa:1", "too old: that host has ended it, or the one behind it"),
            ("10:59:00", "tool.started", "host:bbbbbbbb:1", "e1"),
            ("10:59:01", "tool.started", "host:bbbbbbbb:2", "answered"),
            ("10:59:02", "tool.called", "host:bbbbbbbb:3", "answered"),
            ("10:59:03", "tool.started", "host:cccccccc:1", "e2"),
            ("10:59:04", "api.called", "host:cccccccc:2", "e2"),
            ("23:00:00", "net.closed", "broker:dddddddd:9", "e2"),
            ("23:00:01", "tool.started", "host:ffffffff:1", "under way"),
        ),
        "ffffffff",
    )
    assert [one.event_id for one in found] == ["e1", "e2"]
    end = end_of(found[0])
    assert end.data == {
        **CALL, "outcome": "unknown", "detail": "the host process that awaited its answer was killed",
        "latency_us": end.latency_us,
    } and end.latency_us > 0  # fmt: skip
