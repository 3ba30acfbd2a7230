"""Types of the messages between processes: whole after a trip through JSON, and nothing else is believed."""

from __future__ import annotations

import json
import types
import typing
from enum import StrEnum
from typing import Any

import pytest

from isolator.errors import UsageError
from isolator.ipc.body import Body
from isolator.ipc.messages import (
    DIRECTIONS,
    ConnectRun,
    EnsureRun,
    Environment,
    FoundEntry,
    PendingVersion,
    PluginChanged,
    PluginEntry,
    PluginState,
    RegisteredEntry,
    StagePlugin,
    UpdatedPlugin,
)

REQUESTS = list(dict.fromkeys(request for requests in DIRECTIONS.values() for request in requests))
BODIES = [*REQUESTS, *dict.fromkeys(request.reply for request in REQUESTS if request.reply is not None)]
ENTRY = RegisteredEntry(
    name="one", version="1.0.0", digest="0", state=PluginState.RUNNING,
    pending=PendingVersion(version="2.0.0", digest="1", differences=("more",)),
)  # fmt: skip
FOUND = FoundEntry(name="two", version="1.0.0", digest="", state=PluginState.PENDING, found="/srv/two")


def sample(hint: Any) -> Any:
    """A value of a field's type."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return sample(arguments[0])
    if origin is tuple:
        return (sample(arguments[0]),)
    if origin is dict:
        return {"key": sample(arguments[1])}
    if hint is Any:
        return [1, "text", None]
    if issubclass(hint, StrEnum):
        return next(iter(hint))
    if issubclass(hint, Body):
        return ENTRY if hint is PluginEntry else full(hint)
    return {str: "text ü", int: 7, float: 1.5, bool: True}[hint]


def full(body: type[Body]) -> Body:
    """A body with a value in each field."""
    hints = typing.get_type_hints(body).items()
    return body(**{name: sample(hint) for name, hint in hints if typing.get_origin(hint) is not typing.ClassVar})


def parsed(body: Body) -> dict[str, Any]:
    """The JSON of a body as its receiver gets it."""
    made = json.loads(json.dumps(body.to_json()))
    assert isinstance(made, dict)
    return made


@pytest.mark.parametrize("body", BODIES, ids=lambda body: body.__name__)
def test_body_survives_its_json(body: type[Body]) -> None:
    before = full(body)
    assert body.from_json(parsed(before), "sample") == before


def test_every_request_of_a_direction_has_an_operation_of_its_own() -> None:
    for requests in DIRECTIONS.values():
        assert len({request.op for request in requests}) == len(requests)


def test_entry_is_read_as_the_kind_that_was_sent() -> None:
    for entry in (ENTRY, FOUND):
        assert PluginChanged.from_json(parsed(PluginChanged(plugin=entry)), "sample").plugin == entry


def test_fields_that_are_left_out_have_their_defaults() -> None:
    assert parsed(PluginChanged(removed="one")) == {"removed": "one"}
    assert parsed(UpdatedPlugin(plugin=FOUND)).keys() == {"plugin"}
    assert parsed(StagePlugin(path="/srv/one")) == {"path": "/srv/one"}
    assert EnsureRun.from_json({"name": "one"}, "sample") == EnsureRun(name="one", reason="event")
    assert Environment.from_json({}, "sample") == Environment()


@pytest.mark.parametrize(
    "body, data, why",
    [
        (EnsureRun, [], "has to be a JSON object"),
        (EnsureRun, None, "has to be a JSON object"),
        (EnsureRun, {}, "field 'name' is missing"),
        (EnsureRun, {"name": "one", "more": 1}, "unknown field 'more'"),
        (EnsureRun, {"name": "one", "x" * 5000: 1}, "unknown field 'xxx"),
        (EnsureRun, {"name": 1}, "field 'name' has to be text"),
        (EnsureRun, {"name": ["one"]}, "field 'name' has to be text"),
        (ConnectRun, {"name": "one", "run": "r", "deadline": True}, "field 'deadline' has to be a finite number"),
        (ConnectRun, {"name": "one", "run": "r", "deadline": float("nan")}, "has to be a finite number"),
        (ConnectRun, {"name": "one", "run": "r", "deadline": 10**400}, "has to be a finite number"),
        (StagePlugin, {"hooks": "deploy.completed"}, "field 'hooks' has to be a list"),
        (StagePlugin, {"hooks": [1]}, "field 'hooks' has to be text"),
        (Environment, {"env": {"KEY": 1}}, "field 'env' has to be text"),
        (Environment, {"env": [["KEY", "value"]]}, "field 'env' has to be an object"),
        (PluginEntry, parsed(ENTRY) | {"state": "asleep"}, "field 'state' has to be one of pending,"),
        (PluginEntry, parsed(ENTRY) | {"pid": True}, "field 'pid' has to be an integer"),
        (PluginEntry, parsed(ENTRY) | {"restarts": 1.5}, "field 'restarts' has to be an integer"),
        (PluginEntry, parsed(ENTRY) | {"on_trial": 1}, "field 'on_trial' has to be true or false"),
        (PluginEntry, parsed(ENTRY) | {"pending": {"version": "2"}}, "field 'differences' is missing"),
    ],
)  # fmt: skip
def test_value_that_the_type_does_not_allow_is_refused(body: type[Body], data: object, why: str) -> None:
    with pytest.raises(UsageError) as caught:
        body.from_json(data, "sample")
    assert why in str(caught.value)
    assert len(str(caught.value)) < 500
