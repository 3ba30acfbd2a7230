"""Tables of the host's database: those of an earlier version, and what a change of a delivery's state costs."""

from __future__ import annotations

import sqlite3
from pathlib import Path

from host.database.schema import GIVEN_UP
from host.database.store import Store
from host.queue import rows
from host.queue.interface import NewEvent, Result, Subscriber
from host.queue.sqlite import SqliteQueue

_INDEX_BEFORE = """
DROP INDEX deliveries_given_up;
CREATE INDEX deliveries_given_up ON deliveries(plugin, seq) WHERE state IN ('dead', 'expired', 'quarantined');
"""


def _tables(store: Store) -> list[tuple[str, str]]:
    return store.read(lambda db: db.execute("SELECT name, sql FROM sqlite_master ORDER BY name").fetchall())


async def test_database_with_the_index_of_before_gets_this_one_and_can_go_back(tmp_path: Path) -> None:
    path = tmp_path / "host.db"
    store = Store(path)
    new, queue = _tables(store), SqliteQueue(store)
    for number in range(3):
        await queue.accept(NewEvent("deploy.completed", f'{{"n":{number}}}'), [Subscriber("p", None)])
        queue.consumer("p").term(await queue.consumer("p").take(), Result("dead"))
    await store.close()
    with sqlite3.connect(path) as db:
        db.executescript(_INDEX_BEFORE)
    db.close()
    store = Store(path)
    assert _tables(store) == new
    # A version that has the index of before knows these tables, or the way back to it would be closed.
    assert store.read(lambda db: db.execute("PRAGMA user_version").fetchone()) == (4,)
    kept = "SELECT count(*) FROM deliveries INDEXED BY deliveries_given_up WHERE "
    assert store.read(lambda db: db.execute(kept + GIVEN_UP).fetchone()) == (3,)
    assert len(store.read(lambda db: rows.dead(db, "p", 10))) == 3
    await store.close()


async def test_change_of_a_deliverys_state_makes_no_table_of_its_own(tmp_path: Path) -> None:
    store = Store(tmp_path / "host.db")
    steps = store.read(lambda db: db.execute(f"EXPLAIN {rows.OUTCOME}", [None] * rows.OUTCOME.count("?")).fetchall())
    assert "OpenEphemeral" not in {step[1] for step in steps}
    await store.close()
