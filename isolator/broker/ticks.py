"""Ticks: once a second, for those cages alone that have something to look after; a broker at rest sleeps."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

Tick = Callable[[], bool]
"""Returns whether there is something to look after in a second, too."""
SECONDS = 1.0


class Ticks:
    """The ticks of a broker's cages, all at one time. They come while ``run`` runs."""

    def __init__(self) -> None:
        self._ticks: dict[Tick, None] = {}
        self._wanted = asyncio.Event()

    def want(self, tick: Tick) -> None:
        """Call ``tick`` once a second from now on, until it says that nothing is left."""
        self._ticks[tick] = None
        self._wanted.set()

    def drop(self, tick: Tick) -> None:
        """Call it no more: its cage has ended."""
        self._ticks.pop(tick, None)

    async def run(self) -> None:
        """Call the ticks."""
        while True:
            await self._wanted.wait()
            await asyncio.sleep(SECONDS)
            self._wanted.clear()
            due, self._ticks = self._ticks, {}
            for tick in due:
                if tick():
                    self.want(tick)
