"""Waiting for the end of an event's deliveries, which may be hundreds: its rows are read once they have ended."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable

from host.queue.interface import FINAL


class Watcher:
    """One wait for one event."""

    def __init__(self) -> None:
        self._finished: set[str] = set()
        self._open: set[str] = set()
        self._over = asyncio.Event()

    def begin(self) -> None:
        """Take note of what ends from now on."""
        self._finished.clear()
        self._open.clear()
        self._over.clear()

    def note(self, plugin: str, state: str) -> None:
        """Take note of the state of a plugin's delivery."""
        (self._finished.add if state in FINAL else self._finished.discard)(plugin)
        if self._open and self._finished >= self._open:
            self._over.set()

    def look_again(self) -> None:
        """End ``ended`` at once."""
        self._over.set()

    async def ended(self, plugins: Iterable[str]) -> None:
        """Wait until the deliveries of these plugins have ended since ``begin``, or ``look_again``."""
        self._open = set(plugins)
        if not self._finished >= self._open:
            await self._over.wait()
