"""A clock that stands still until a test lets time pass: no test depends on how fast the machine is."""

from __future__ import annotations

import asyncio
import heapq
import itertools
from collections.abc import Callable, Iterable

from host.cluster.clock import Clock
from host.database.store import Store


class _Call:
    def __init__(self, callback: Callable[[], object]) -> None:
        self.callback: Callable[[], object] | None = callback

    def cancel(self) -> None:
        self.callback = None


class SteppedClock(Clock):
    """Time of one test; each host sees it with an offset of its own (``view``)."""

    def __init__(self) -> None:
        self.time = 1000.0
        self._calls: list[tuple[float, int, _Call]] = []
        self._count = itertools.count()

    def now(self) -> float:
        return self.time

    def wall(self) -> float:
        return 1.7e9 + self.time

    def call_later(self, seconds: float, callback: Callable[[], object]) -> _Call:
        call = _Call(callback)
        heapq.heappush(self._calls, (self.time + seconds, next(self._count), call))
        return call

    async def passes(
        self, seconds: float, databases: Iterable[Store], check: Callable[[], object] = lambda: None
    ) -> None:
        """Let a time pass, call by call; ``check`` is called whenever all has come to rest."""
        end = self.time + seconds
        kept = list(databases)
        await settle(kept)
        while True:
            check()
            due = self._calls[0][0] if self._calls else end + 1
            if due > end:
                break
            self.time = max(self.time, due)
            while self._calls and self._calls[0][0] <= self.time:
                call = heapq.heappop(self._calls)[2]
                if call.callback is not None:
                    call.callback()
            await settle(kept)
        self.time = end


class View(Clock):
    """The clock of one host, which began at another moment; ``step`` is added to its wall clock."""

    def __init__(self, clock: SteppedClock, offset: float) -> None:
        self._clock, self._offset, self.step = clock, offset, 0.0

    def now(self) -> float:
        return self._clock.now() + self._offset

    def wall(self) -> float:
        return self._clock.wall() + self.step

    def call_later(self, seconds: float, callback: Callable[[], object]) -> _Call:
        return self._clock.call_later(seconds, callback)


async def settle(databases: list[Store]) -> None:
    """Return when nothing can go on without time passing."""
    ready = asyncio.get_running_loop()._ready  # type: ignore[attr-defined]
    quiet = 0
    while quiet < 2:
        busy = any(one._ops or one._gathering or one._syncing or one._held for one in databases if not one._closed)
        await asyncio.sleep(0.0005 if busy else 0)
        quiet = 0 if busy or ready else quiet + 1
