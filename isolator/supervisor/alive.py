"""Whether another process of the daemon still answers: deadlines that follow its progress, not the clock.

A process that is slow on an overloaded host makes progress: it uses CPU time, and the scheduler lets it run. One that
is stopped or waits for something that never comes makes none. Time counts in ticks of this process's own event loop:
while this process sleeps (SIGSTOP, a paused machine) nobody's deadline passes.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from typing import Any, TypeVar

from isolator.errors import IsolatorError, UnavailableError

T = TypeVar("T")

TICK = 2.0
"""Seconds between two looks at the other's progress."""
STILL_TICKS = 10
"""A process that has not answered and made no progress for so many ticks hangs."""
BUSY_TICKS = 60
"""One that has not answered for so many ticks hangs, however busy it is."""
START_TICKS = 450
"""The same for its first answer: it may have to read a long trail, or bring a database up to date."""
EVERY = 5.0
"""Seconds between two questions, at most. All processes are asked at the same moment: this one wakes up once."""


async def answered(work: Awaitable[T], pid: int, name: str, *, ticks: int = START_TICKS) -> T:
    """Wait for the answer of a process while it makes progress, ``ticks`` at most; raises UnavailableError."""
    task = asyncio.ensure_future(work)
    before, still = _progress(pid), 0
    try:
        for _ in range(ticks):
            await asyncio.wait({task}, timeout=TICK)
            if task.done():
                return task.result()
            now = _progress(pid)
            before, still = now, still + 1 if now == before else 0
            if still >= STILL_TICKS:
                break
        why = (
            f"does not answer, and has done nothing for {still * TICK:g} s" if still else "is busy and does not answer"
        )
        raise UnavailableError(name, why, "see the daemon's log")
    finally:
        if not task.done():
            task.cancel()
            await asyncio.wait({task})


async def until_silent(
    closed: asyncio.Event, ask: Callable[[], Awaitable[Any]], pid: int, name: str
) -> UnavailableError | None:
    """Ask a process again and again whether it is alive; returns the reason when it hangs, None once it is gone."""
    while not closed.is_set():
        try:
            async with asyncio.timeout(EVERY - asyncio.get_running_loop().time() % EVERY):
                await closed.wait()
        except TimeoutError:
            try:
                await answered(ask(), pid, name, ticks=BUSY_TICKS)
            except UnavailableError as error:
                return None if closed.is_set() else error
            except IsolatorError:
                pass  # a refusal is an answer, too
    return None


def _progress(pid: int) -> int:
    """Nanoseconds of processor time that a process has used, which are more whenever it has run; -1 once it is gone.

    The clock is that of clock_getcpuclockid(3), which Python does not have; to read it opens nothing.
    """
    try:
        return time.clock_gettime_ns(~pid << 3 | 2)
    except OSError:
        return -1
