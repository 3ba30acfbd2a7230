"""Durations of consecutive steps. Standard library only."""

from __future__ import annotations

import time


class Stopwatch:
    """Writes into ``steps`` how many milliseconds each step took; a call ends a step and begins the next."""

    def __init__(self, steps: dict[str, float]) -> None:
        self._steps, self._last = steps, time.perf_counter()

    def __call__(self, step: str) -> None:
        now = time.perf_counter()
        self._steps[step] = round((now - self._last) * 1000, 3)
        self._last = now
