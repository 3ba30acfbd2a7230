"""The state that crosses an exec: whatever it holds comes back the same; of another format it is refused in a line."""

from __future__ import annotations

import functools
import json
import os
import types
import typing
from enum import StrEnum
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from isolator.errors import IsolatorError
from isolator.ipc.body import Body
from isolator.ipc.handover import DaemonState, RunState, descriptors
from isolator.linux.memfd import make_sealed
from isolator.supervisor.reload import formats

NUMBERS = st.integers(-1, 1 << 40)
JSON = st.recursive(
    st.none() | st.booleans() | NUMBERS | st.text(max_size=5), lambda inner: st.lists(inner, max_size=2)
)
SCALARS: dict[Any, st.SearchStrategy[Any]] = {
    str: st.text(max_size=8), int: NUMBERS, bool: st.booleans(), Any: JSON,
    float: st.floats(allow_nan=False, allow_infinity=False),
}  # fmt: skip


@functools.cache
def values(hint: Any) -> st.SearchStrategy[Any]:
    """Any value of a field's type."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        (inner,) = (one for one in arguments if one is not type(None))
        return st.none() | values(inner)
    if origin is tuple:
        return st.lists(values(arguments[0]), max_size=2).map(tuple)
    if origin is dict:
        return st.dictionaries(st.text(max_size=4), values(arguments[1]), max_size=2)
    if isinstance(hint, type) and issubclass(hint, StrEnum):
        return st.sampled_from(hint)
    if isinstance(hint, type) and issubclass(hint, Body):
        hints = {name: one for name, one in typing.get_type_hints(hint).items() if not name.startswith("_")}
        return st.builds(hint, **{name: values(one) for name, one in hints.items()})
    return SCALARS[hint]


@given(values(DaemonState))
@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
def test_state_comes_back_as_it_was_written(state: DaemonState) -> None:
    fd = formats.write(state)
    try:
        assert formats.read(fd) == (_plain(state), "")
    finally:
        os.close(fd)


def _plain(state: DaemonState) -> DaemonState:
    """As JSON has it: what the layers keep for themselves holds lists, no tuples."""
    return DaemonState.from_json(json.loads(json.dumps(state.to_json())), "state")


@given(values(RunState))
@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
def test_every_descriptor_of_a_run_is_named(run: RunState) -> None:
    cage = run.cage
    expected = [
        cage.pidfd, cage.status, cage.oom, run.directory, run.stdout, run.stderr, run.listener, run.drift,
        *run.streams.values(), *(fd for layer in cage.layers for fd in layer.fds.values()),
    ]  # fmt: skip
    assert sorted(descriptors(run)) == sorted(fd for fd in expected if fd >= 0)


@pytest.mark.parametrize("number", [formats.FORMATS.present + 1, formats.FORMATS.present - 2, "1", None])
def test_state_of_another_format_is_refused_in_one_line(number: object) -> None:
    fd = make_sealed(json.dumps({"format": number, "state": {}}).encode())
    try:
        with pytest.raises(IsolatorError, match="this version reads 4, 3") as caught:
            formats.read(fd)
        assert "\n" not in str(caught.value)
    finally:
        os.close(fd)


def _places(value: Any) -> list[tuple[Any, Any]]:
    """Each list or object in a value with each of its keys."""
    keys: Any = value if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ()
    return [(value, key) for key in keys] + [place for key in keys for place in _places(value[key])]


@given(st.data())
@settings(max_examples=200, deadline=None, suppress_health_check=list(HealthCheck))
def test_any_value_of_any_type_in_a_state_is_read_or_refused_in_one_line(data: st.DataObject) -> None:
    state = data.draw(values(DaemonState))
    whole = json.loads(json.dumps({"format": 4, "state": state.to_json(), "host_toml": ""}))
    place, key = data.draw(st.sampled_from(_places(whole)))
    if data.draw(st.booleans()):
        del place[key]
    else:
        place[key] = data.draw(JSON | st.dictionaries(st.text(max_size=3), JSON, max_size=2))
    fd = make_sealed(json.dumps(whole).encode())
    try:
        formats.read(fd)
    except IsolatorError as error:
        assert "\n" not in str(error)
    finally:
        os.close(fd)


def test_file_that_somebody_could_still_change_is_refused() -> None:
    fd = os.memfd_create("state", os.MFD_ALLOW_SEALING)
    try:
        os.write(fd, b'{"format": 1, "state": {}}')
        with pytest.raises(IsolatorError, match="cannot be read"):
            formats.read(fd)
    finally:
        os.close(fd)


def test_newest_format_that_both_sides_know_is_written() -> None:
    assert [formats.newest_common(others) for others in ([3], [4, 3], [5, 4])] == [3, 4, 4]
    with pytest.raises(IsolatorError, match=r"takes over states of format 5, 6, this one hands over 4"):
        formats.newest_common([6, 5])
