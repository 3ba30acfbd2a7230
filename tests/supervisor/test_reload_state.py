"""The state that crosses an exec: whatever it holds comes back the same; of another format it is refused in a line."""

from __future__ import annotations

import dataclasses
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
from isolator.ipc.handover import (
    CageState,
    DaemonState,
    FenceState,
    PluginKept,
    RunnersState,
    RunnerState,
    RunState,
    descriptors,
)
from isolator.ipc.messages import PluginState
from isolator.linux.memfd import make_sealed
from isolator.supervisor.reload import formats
from tests.supervisor.test_reload_trial import STATE

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
        with pytest.raises(IsolatorError, match="this version reads 2, 1") as caught:
            formats.read(fd)
        assert "\n" not in str(caught.value)
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


def test_daemon_with_runs_of_users_is_not_handed_to_a_version_that_would_end_them() -> None:
    cage = CageState(pid=1, pidfd=-1, status=-1, oom=-1, oom_seen=False, started=0.0, layers=())
    run = RunnerState(
        id="4f", uid=1000, gid=1000, groups=(), connection=-1, cage=cage, effective={}, lease=1, lock=-1, listener=-1,
        theirs=(), shown=(),
    )  # fmt: skip
    with_runs = RunnersState(listener=-1, waiting=(), runs=(run,), theirs=())
    with pytest.raises(IsolatorError, match="and these go on: run 4f of uid 1000"):
        formats.write(dataclasses.replace(STATE, runners=with_runs), 1)
    fd = formats.write(dataclasses.replace(STATE, runners=dataclasses.replace(with_runs, runs=())), 1)
    try:
        assert formats.read(fd) == (STATE, "")
    finally:
        os.close(fd)


def test_plugin_with_a_deadline_is_not_handed_to_a_version_that_would_forget_it() -> None:
    kept = PluginKept(
        name="held", state=PluginState.RUNNING, error="", notice="", outdated="", wanted=True, reason="event",
        restarts=0, ends=(), others_ends=0, crashes=(), backoff_until=None, effective=None, run=None,
        fence=FenceState(until=1.0, frozen=None),
    )  # fmt: skip
    with pytest.raises(IsolatorError, match="knows no leases, and these plugins have one: held"):
        formats.write(dataclasses.replace(STATE, plugins=(kept,)), 1)


def test_newest_format_that_both_sides_know_is_written() -> None:
    assert [formats.newest_common(others) for others in ([1], [2, 1], [3, 2])] == [1, 2, 2]
    with pytest.raises(IsolatorError, match=r"takes over states of format 3, 4, this one hands over 2"):
        formats.newest_common([4, 3])
