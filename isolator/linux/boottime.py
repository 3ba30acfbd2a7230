"""CLOCK_BOOTTIME: one clock for all processes, that no administrator sets and that goes on while the machine sleeps."""

from __future__ import annotations

import contextlib
import os
import struct
import time

from isolator.linux._libc import call, libc

_ABSOLUTE = 1
_FAR = 9e9  # in nanoseconds they just fit
_TIMES = struct.Struct("@4l")
"""``struct itimerspec``: the interval, then the first time, each in seconds and nanoseconds."""


def boottime() -> float:
    """Seconds of CLOCK_BOOTTIME."""
    return time.clock_gettime(time.CLOCK_BOOTTIME)


class BootAlarm:
    """An alarm on that clock (timerfd_create(2)); ``fileno`` is readable once its time has come.

    A timer of an event loop is of CLOCK_MONOTONIC: after a sleep of the machine it is late by as much.
    """

    def __init__(self) -> None:
        flags = os.O_NONBLOCK | os.O_CLOEXEC
        self._fd = call(libc.timerfd_create, "timerfd_create", time.CLOCK_BOOTTIME, flags)

    def fileno(self) -> int:
        return self._fd

    def set(self, at: float | None) -> None:
        """Go off at that time, once, at once if it has passed; None: not at all."""
        # Zero would mean never.
        nanoseconds = max(int(min(at, _FAR) * 1e9), 1) if at is not None else 0
        times = _TIMES.pack(0, 0, *divmod(nanoseconds, 1_000_000_000))
        call(libc.timerfd_settime, "timerfd_settime", self._fd, _ABSOLUTE, times, None)

    def clear(self) -> None:
        """Take note that it has gone off."""
        with contextlib.suppress(BlockingIOError):
            os.read(self._fd, 8)

    def close(self) -> None:
        os.close(self._fd)
