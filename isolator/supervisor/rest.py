"""Rest: nothing begins any more, so that what is under way ends and the daemon can be handed over (reload/)."""

from __future__ import annotations

import asyncio

from isolator.ipc.messages import ConnectRun, EnsureRun, StartInvocation

REPEATED = frozenset({EnsureRun.op, ConnectRun.op})
"""Requests that may wait for long, and change nothing if they are begun again."""
LATER = frozenset({StartInvocation.op})
"""Requests that go on when the host which sent them leaves: the next one is told how they ended."""


class Waits:
    """Entered by a task while it waits for something that takes as long as it takes: it can be given up meanwhile."""

    now = False

    def __enter__(self) -> None:
        self.now = True

    def __exit__(self, *_: object) -> None:
        self.now = False


class Rest:
    """Whether the daemon comes to rest. Whoever begins something by itself waits for ``opened`` first."""

    def __init__(self) -> None:
        self._open = asyncio.Event()
        self._open.set()

    @property
    def coming(self) -> bool:
        """Whether nothing may begin at the moment."""
        return not self._open.is_set()

    async def opened(self) -> None:
        """Wait while the daemon comes to rest."""
        await self._open.wait()

    def come(self) -> None:
        """Let nothing begin any more."""
        self._open.clear()

    def go_on(self) -> None:
        """Let everything begin again."""
        self._open.set()
