"""An event's text in the log is a CloudEvent, and one of a hostile host is taken within its bounds or not at all."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from host.cluster.delivery import cloudevent
from host.queue.interface import Event, NewEvent

_EVENT = Event(
    7, f"ev_{'0' * 28}", "deploy.completed", "2026-03-12T10:11:12.000Z", 1773310272.0, 1773310332.0,
    '{"project_id":"p","n":[1,2.5,"ü"]}', "p", "00-1-2-01",
)  # fmt: skip


def _text(**changed: Any) -> str:
    found = json.loads(cloudevent.write(_EVENT, NewEvent(_EVENT.name, _EVENT.payload, by="uid 0"), "h1"))
    return json.dumps({name: value for name, value in (found | changed).items() if value is not None})


def test_event_is_read_as_it_was_written() -> None:
    text = cloudevent.write(_EVENT, NewEvent(_EVENT.name, _EVENT.payload, by="uid 0"), "h1")
    assert json.loads(text)["specversion"] == "1.0"
    read = cloudevent.read(text)
    assert read == (
        _EVENT.id, _EVENT.name, _EVENT.time, _EVENT.subject, _EVENT.expires, _EVENT.payload, _EVENT.trace, "uid 0",
    )  # fmt: skip


@pytest.mark.parametrize(
    "changed",
    [
        {"id": "ev_1"}, {"id": 7}, {"type": "Not A Type"}, {"time": "soon"}, {"time": "2026-03-12T10:11:12"},
        {"expirytime": None}, {"data": None}, {"data": []}, {"data": {"x": "y" * 70_000}}, {"subject": "s" * 2000},
        {"subject": {}}, {"by": 1},
    ],
)  # fmt: skip
def test_text_that_no_host_writes_is_refused(changed: dict[str, Any]) -> None:
    with pytest.raises(ValueError):
        cloudevent.read(_text(**changed))


def test_event_that_would_never_expire_does() -> None:
    read = cloudevent.read(_text(expirytime="9999-01-01T00:00:00.000Z"))
    assert read.expires == _EVENT.accepted + cloudevent.LONGEST_TTL


@settings(max_examples=30, deadline=None)
@given(st.text() | st.binary().map(repr))
def test_any_text_is_an_event_or_a_value_error(text: str) -> None:
    with pytest.raises(ValueError):
        cloudevent.read(text)
