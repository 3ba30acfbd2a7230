"""The record types: their fields, their writers, and the files that are generated from them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from docs.generate.schemas import FOLDER
from isolator.audit.schema import (
    ABSENT,
    AUDIT,
    BROKER,
    HOST,
    RECORDS,
    SENDERS,
    SUPERVISOR,
    AuditGap,
    NetDenied,
    PluginCrashed,
    may_write,
)

REPO = Path(__file__).resolve().parents[2]


def test_data_is_what_was_passed_in_that_order() -> None:
    gap = AuditGap(why="retention", count=None, from_=1, to=7)
    assert list(gap.data.items()) == [("why", "retention"), ("count", None), ("from", 1), ("to", 7)]


def test_field_is_read_by_its_name_and_absent_when_it_was_not_passed() -> None:
    crashed = PluginCrashed(cause="signal", signal=9, exit_code=None)
    assert (crashed.signal, crashed.exit_code, crashed.reason) == (9, None, ABSENT)
    assert AuditGap(count=1, why="", from_=3).from_ == 3


@pytest.mark.parametrize("type", RECORDS)
def test_record_type_is_written_by_its_sources_alone(type: str) -> None:
    sources = {source for source in (AUDIT, *SENDERS) if may_write(source, type)}
    assert sources == set(RECORDS[type].SOURCES) and sources
    family = type.partition(".")[0]
    # The processes that read bytes of plugins never speak for the supervisor.
    assert sources <= {"net": {BROKER, SUPERVISOR}, "event": {HOST}, "audit": {AUDIT, *SENDERS}}.get(family, sources)
    of_the_host = {"plugin.health", "plugin.paused", "plugin.resumed"}  # it pings plugins and holds events back
    if family in ("host", "plugin", "resources", "syscall", "fs") and type not in of_the_host:
        assert sources == {SUPERVISOR}


def test_unknown_type_or_source_may_not_be_written() -> None:
    assert not may_write(SUPERVISOR, "host.other") and not may_write("other", NetDenied.TYPE)


def test_published_schemas_are_those_of_the_record_types() -> None:
    """That their text is current is tested with the other generated documents."""
    published = {path.name: path.read_text() for path in (REPO / FOLDER).iterdir()}
    assert set(published) == {f"{type}.json" for type in RECORDS}
    for text in published.values():
        schema = json.loads(text)
        assert schema["description"] and schema["$schema"].endswith("2020-12/schema")
