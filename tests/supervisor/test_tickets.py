"""Tickets over an exec of the supervisor: each lives as long as it would have lived."""

from __future__ import annotations

import asyncio
import dataclasses
import json
import os
from pathlib import Path

import pytest

from isolator.errors import DeniedError
from isolator.ipc.handover import TicketsState
from isolator.policy.host import HostConfig
from isolator.supervisor.tickets import SECONDS, Tickets


async def fetch(path: Path) -> str:
    """A ticket of root's."""
    reader, writer = await asyncio.open_unix_connection(path)
    try:
        return str(json.loads(await reader.readline())["ticket"])
    finally:
        writer.close()


def copied(state: TicketsState) -> TicketsState:
    """With descriptors of its own, as after an exec, which closes nothing of the state."""
    tickets = tuple(dataclasses.replace(one, connection=os.dup(one.connection)) for one in state.open)
    return TicketsState(listener=os.dup(state.listener), open=tickets)


async def test_ticket_of_before_an_exec_expires_when_it_would_have_expired(shared_dir: Path) -> None:
    loop, path = asyncio.get_running_loop(), shared_dir / "tickets.sock"
    before = Tickets(path, HostConfig())
    before.start()
    began = loop.time()
    old, young = await fetch(path), await fetch(path)
    state = copied(before.hand_over())
    before.close()
    first, second = state.open
    assert first.until is not None and began + SECONDS <= first.until <= loop.time() + SECONDS
    after = Tickets(path, HostConfig())
    after.adopt(dataclasses.replace(state, open=(dataclasses.replace(first, until=loop.time()), second)))
    try:
        assert [one.until for one in after.hand_over().open if one.token == young] == [second.until]
        while len(after.hand_over().open) > 1:  # noqa: ASYNC110 # its timer is the event
            await asyncio.sleep(0.001)
        with pytest.raises(DeniedError, match="has expired"):
            after.take(old)
        after.take(young).close()
    finally:
        after.close()
