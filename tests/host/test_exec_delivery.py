"""Delivery in the mode ``exec``, one host in the place of another: who hears the supervisor's answer."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, cast

from host.delivery.exec import ExecDelivery
from host.delivery.modes import Parts
from host.plugins.registry import Plugin
from host.queue.interface import Delivery, Event
from isolator.ipc.messages import BreakOff, StartInvocation

_PLUGIN = SimpleNamespace(
    name="linter",
    state="running",
    timeout=1.0,
    major=1,
    manifest=SimpleNamespace(delivery=SimpleNamespace(concurrency=4)),
)


class _Supervisor:
    """Notes what it is asked, and never answers."""

    def __init__(self) -> None:
        self.heard: list[str] = []

    async def ask_fds(self, request: Any, *, fds: list[int]) -> Any:
        self.heard.append(request.op)
        await asyncio.Event().wait()


def _parts(supervisor: _Supervisor) -> Parts:
    def begin(_: Delivery, run: str, request: bytes, send: Callable[[], None], give_up: object) -> None:
        send()

    outcomes = SimpleNamespace(begin=begin, lost=lambda: None)
    return cast(
        Parts,
        SimpleNamespace(
            supervisor=supervisor,
            outcomes=outcomes,
            catalogue=SimpleNamespace(get=lambda _: None),
            sidecar=SimpleNamespace(leaving=False, fence=SimpleNamespace(closed=False), status=""),
            environment=lambda _: None,
        ),
    )


async def test_supervisor_hears_of_every_invocation_before_it_is_to_break_off() -> None:
    """One that it hears of later is answered to a process that has left: its output would be nobody's."""
    supervisor = _Supervisor()
    mode = ExecDelivery(_parts(supervisor))
    event = Event(1, "ev_1", "deploy.failed", "2026-01-01T00:00:00Z", 0.0, 1.0, "{}")
    await mode.deliver(cast(Plugin, _PLUGIN), "deploy.failed", Delivery(1, "linter", None, event=event))
    while mode.unsettled:  # noqa: ASYNC110 # a turn or two
        await asyncio.sleep(0)
    supervisor.heard.append(BreakOff.op)  # as the host does in the same turn
    for _ in range(5):
        await asyncio.sleep(0)
    mode.close()
    assert supervisor.heard == [StartInvocation.op, BreakOff.op]
