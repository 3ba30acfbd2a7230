"""Durations of consecutive steps. Standard library only."""

from __future__ import annotations

import time


class Stopwatch:
    """Writes into ``steps`` how many milliseconds each step took; a call ends a step and begins the next."""

    def __init__(self, steps: dict[str, float]) -> None:
        self._steps, self._last = steps, time.perf_counter_ns()

    def __call__(self, step: str) -> None:
        now = time.perf_counter_ns()
        self._steps[step] = (now - self._last) // 1000 / 1000
        self._last = now
