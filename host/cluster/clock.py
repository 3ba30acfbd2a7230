"""Time as a host of a cluster has it: one clock that it acts and waits by, and the wall's, which is only shown."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Callable
from typing import Protocol

from isolator.linux.boottime import boottime


class Handle(Protocol):
    """A call that is due."""

    def cancel(self) -> None:
        """Have it not made."""


class Clock:
    """The machine's clocks; all that waits in a cluster's host waits by ``call_later``, which tests replace."""

    def now(self) -> float:
        """Seconds by which this host acts."""
        return boottime()

    def wall(self) -> float:
        """Unix time, which decides nothing."""
        return time.time()

    def call_later(self, seconds: float, callback: Callable[[], object]) -> Handle:
        """Call something on the event loop after a time."""
        return asyncio.get_running_loop().call_later(seconds, callback)

    @contextlib.asynccontextmanager
    async def limit(self, seconds: float) -> AsyncIterator[None]:
        """Raise TimeoutError if what is done with this takes longer."""
        async with asyncio.timeout(None) as bound:
            loop = asyncio.get_running_loop()
            handle = self.call_later(seconds, lambda: bound.reschedule(loop.time()))
            try:
                yield
            finally:
                handle.cancel()

    async def sleep(self, seconds: float) -> None:
        """Let a time pass."""
        await self.event(asyncio.Event(), seconds)

    async def event(self, event: asyncio.Event, seconds: float) -> bool:
        """Wait for an event for a time; whether it is set, which it no longer is afterwards."""
        if seconds > 0:
            with contextlib.suppress(TimeoutError):
                async with self.limit(seconds):
                    await event.wait()
        found = event.is_set()
        event.clear()
        return found
