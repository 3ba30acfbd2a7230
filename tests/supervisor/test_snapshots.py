"""Looks at all cages: what fails with one of them is that one's alone."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any, cast

import pytest

from isolator.supervisor.alarms import Alarms
from isolator.supervisor.runners.runners import Runners
from isolator.supervisor.snapshots import keep_snapshots
from tests.support.timeouts import seconds


def plugin(name: str, recorded: asyncio.Queue[str], fault: type[Exception] | None = None) -> Any:
    """A plugin that runs, in whose look the fault is raised."""

    def detect_drift() -> str:
        if fault is not None:
            raise fault
        return ""

    cage = SimpleNamespace(started=True, refresh_figures=lambda usage: None)
    run = SimpleNamespace(
        cage=cage, exited=False, shown={}, usage=dict, use=SimpleNamespace(latest={}), detect_drift=detect_drift
    )
    return SimpleNamespace(
        name=name, state="running", run=run, invocations=SimpleNamespace(runs=[]),
        record_use=lambda run, usage: recorded.put_nowait(name),
    )  # fmt: skip


@pytest.mark.parametrize("fault", [OSError, AssertionError])
async def test_fault_in_the_look_at_one_plugin_leaves_the_others_their_records(fault: type[Exception]) -> None:
    faults: list[str] = []
    asyncio.get_running_loop().set_exception_handler(lambda _, context: faults.append(context["message"]))
    recorded = asyncio.Queue[str]()
    plugins = [plugin("one", recorded), plugin("bad", recorded, fault), plugin("two", recorded)]
    table = SimpleNamespace(plugins={one.name: one for one in plugins})
    looking = asyncio.create_task(keep_snapshots(cast(Any, table), None, 0.001, Alarms()))
    async with asyncio.timeout(seconds(10)):
        assert [await recorded.get() for _ in range(4)] == ["one", "two", "one", "two"]
    looking.cancel()
    assert {*faults} == ({"snapshots has failed; plugin bad is left out"} if fault is not OSError else set())


@pytest.mark.parametrize("fault", [OSError, AssertionError])
async def test_fault_in_the_look_at_one_run_of_a_user_leaves_the_others_theirs(fault: type[Exception]) -> None:
    asyncio.get_running_loop().set_exception_handler(lambda *_: None)
    looked: list[str] = []

    def fail() -> None:
        raise fault

    runners = Runners.__new__(Runners)
    bad, good = SimpleNamespace(id="1", name="a", take_snapshot=fail), SimpleNamespace(id="2", name="b")
    good.take_snapshot = lambda: looked.append(good.id)
    runners._runs = cast(Any, [bad, good])
    runners.take_snapshots()
    assert looked == ["2"]
