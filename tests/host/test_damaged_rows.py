"""Rows of the host's database that hold something else than was written: each costs what stands in it, nothing more."""

from __future__ import annotations

import contextlib
import json
import os
import sqlite3
from collections.abc import Mapping
from operator import methodcaller
from pathlib import Path

import pytest

from host.database.store import Store
from host.plugins.registry import load_event_types
from host.plugins.secrets import ConfigStore
from host.queue.interface import NewEvent, Result, Subscriber
from host.queue.owed import Debts, owed
from host.queue.sqlite import SqliteQueue
from isolator.audit.client import AuditClient
from isolator.audit.schema import PluginPaused

NO_TEXT = "CAST(x'ff00fe' AS TEXT)"
VALUES = {"no text": NO_TEXT, "bytes": "x'00ff'", "a number": "5", "half": "'{\"n\"'"}


async def _three_events(path: Path) -> list[str]:
    store = Store(path)
    queue = SqliteQueue(store)
    events = [await queue.accept(NewEvent("e", f'{{"n":{n}}}'), [Subscriber("p", None)]) for n in range(3)]
    await store.close()
    return [accepted.event.id for accepted in events]


def _damage(path: Path, statement: str) -> None:
    with contextlib.closing(sqlite3.connect(path)) as db:
        db.execute(statement)
        db.commit()


@pytest.mark.parametrize("value", VALUES)
@pytest.mark.parametrize("column", ["name", "time", "payload", "subject", "trace"])
async def test_event_that_is_damaged_is_not_sent_and_keeps_no_other(tmp_path: Path, column: str, value: str) -> None:
    ids = await _three_events(tmp_path / "host.db")
    _damage(tmp_path / "host.db", f"UPDATE events SET {column}={VALUES[value]} WHERE seq=2")
    store = Store(tmp_path / "host.db")
    queue = SqliteQueue(store)
    taken = []
    for _ in range(2):
        delivery = await queue.consumer("p").take()
        queue.consumer("p").ack(delivery, Result("ok"))
        taken.append(delivery.event.id if delivery.event is not None else None)
    # A number becomes a text as any other, and without its trace an event is whole.
    harmless = (column != "payload" and value in ("a number", "half")) or (column, value) == ("trace", "no text")
    assert taken == (ids[:2] if harmless else [ids[0], ids[2]])
    await store.committed()
    assert len(await queue.list_events()) == 3
    assert queue.show(ids[0]).payload == {"n": 0}
    await store.close()


@pytest.mark.parametrize("value", VALUES)
@pytest.mark.parametrize("column", ["key", "attempts", "crashes", "due", "state"])
async def test_delivery_that_is_damaged_keeps_no_other(tmp_path: Path, column: str, value: str) -> None:
    ids = await _three_events(tmp_path / "host.db")
    _damage(tmp_path / "host.db", f"UPDATE deliveries SET {column}={VALUES[value]} WHERE seq=2")
    store = Store(tmp_path / "host.db")
    queue = SqliteQueue(store)
    taken = {(await queue.consumer("p").take()).seq for _ in range(2)}
    assert taken <= {1, 2, 3} and len(taken) == 2
    assert column == "key" or {1, 3} <= taken or value == "a number"
    assert {row.id for row in await queue.list_events()} == set(ids)
    await store.close()


async def test_damaged_event_type_keeps_no_other(tmp_path: Path) -> None:
    store = Store(tmp_path / "host.db")
    schema = json.dumps({"type": "object", "properties": {"n": {"type": "integer"}}})
    for name, text in {"good": repr(schema), "half": "'{'", "other": "'[]'", "raw": NO_TEXT, "odd": "x'00'"}.items():
        store.read(
            lambda db, name=name, text=text: db.execute(  # type: ignore[misc]
                f"INSERT INTO event_types VALUES ('{name}', {text}, NULL, 1, NULL)"
            )
        )
    found, damaged = load_event_types(store)
    assert [kind.name for kind in found] == ["good"]
    assert sorted(damaged) == ["half", "odd", "other", "raw"]
    await store.close()


@pytest.mark.parametrize("row", [
    {"value": "'text'"}, {"value": "x''"}, {"value": "5"}, {"key": "x'ff'"}, {"type": NO_TEXT},
])  # fmt: skip
async def test_damaged_config_keeps_its_plugin_alone(tmp_path: Path, row: Mapping[str, str]) -> None:
    key = tmp_path / "key"
    store = Store(tmp_path / "host.db")
    ConfigStore(store, key)
    cells = {"plugin": "'p'", "key": "'k'", "secret": "1", "type": "'string'", "value": repr(""), "updated": "0"}
    cells |= {"value": f"x'{os.urandom(40).hex()}'"} | dict(row)
    await store.run(lambda db: db.execute(f"INSERT INTO config VALUES ({','.join(cells.values())})"))
    await store.run(lambda db: db.execute(f"INSERT INTO config VALUES ({NO_TEXT},'k',1,'string',x'00',0)"))
    config = ConfigStore(store, key)
    assert set(config.broken) == {"p"}
    await store.close()


OWED = json.dumps(owed(PluginPaused(by="uid:0"), "p").content)


@pytest.mark.parametrize(
    "row",
    [
        *({column: value} for column in ("since", "record") for value in VALUES.values()),
        *({"record": repr(text)} for text in (OWED.replace('"p"', "[]"), OWED.replace("null", "{}"), "[" * 100_000)),
    ],
    ids=lambda row: "{}={:.20}".format(*next(iter(row.items()))),
)
async def test_damaged_debt_keeps_no_other(tmp_path: Path, row: Mapping[str, str]) -> None:
    store = Store(tmp_path / "host.db")
    cells = {"id": "'good'", "since": "'2026-01-02T03:04:05.000006Z'", "record": repr(OWED)}
    for each in (cells, cells | {"id": "'damaged'"} | dict(row)):
        insert = f"INSERT INTO owed VALUES ({','.join(each.values())})"
        await store.run(methodcaller("execute", insert))
    found = list(Debts(store, AuditClient(None), tmp_path)._left())
    assert "good" in {one.id for one in found}
    assert all(isinstance(one.since, str) for one in found), "they are sought by the first time of all"
    assert all(isinstance(text, str | None) for one in found for text in (one.plugin, one.event_id))
    await store.close()
