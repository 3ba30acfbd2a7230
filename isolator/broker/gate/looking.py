"""The share of one cage in reading what its clients send in the clear."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable

from isolator.base.pacing import TokenBucket

PER_SECOND, AT_ONCE = 0.05, 0.02
"""Seconds of CPU time for looking at what one cage sends in the clear: some hundred hellos or requests each second."""
LARGEST, SMALLEST, HOLD = 16 * 1024, 256, 0.001
"""Bytes of a client's in one piece, and seconds for which one may hold up the others."""
LONGEST_REST = 0.05
"""Seconds after which a spent budget is looked at again."""
ENOUGH = HOLD
"""Seconds of CPU time that there have to be again before a spent budget is used: what a client sends meanwhile, one
byte at a time perhaps, is then read in one piece, and not at one wakeup of the broker for each byte."""
READ = 20e-6
"""Seconds that a piece costs beside being looked at: one byte at a time is no cheaper way to keep a broker busy."""


class Looking:
    """The share of one cage, all its connections together, in reading what clients send in the clear.

    It has a budget of CPU time, and ``HOLD`` seconds of it in one turn of the event loop: so long the other cages
    wait. Whoever finds the turn ``over`` tries again in the next one; when the budget is spent, in its ``turn``, which
    comes once there is ``ENOUGH`` again.
    """

    def __init__(self, budget: TokenBucket | None = None) -> None:
        """``budget`` in seconds of CPU time."""
        self.budget = TokenBucket(PER_SECOND, AT_ONCE) if budget is None else budget
        self.piece = LARGEST
        """Bytes to read at a time, that they may be read in ``HOLD`` seconds at the present cost."""
        self.over = False
        """Whether this turn's part is used up."""
        self._used = 0.0
        self._resting = False
        self._waiting: deque[Callable[[], None]] = deque()
        self._timer: asyncio.Handle | None = None

    @property
    def spent(self) -> bool:
        """Whether the budget is spent, and has been ever since less than ``ENOUGH`` was there."""
        self._resting = self.budget.tokens < (min(ENOUGH, self.budget.burst) if self._resting else 0.0)
        return self._resting

    def took(self, seconds: float, size: int) -> None:
        """Count the CPU time of reading so many bytes."""
        self.budget.take(seconds + READ)
        self._used += seconds + READ
        if self._used >= HOLD and not self.over:
            self.over = True
            asyncio.get_running_loop().call_soon(self._new_turn)
        if size and seconds > HOLD:
            self.piece = max(SMALLEST, int(min(size, self.piece) * HOLD / seconds))
        elif seconds < HOLD / 4 and size >= self.piece:
            self.piece = min(LARGEST, self.piece * 2)

    def turn(self, go_on: Callable[[], None]) -> None:
        """Call ``go_on`` when the budget allows, after those that wait already."""
        self._waiting.append(go_on)
        self._plan()

    def _new_turn(self) -> None:
        self._used, self.over = 0.0, False

    def _plan(self) -> None:
        if self._timer is None and self._waiting:
            pause = min(LONGEST_REST, self.budget.until(ENOUGH)) if self.spent else 0.0
            self._timer = asyncio.get_running_loop().call_later(pause, self._next)

    def _next(self) -> None:
        self._timer = None
        try:
            if not self.spent:
                self._waiting.popleft()()
        finally:
            self._plan()
