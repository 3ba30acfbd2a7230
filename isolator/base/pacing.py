"""Pacing: pauses that grow with each failure, and rates with a burst. Pure; times are monotonic seconds."""

from __future__ import annotations

import os
import time
from collections.abc import Callable


class Backoff:
    """Pauses between tries: ``first`` seconds, then twice as long each time, up to ``longest``.

    ``spread`` randomises each pause by up to that fraction either way, so that many that failed together do not try
    again together.
    """

    def __init__(self, first: float, longest: float, *, spread: float = 0.0) -> None:
        self.first, self.longest, self._spread = first, longest, spread
        self._tries = 0

    def next(self) -> float:
        """Seconds to wait before the next try."""
        pause = self.after(self._tries)
        self._tries += 1
        return pause

    def reset(self) -> None:
        """Begin with the first pause again: a try has succeeded."""
        self._tries = 0

    def after(self, failures: int) -> float:
        """Seconds to wait after ``failures`` earlier pauses; for those who count failures elsewhere (on disk)."""
        pause = min(self.longest, self.first * 2.0 ** min(failures, 64))
        if not self._spread:
            return pause
        chance = int.from_bytes(os.urandom(4), "big") / 0xFFFFFFFF
        return pause * (1 + self._spread * (2 * chance - 1))


class TokenBucket:
    """``rate`` tokens a second on average, ``burst`` at once; starts full. ``clock``: monotonic, in seconds."""

    def __init__(self, rate: float, burst: float, clock: Callable[[], float] = time.monotonic) -> None:
        self.rate, self.burst, self._clock = rate, burst, clock
        self._tokens, self._at = burst, clock()

    @property
    def tokens(self) -> float:
        """Tokens that are there now; negative while there is a debt."""
        self._refill()
        return self._tokens

    def try_take(self) -> bool:
        """Take one token if it is there."""
        self._refill()
        if self._tokens < 1.0:
            return False
        self._tokens -= 1.0
        return True

    def take(self, amount: float = 1.0) -> float:
        """Take that many tokens, on credit if need be; returns the seconds until the debt is paid."""
        self._refill()
        self._tokens -= amount
        return max(0.0, -self._tokens / self.rate)

    def until(self, amount: float) -> float:
        """Seconds until that many tokens are there, if nobody takes any; 0 when they are."""
        self._refill()
        return max(0.0, (min(amount, self.burst) - self._tokens) / self.rate)

    def _refill(self) -> None:
        now = self._clock()
        self._tokens = min(self.burst, self._tokens + (now - self._at) * self.rate)
        self._at = now
