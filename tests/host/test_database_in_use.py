"""Files of the database that somebody removes, replaces, cuts or overwrites under a running host."""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import sqlite3
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from host.database import files
from host.database.store import Store
from host.mcp.pins import Pins
from host.mcp.tools import Item
from host.queue import rows
from host.queue.beside_trail import Compared, compare
from host.queue.interface import NewEvent, Subscriber
from host.queue.sqlite import SqliteQueue
from isolator.audit.client import utc_now
from isolator.audit.record import GENESIS, Incoming, spell

HOST = """\
import asyncio, sys
from pathlib import Path
from host.database.store import Store
from host.mcp.pins import Pins
from host.mcp.tools import Item
from host.queue.interface import NewEvent
from host.mcp.pins import Pins
from host.mcp.tools import Item
from host.queue.sqlite import SqliteQueue

async def main():
    queue = SqliteQueue(Store(Path(sys.argv[1])))
    accept = lambda: queue.accept(NewEvent("deploy.completed", "{}"), [])
    for _ in range(20):
        await accept()
    print("ready", flush=True)
    sys.stdin.readline()
    await accept()
    print("accepted", flush=True)
    sys.stdin.readline()
asyncio.run(main())
"""
"""A process that accepts twenty events, and one more when it is asked to."""


def _remove(path: Path) -> None:
    path.unlink()


def _replace(path: Path) -> None:
    copy = path.with_name("copy")
    shutil.copy(path, copy)
    copy.rename(path)


def _overwrite(path: Path) -> None:
    with path.open("r+b") as file:
        file.write(os.urandom(4096))


@pytest.mark.parametrize("harm", [_remove, _replace])
@pytest.mark.parametrize("name", ["host.db", "host.db-wal", "host.db-shm"])
async def test_nothing_is_accepted_into_a_file_that_the_next_start_will_not_find(
    tmp_path: Path, name: str, harm: Callable[[Path], None]
) -> None:
    await _harmed(tmp_path, name, harm)


async def test_nothing_is_accepted_behind_a_log_that_was_overwritten(tmp_path: Path) -> None:
    await _harmed(tmp_path, "host.db-wal", _overwrite)


async def _harmed(folder: Path, name: str, harm: Callable[[Path], None]) -> None:
    path = folder / "host.db"
    host = await _host(path)
    assert host.stdin is not None
    harm(folder / name)
    out, err = await host.communicate(b"\n")
    assert (host.returncode, out) == (1, b""), "it was accepted, and would be lost"
    saved = b"what could be read of it was saved" if harm is _overwrite else b"all of its content was saved"
    assert name.encode() in err and saved in err
    store = Store(path)
    assert store.read(lambda db: db.execute("SELECT count(*) FROM events").fetchone()[0]) >= 20
    await store.close()


async def test_log_that_was_cut_ends_the_host_and_says_that_events_may_be_lost(tmp_path: Path) -> None:
    path = tmp_path / "host.db"
    host = await _host(path)
    os.truncate(f"{path}-wal", 0)
    out, err = await host.communicate(b"\n")
    assert (host.returncode, out) == (1, b""), err
    assert b"host.db-wal was" in err and b"all of its content" not in err
    await Store(path).close()


async def _host(path: Path) -> asyncio.subprocess.Process:
    host = await asyncio.create_subprocess_exec(
        sys.executable, "-c", HOST, str(path), stdin=-1, stdout=-1, stderr=-1, cwd=Path(__file__).parents[2]
    )
    assert host.stdout is not None
    assert await host.stdout.readline() == b"ready\n"
    return host


async def test_connection_that_is_closed_keeps_none_from_being_opened(tmp_path: Path) -> None:
    store = Store(tmp_path / "host.db")

    def reopen() -> None:
        for _ in range(3000):
            files.connect(store.path).close()

    await asyncio.gather(*(asyncio.to_thread(reopen) for _ in range(2)))
    await store.close()


def _trail(folder: Path, *kinds: tuple[str, dict[str, object]], file: str = "audit.jsonl", fill: int = 0) -> None:
    """A file of the trail with records of these types and data; each is followed by ``fill`` bytes of others."""
    lines, seq, digest = [], 0, GENESIS
    for number, (kind, data) in enumerate(kinds):
        for incoming in (
            Incoming(utc_now(), kind, event_id=f"ev_{number}", data=data),
            *[Incoming(utc_now(), "audit.gap", data={"count": 0, "why": "x" * 500})] * (fill // 500),
        ):
            seq += 1
            line, digest = spell(seq, incoming, digest)
            lines.append(line)
    (folder / file).write_bytes(b"".join(lines))


def _accepted(*numbers: int) -> list[tuple[str, dict[str, object]]]:
    return [("event.accepted", {"event": "e", "number": number}) for number in numbers]


def test_events_of_the_trail_beyond_the_newest_in_the_queue_are_counted(tmp_path: Path) -> None:
    _trail(tmp_path, *_accepted(1, 2, 3), file="audit.000000000001.jsonl")
    _trail(tmp_path, *_accepted(4, 5, 7), fill=700_000)
    for held, count in ((7, 0), (8, 0), (5, 1), (4, 2), (2, 4), (0, 6)):
        found = compare(tmp_path, held)
        assert (found.missing, found.number, found.last) == ((count, 7, "ev_2") if count else (0, 0, "")), held
        assert found.recorded == max((number for number in (1, 2, 3, 4, 5, 7) if number <= held), default=0), held
        assert bool(found.since) is (held == 0)  # the trail was read to its begin, and accounts for nothing before


def test_record_that_came_late_does_not_end_the_comparison(tmp_path: Path) -> None:
    late = ("event.accepted", {"event": "e", "number": 5, "accepted_at": utc_now()})
    _trail(tmp_path, *_accepted(3, 4, 7), late)
    assert compare(tmp_path, 6) == Compared(recorded=4, missing=1, number=7, last="ev_2")


def test_text_that_looks_like_an_accepted_event_counts_for_nothing(tmp_path: Path) -> None:
    forged = {"detail": {"type": "event.accepted", "data": {"number": 99}}, "number": 99}
    _trail(tmp_path, *_accepted(1), ("event.dead", forged))
    with (tmp_path / "audit.jsonl").open("ab") as file:
        file.write(b'{"seq":9,"type":"event.accepted","data":{"number":99}')  # torn
    assert compare(tmp_path, 1) == Compared(recorded=1)


def test_trail_that_cannot_be_read_or_has_no_numbers_lacks_nothing(tmp_path: Path) -> None:
    assert compare(tmp_path / "nowhere", 5) == Compared(recorded=5)
    _trail(tmp_path, ("event.accepted", {"event": "e"}))
    assert compare(tmp_path, 5) == Compared(recorded=5)


async def test_newest_event_is_never_pruned_and_numbers_go_on_after_it(tmp_path: Path) -> None:
    store = Store(tmp_path / "host.db")
    queue = SqliteQueue(store, after=10, keep_events=0)
    for _ in range(1000):
        await queue.accept(NewEvent("deploy.completed", "{}"), [])
    queue.consumer("p")
    last = await queue.accept(NewEvent("deploy.completed", "{}"), [Subscriber("p", None)])
    await queue.purge("p")
    for _ in range(5):
        queue._start_prune()
        await store.committed()
    assert store.read(rows.newest_number) == last.event.seq == 1011
    await store.close()


async def test_tables_are_made_although_another_connection_holds_the_lock_for_a_moment(tmp_path: Path) -> None:
    store = Store(tmp_path / "host.db")
    begun = threading.Event()

    def hold() -> None:
        with contextlib.closing(sqlite3.connect(tmp_path / "host.db", isolation_level=None)) as other:
            other.execute("BEGIN IMMEDIATE")
            begun.set()
            time.sleep(0.2)  # nothing tells that another connection waits
            other.execute("ROLLBACK")

    held = asyncio.create_task(asyncio.to_thread(hold))
    assert await asyncio.to_thread(begun.wait, 10)
    with pytest.raises(sqlite3.OperationalError, match="locked"):
        store.read(lambda db: db.execute("CREATE TABLE at_once (x)"))
    store.make("CREATE TABLE IF NOT EXISTS waited (x)")
    assert store.read(lambda db: db.execute("PRAGMA busy_timeout").fetchone()) == (0,)
    await held
    await store.close()


async def test_tools_are_approved_although_another_connection_holds_the_lock(tmp_path: Path) -> None:
    store, items = Store(tmp_path / "host.db"), (Item("look", {"name": "look"}),)
    with contextlib.closing(sqlite3.connect(tmp_path / "host.db", isolation_level=None)) as other:
        other.execute("BEGIN IMMEDIATE")
        approving = asyncio.create_task(Pins(store).approve("p", items))  # which makes its table
        for _ in range(3):  # turns of the loop: the task begins, and the commit is tried
            await asyncio.sleep(0)
        assert store.blocked is not None
        other.execute("ROLLBACK")
        await approving
    assert Pins(store).of("p") == items
    await store.close()
