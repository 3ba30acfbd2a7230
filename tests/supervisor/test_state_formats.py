"""The states that processes hand over: a change of one's type is a new format, and each format reads back."""

from __future__ import annotations

import hashlib
import json
import re
import typing
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from host.composition.handover import FORMATS, HostState
from host.console import service as console
from host.delivery.exec import ExecState
from host.delivery.http import HttpDeliveryState
from host.delivery.mcp import McpState
from host.delivery.modes import _CLASSES, mode_class
from host.delivery.worker import WorkerState
from host.mcp.servers import ServersState
from isolator.audit import handover as audit
from isolator.broker import broker
from isolator.ipc.body import Body, _shape
from isolator.ipc.formats import Formats
from isolator.supervisor.reload import formats
from tests.supervisor.test_reload_state import values

MODES: dict[str, type[Body]] = {"exec": ExecState, "http": HttpDeliveryState, "mcp": McpState}
STATES: dict[str, tuple[Formats[Any], tuple[type[Body], ...], str]] = {
    "supervisor": (formats.FORMATS, (), "4 a495449d2262"),
    "audit": (audit.FORMATS, (), "2 4f929ffa3263"),
    "broker": (broker.FORMATS, (), "1 31d84b182e35"),
    "host": (FORMATS, (*MODES.values(), ServersState), "3 7336f49c3113"),
    "console": (console.FORMATS, (), "1 9cf9ff02496f"),
}
"""By process: its formats, the types that its own has as JSON, and the number of the present format with a digest of
all these types."""


def described(kind: type[Body]) -> Iterator[str]:
    """Each field of a type and of those in it."""
    hints, shape = typing.get_type_hints(kind), _shape(kind)
    for name in sorted(one.name for one in shape.fields):
        hint = re.sub(r"\b(?:\w+\.)+(\w+)", r"\1", str(hints[name]))  # wherever a type is defined
        yield f"{kind.__name__}.{name}: {hint}{'' if name in shape.required else ' or left out'}"
        for inner in within(hints[name]):
            yield from described(inner)


def within(hint: Any) -> Iterator[type[Body]]:
    """The types of bodies in a hint."""
    if isinstance(hint, type) and issubclass(hint, Body):
        yield hint
    for argument in typing.get_args(hint):
        yield from within(argument)


@pytest.mark.parametrize("process", STATES)
def test_change_of_a_state_is_a_new_format(process: str) -> None:
    known, further, expected = STATES[process]
    lines = sorted({line for kind in (known.kind, *further) for line in described(kind)})
    digest = hashlib.sha256("\n".join(lines).encode()).hexdigest()[:12]
    assert f"{known.present} {digest}" == expected, (
        f"the state of {process} has another type than its format {known.present}: make it the next format, with its "
        "steps up and down, so that a daemon of the version before or after goes on with it; then write it down here"
    )


def test_every_mode_is_among_the_states_of_a_host() -> None:
    assert {name: mode_class(name).State for name in _CLASSES} == MODES


def _json(kind: type[Body]) -> st.SearchStrategy[Any]:
    return values(kind).map(lambda state: state.to_json())


WORKERS = st.builds(
    WorkerState,
    **{name: values(hint) for name, hint in typing.get_type_hints(WorkerState).items() if name != "modes"},
    modes=st.fixed_dictionaries({}, optional={name: _json(kind) for name, kind in MODES.items()}),
)
OF_HOST = st.builds(
    HostState,
    **{name: values(hint) for name, hint in typing.get_type_hints(HostState).items() if name not in ("workers", "mcp")},
    workers=st.lists(WORKERS, max_size=2).map(tuple),
    mcp=st.none() | _json(ServersState),
)


@pytest.mark.parametrize("process", STATES)
@given(data=st.data())
@settings(max_examples=6, deadline=None, suppress_health_check=list(HealthCheck))
def test_state_reads_back_in_each_format_that_is_written(process: str, data: st.DataObject) -> None:
    known, _, _ = STATES[process]
    state = data.draw(OF_HOST if process == "host" else values(known.kind))
    number = data.draw(st.sampled_from(known.read if known.down is not None else [known.present]))
    body = json.loads(json.dumps(known.body(state, number)))
    found = known.state(number, body, process)
    assert json.loads(json.dumps(known.body(found, number))) == body


@given(OF_HOST)
@settings(max_examples=15, deadline=None, suppress_health_check=list(HealthCheck))
def test_host_of_before_gets_nothing_that_it_does_not_know(state: HostState) -> None:
    body = FORMATS.body(state, 2)
    sessions = [worker["session"] for worker in body["workers"] if worker["session"] is not None]
    sessions += [] if body["mcp"] is None else body["mcp"]["sessions"].values()
    assert not any("hello" in session for session in sessions)
    modes = [worker["modes"]["exec"] for worker in body["workers"] if "exec" in worker["modes"]]
    assert not any("beginning" in run for mode in modes for run in mode["invocations"])
    assert not any("ping" in worker["oneshot"] for worker in body["workers"])
    assert not any("pings" in worker["modes"].get("http", {}) for worker in body["workers"])
