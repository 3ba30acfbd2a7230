"""The turns of one cage's connections in the event loop of the broker, which all cages share."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable

from isolator.base.pacing import TokenBucket

HOLD, LEAST = 0.001, 0.00025
"""Seconds for which the connections of one cage, all together, may hold up those of the others: of one that has half
of its budget or more, and of one that has spent it."""
PER_SECOND, AT_ONCE = 0.25, 0.25
"""Seconds of CPU time for carrying the bytes of one cage: a gigabyte or so for each second."""
ENOUGH = 0.002
"""Seconds of CPU time that there have to be again before a spent budget is used: what comes meanwhile, a byte at a time
perhaps, is then read in one piece, and not at one wakeup of the broker for each."""


WAKEUP, CROWD, STREAM = 40e-6, 8, 3
"""Seconds of CPU time that one piece costs beside itself: the loop's, and the wakeups at either end; how many
connections have to wait for a small one to cost as much again; and how often that is added to a small one of a stream
once an eighth of the budget is left (the part of a turn is ``LEAST`` then), and once more for each that waits."""
SMALL = 4096
"""Bytes below which a piece is small."""


class Turns:
    """Shares one cage's ``part`` of each turn of the event loop between its connections.

    Whoever finds the part ``over`` waits; in the next turn those who wait come first, one after the other. So what
    another cage waits for grows with the number of cages that are busy, and not with their connections. A turn begins
    only once a part is used up: until then a cage of few or quiet connections costs the loop nothing.

    The cage also has a budget of the broker's CPU time, which no cap of its own counts. While that is spent, all wait;
    and the less is left of it the smaller is the part, as a burst is over soon and a flood never.
    """

    def __init__(self, budget: TokenBucket | None = None) -> None:
        """``budget`` in seconds of CPU time."""
        self.budget = TokenBucket(PER_SECOND, AT_ONCE) if budget is None else budget
        self.held = 0
        """Bytes that the connections hold for what waits to be sent."""
        self.part = HOLD
        """Seconds of CPU time for the cage in one turn."""
        self._used, self._used_up = 0.0, False
        self._waiting: deque[Callable[[], None]] = deque()
        self._planned = False

    @property
    def over(self) -> bool:
        """Whether this turn's part is used up, or others wait already, or the budget is spent."""
        return bool(self._waiting) or self._used_up

    def took(self, seconds: float) -> None:
        """Count the CPU time of some work for the cage."""
        self._used += seconds
        self.budget.take(seconds)
        self._measure()
        if self._used_up:
            self._plan()

    def took_piece(self, seconds: float, size: int, *, streams: bool = False) -> None:
        """As ``took``, for ``size`` bytes that were carried in one piece, which has woken both ends.

        A small one is the dearer the more connections wait for their turns, and the more so, once little of the budget
        is left, if its connection ``streams``: it is no part of an exchange of one piece for another. So one exchange
        after the other goes on as fast as ever, and a cage beyond its budget is served in fewer and larger pieces:
        those of a stream gather meanwhile, and lose nothing but a fraction of a second.
        """
        crowd = 0.0 if size >= SMALL else len(self._waiting) / CROWD
        if streams and 0 < size < SMALL and self.part <= LEAST:
            crowd = STREAM + len(self._waiting)
        self.took(seconds + WAKEUP * (1 + crowd))

    def wait(self, go_on: Callable[[], None]) -> None:
        """Call ``go_on`` in one of the next turns, after those that wait already."""
        self._waiting.append(go_on)
        self._plan()

    def _measure(self) -> None:
        """See what is left of the turn and of the budget: once for each piece, as the clock is a call of the kernel."""
        tokens = self.budget.tokens
        self.part = min(HOLD, max(LEAST, 2 * HOLD * tokens / self.budget.burst))
        self._used_up = tokens < 0 or self._used >= self.part

    def _plan(self) -> None:
        if not self._planned:
            self._planned = True
            loop = asyncio.get_running_loop()
            if self.budget.tokens < 0:
                loop.call_later(self.budget.until(ENOUGH), self._next)
            else:
                loop.call_soon(self._next)

    def _next(self) -> None:
        self._planned, self._used = False, 0.0
        self._measure()
        try:
            for _ in range(len(self._waiting)):
                if self._used_up:
                    break
                self._waiting.popleft()()
        finally:
            if self._waiting:
                self._plan()
