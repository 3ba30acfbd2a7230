"""Searches of the trail for callers of the control socket: bounded, behind deliveries, and gone with their caller."""

from __future__ import annotations

import asyncio
import json
import os
import resource
import socket
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest

from host.control import searches
from host.control.searches import Searches
from host.control.server import ControlServer
from isolator.audit.log import Limits
from isolator.audit.search import CPU_SECONDS, MEMORY, NICE
from tests.audit.test_verify import Written
from tests.support.processes import children
from tests.support.timeouts import seconds

COUNT = 8000
"""Records of the trail: some megabytes, so that a search stands still when its caller does not read."""


@pytest.fixture
async def place(tmp_path: Path) -> AsyncIterator[Path]:
    """The folder of a control socket that searches a trail."""
    written = Written(tmp_path, COUNT, Limits())
    made = Searches(written.log)
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(str(tmp_path / "control.sock"))
    listener.listen()
    server = ControlServer(made.endpoints(), lambda uid: "viewer", lambda *_, **__: None)
    await server.start(listener)
    yield tmp_path
    await server.close()
    made.close()
    await until(lambda: not searching())


def searching() -> list[int]:
    """The searches of this process that have not ended."""
    return children(os.getpid(), "isolator.audit.search")


async def until(condition: Callable[[], bool]) -> None:
    """Wait for a condition of which no event tells."""
    end = asyncio.get_running_loop().time() + seconds(20)
    while not condition() and asyncio.get_running_loop().time() < end:  # noqa: ASYNC110 # see above
        await asyncio.sleep(0.01)
    assert condition()


async def begun(
    place: Path, wanted: dict[str, Any] | None = None, *, limit: int = 1 << 20
) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    """Begin a search, and read its answer alone; ``limit``: bytes that this end takes without being read."""
    reader, writer = await asyncio.open_unix_connection(str(place / "control.sock"), limit=limit)
    request = {"jsonrpc": "2.0", "id": 1, "method": "audit.search", "params": wanted or {}}
    writer.write(json.dumps(request).encode() + b"\n")
    assert json.loads(await reader.readline())["result"] == {}
    return reader, writer


async def rest(reader: asyncio.StreamReader) -> tuple[list[str], dict[str, Any] | None]:
    """Read a search to its end: the lines, and the error if there is one."""
    lines: list[str] = []
    while True:
        params = json.loads(await reader.readline())["params"]
        lines += params["lines"]
        if not params["more"]:
            return lines, params["error"]


async def test_search_finds_every_record_as_it_stands_in_the_trail(place: Path) -> None:
    reader, writer = await begun(place)
    lines, error = await rest(reader)
    stand = [line for path in sorted(place.glob("log/*.jsonl")) for line in path.read_text().splitlines()]
    assert error is None and len(lines) >= COUNT and sorted(lines) == sorted(stand)
    writer.close()
    reader, writer = await begun(place, {"limit": 5})
    assert (await rest(reader))[0] == lines[-5:]
    writer.close()


async def test_search_has_small_shares_of_processor_and_memory(place: Path) -> None:
    _, writer = await begun(place)
    mine = max(0, os.getpriority(os.PRIO_PROCESS, 0))  # precedence that the host may have is not the search's
    await until(lambda: [os.getpriority(os.PRIO_PROCESS, pid) for pid in searching()] == [min(mine + NICE, 19)])
    (pid,) = searching()
    await until(lambda: resource.prlimit(pid, resource.RLIMIT_AS) == (MEMORY, MEMORY))
    assert resource.prlimit(pid, resource.RLIMIT_CPU) == (CPU_SECONDS, CPU_SECONDS)
    writer.transport.abort()


async def test_user_has_one_search_at_a_time_and_it_ends_with_its_caller(place: Path) -> None:
    callers = [await begun(place, limit=4096) for _ in range(4)]  # none of them reads: the first stands still
    await until(lambda: len(searching()) == 1)
    first = searching()
    for _, writer in callers:
        await until(lambda: len(searching()) <= 1)
        writer.transport.abort()
    await until(lambda: not searching())
    assert first


async def test_caller_that_reads_nothing_for_long_is_cut_off(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(searches, "STALLED", 0.2)
    _, writer = await begun(place, limit=4096)
    await until(lambda: bool(searching()))
    await until(lambda: not searching())
    writer.transport.abort()


async def test_search_that_outgrows_its_share_says_so(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(searches.sys, "executable", "/bin/false")
    reader, writer = await begun(place)
    lines, error = await rest(reader)
    assert not lines and error is not None and "60 s of the processor" in error["why"]
    writer.close()


async def test_search_of_an_event_that_is_not_there_finds_nothing(place: Path) -> None:
    reader, writer = await begun(place, {"story": "ev_none"})
    assert await rest(reader) == ([], None)
    writer.close()


async def test_other_callers_are_answered_between_the_blocks_of_a_search(place: Path) -> None:
    reader, writer = await begun(place)
    other_reader, other_writer = await asyncio.open_unix_connection(str(place / "control.sock"))
    counts = []
    for number in range(20):
        other_writer.write(json.dumps({"jsonrpc": "2.0", "id": number, "method": "no.such.verb"}).encode() + b"\n")
        answer = asyncio.ensure_future(other_reader.readline())
        blocks = 0
        while not answer.done():
            blocks += bool(json.loads(await reader.readline())["params"]["more"])
        counts.append(blocks)
        assert json.loads(await answer)["id"] == number
    lines, error = await rest(reader)
    assert lines and error is None, "the search was over before the questions were"
    assert max(counts) < 8, counts
    writer.close()
    other_writer.close()
