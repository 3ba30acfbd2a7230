"""The invocations of a plugin, without a cage."""

from __future__ import annotations

import asyncio
import os
from types import SimpleNamespace
from typing import Any, cast

import pytest

from isolator.cage.processes import CageExit
from isolator.errors import UnavailableError
from isolator.ipc.messages import Origin
from isolator.supervisor.invocations import Invocation, Invocations
from tests.support.timeouts import seconds

ABSENT: Any = None


async def test_invocation_that_is_being_prepared_is_not_handed_over() -> None:
    """A reload tries its program with the state of a daemon that goes on meanwhile."""
    invocations, registration = Invocations(ABSENT, "program"), SimpleNamespace(name="program")
    invocations._invocations["5e0cfc568d"] = Invocation(ABSENT, registration, ABSENT, "5e0cfc568d")  # type: ignore[arg-type]
    assert invocations.under_way
    assert invocations.hand_over() == ()


@pytest.mark.parametrize("fault", [False, True], ids=["ended", "a fault of the daemon"])
async def test_host_hears_of_the_end_before_the_removal_unless_something_may_still_run(
    monkeypatch: pytest.MonkeyPatch, fault: bool
) -> None:
    seen: list[str] = []
    end = CageExit(0, None, "exit", 0.0)

    def note(what: str, returned: object = None) -> Any:
        async def noted(*_: object) -> object:
            seen.append(what)
            if fault and what == "silenced":
                raise OSError("a fault")
            return returned

        return noted

    context: Any = SimpleNamespace(rest=SimpleNamespace(coming=False))
    registration: Any = SimpleNamespace(name="program")
    invocation = Invocation(context, registration, ABSENT, "5e0cfc568d")
    monkeypatch.setattr(invocation, "_wait", note("waited"))
    monkeypatch.setattr(invocation, "_take_down", note("removed"))
    monkeypatch.setattr(invocation, "_record_end", lambda *_: seen.append("recorded"))
    monkeypatch.setattr(invocation, "_tell_host", lambda *_: seen.append("told"))
    cage = SimpleNamespace(processes=SimpleNamespace(silence=note("silenced")))
    run: Any = SimpleNamespace(ended=note("ended", end), origin=Origin.PLUGIN, cage=cage)
    await asyncio.wait([asyncio.create_task(invocation.watch(run))])
    last = ["removed", "told"] if fault else ["told", "removed"]
    assert seen == ["waited", "ended", "recorded", "silenced", *last]


async def test_invocation_that_waits_for_the_trail_is_stopped_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """It would hold up whoever stops its plugin, and the daemon's own stop, for as long as the disk is full."""
    waits, records = asyncio.Event(), list[str]()

    async def writable() -> None:
        waits.set()
        await asyncio.Event().wait()

    audit = SimpleNamespace(writable=writable, record=lambda record, **_: records.append(record.cause))
    context: Any = SimpleNamespace(wait_for_trail=True, audit=audit)
    invocation = Invocation(context, cast(Any, SimpleNamespace(name="program")), ABSENT, "5e0cfc568d")
    monkeypatch.setattr(invocation, "_tell_host", lambda *_: None)
    monkeypatch.setattr(invocation, "_take_down", _nothing)
    request: Any = SimpleNamespace(environment=None)
    living = asyncio.create_task(invocation.live(request, [], os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC)))
    async with asyncio.timeout(seconds(20)):
        await waits.wait()
        invocation.stop()
        await living
    with pytest.raises(UnavailableError, match="stopped as it was started"):
        await invocation.begun
    assert records == ["did not start"]


async def _nothing() -> None:
    """Nothing of it is there."""
