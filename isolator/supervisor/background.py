"""Which cages go first where the processor is short: those that wait for something, before those that compute.

All cages have the same share, so one that computes all the time would keep every other waiting at each wakeup, for a
slice of the scheduler's (some 3 ms). One that uses more than ``COMPUTES`` of a processor goes into the background
(``cpu.idle``, Linux 5.15): it has what no other cage wants of a processor, up to its cap as ever, and those in the
foreground interrupt it at once. Those in the background share evenly among themselves.

Who computes is seen from what the kernel has counted, a few times a second. A cage that gets nearly nothing, since
others want everything, looks like one that waits: it comes back to the foreground, and has its share for a while.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable, Iterable

from isolator.base.structs import struct_class
from isolator.layers.cgroup.leaf import IDLE, read_file
from isolator.layers.cgroup.subtree import Subtree
from isolator.linux.files import write_file

COMPUTES, RESTS = 0.1, 0.05
"""Shares of one processor: above the first a cage computes, below the second it does not any more."""
INTERVAL = 0.25
"""Seconds between two looks."""
_RESTS_FOR = 4
"""Looks at which a cage has to rest before it comes back: one that computes by fits and starts stays behind."""
_LOOKING = 50
"""Looking takes at most one part in so many of a processor, however many cages there are."""


@struct_class()
class _Seen:
    when: float
    used: float
    behind: bool
    rested: int = 0


class Background:
    """Puts the cages of one subtree into the background, and back."""

    def __init__(self, subtree: Subtree, cages: Callable[[], Iterable[str]]) -> None:
        """``cages`` returns the names of the leaves that there are. The subtree has a controller of the processor."""
        self._cages = cages
        self._cpu = subtree.v1.get("cpu", subtree.unified)
        counts = "cpuacct" in subtree.v1
        self._usage = subtree.v1["cpuacct"] if counts else subtree.unified
        self._file, self._word, self._unit = ("cpuacct.usage", 0, 1e-9) if counts else ("cpu.stat", 1, 1e-6)
        self._seen: dict[str, _Seen] = {}
        self._used, self._when = 0.0, 0.0
        self._all_before = False
        """Whether every cage is known to be in the foreground; a daemon that was reloaded does not know."""

    async def keep(self) -> None:
        """Look at the cages from now on."""
        while True:
            began = time.thread_time()
            self.look()
            await asyncio.sleep(max(INTERVAL, (time.thread_time() - began) * _LOOKING))

    def look(self) -> None:
        """Look once: at all of them together, and at each if together they compute or one is in the background."""
        now, used = time.monotonic(), self._used_by("") or 0.0
        compute = used - self._used > COMPUTES * (now - self._when)
        self._used, self._when = used, now
        if self._all_before and not compute:
            self._seen.clear()
            return
        self._seen = {name: seen for name in self._cages() if (seen := self._look_at(name)) is not None}
        self._all_before = not any(seen.behind for seen in self._seen.values())

    def _look_at(self, name: str) -> _Seen | None:
        now, used, before = time.monotonic(), self._used_by(name), self._seen.get(name)
        if used is None:
            return None
        if before is None:
            return _Seen(now, used, self._is_behind(name))
        share = (used - before.used) / (now - before.when)
        rested = before.rested + 1 if share < RESTS else 0
        behind = rested < _RESTS_FOR if before.behind else share > COMPUTES
        if behind is not before.behind:
            with contextlib.suppress(OSError):  # it has ended, or this kernel has no such file
                write_file(f"{self._cpu}/{name}/{IDLE}", str(int(behind)))
        return _Seen(now, used, behind, rested)

    def _used_by(self, name: str) -> float | None:
        """Seconds of processor time that a cage has used; None once it is gone."""
        try:
            return int(read_file(f"{self._usage}/{name}/{self._file}").split(None, 2)[self._word]) * self._unit
        except OSError:
            return None

    def _is_behind(self, name: str) -> bool:
        try:
            return read_file(f"{self._cpu}/{name}/{IDLE}").strip() == "1"
        except OSError:
            return False
