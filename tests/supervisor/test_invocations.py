"""The invocations of a plugin, without a cage."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from isolator.supervisor.invocations import Invocation, Invocations

ABSENT: Any = None


async def test_invocation_that_is_being_prepared_is_not_handed_over() -> None:
    """A reload tries its program with the state of a daemon that goes on meanwhile."""
    invocations, registration = Invocations(ABSENT, "program"), SimpleNamespace(name="program")
    invocations._invocations["5e0cfc568d"] = Invocation(ABSENT, registration, ABSENT, "5e0cfc568d")  # type: ignore[arg-type]
    assert invocations.under_way
    assert invocations.hand_over() == ()
