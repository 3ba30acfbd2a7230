"""Which cages go first where the processor is short: those that wait for something, before those that compute.

All cages have the same share, so one that computes all the time would keep every other waiting at each wakeup, for a
slice of the scheduler's (some 3 ms). So a plugin has ``SHARE`` of a processor in the foreground, on average. What it
uses above that, in all its cages, those of invocations too, is a debt. As long as it has one, its cages are in the
background (``cpu.idle``, Linux 5.15): they have what no other cage wants of a processor, up to their caps as ever, and
those in the foreground interrupt them at once. Those in the background share evenly among themselves.

So neither bursts with rests between them nor a new cage for each burst get more of the foreground. Nobody starves: a
plugin that gets nothing, since others want everything, pays its debt as one that rests does, and comes back.

What is used is seen from what the kernel has counted, a few times a second, and at the end of each cage.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections import defaultdict
from collections.abc import Callable, Iterable

from isolator.layers.cgroup.leaf import IDLE, read_file, used_by
from isolator.layers.cgroup.subtree import Subtree
from isolator.linux.files import write_file

SHARE = 0.1
"""Share of one processor that a plugin may use in the foreground on average; a debt is paid off at this rate."""
BURST, MOST = 0.025, 0.5
"""Seconds of processor time: a debt that is let pass, and the largest, which takes five seconds to pay."""
INTERVAL, AT_REST = 0.25, 1.0
"""Seconds between two looks, and while all cages together use less than a quarter of one plugin's share."""
_LOOKING = 50
"""Looking takes at most one part in so many of a processor, however many cages there are."""


class Background:
    """Puts the cages of one subtree into the background, and back."""

    def __init__(self, subtree: Subtree, cages: Callable[[], Iterable[str]]) -> None:
        """Make it of a subtree; ``cages`` returns the names of the leaves that there are, ``PLUGIN.RUN``."""
        self._subtree, self._cages, self._behind = subtree, cages, subtree.behind
        self._cpu = subtree.v1.get("cpu", subtree.unified)
        self._leaves: dict[str, float] = {}
        """Seconds that each leaf had used when each was looked at last."""
        self._states: dict[str, bool] = {}
        """Whether each leaf is in the background."""
        self._debts: dict[str, float] = {}
        self._used, self._when = used_by(self._subtree, "") or 0.0, time.monotonic()
        self._used_then = self._used
        """What all of them together had used when each was looked at last."""
        self._rest = False
        """Whether hardly anything has been used since the look before."""
        self._knows = False
        """A daemon that was reloaded does not know yet who is in the background."""

    @property
    def possible(self) -> bool:
        """Whether the subtree has a controller of the processor, and the kernel a background."""
        return (self._cpu / IDLE).exists()

    async def keep(self) -> None:
        """Look at the cages from now on."""
        while True:
            # Two hundred cages take 2 ms, for which the daemon's event loop is not to stand.
            took = await asyncio.to_thread(self._timed_look) if self._behind else self._timed_look()
            await asyncio.sleep(max(AT_REST if self._rest else INTERVAL, took * _LOOKING))

    def _timed_look(self) -> float:
        began = time.thread_time()
        self.look()
        return time.thread_time() - began

    def look(self) -> None:
        """Look once: at all of them together, and at each if together they compute or one is in the background."""
        now, used = time.monotonic(), used_by(self._subtree, "") or 0.0
        allowed, spent = SHARE * (now - self._when), used - self._used
        self._when, self._used, self._rest = now, used, spent < allowed / 4
        if self._knows and not self._behind and spent <= allowed and used - self._used_then <= BURST:
            self._share_out(allowed, {})
            return
        self._used_then = used
        self._share_out(allowed if self._knows else 0.0, self._look_at_each())
        for leaf, is_behind in self._states.items():
            if is_behind is not (wanted := plugin_of(leaf) in self._behind):
                self._states[leaf] = wanted
                with contextlib.suppress(OSError):  # it has ended
                    write_file(f"{self._cpu}/{leaf}/{IDLE}", str(int(wanted)))

    def _look_at_each(self) -> dict[str, float]:
        """Seconds that each plugin has used since the last time."""
        found = ((leaf, used_by(self._subtree, leaf)) for leaf in self._cages())
        leaves = {leaf: used for leaf, used in found if used is not None}
        # Behind the others: who ends is noted before it is removed, so one that is in neither was seen to its end.
        ended = dict(self._subtree.ended.popleft() for _ in range(len(self._subtree.ended)))
        before, self._leaves = self._leaves, leaves | ended
        self._states = {leaf: self._states[leaf] if leaf in self._states else self._is_behind(leaf) for leaf in leaves}
        if not self._knows:
            self._knows = True
            return {plugin_of(leaf): MOST for leaf, is_behind in self._states.items() if is_behind}
        spent: dict[str, float] = defaultdict(float)
        for leaf, used in (leaves | ended).items():
            spent[plugin_of(leaf)] += used - before.get(leaf, 0.0)  # a new one has used all of it since
        return spent

    def _share_out(self, allowed: float, spent: dict[str, float]) -> None:
        debts = {
            plugin: min(MOST, self._debts.get(plugin, 0.0) + spent.get(plugin, 0.0) - allowed)
            for plugin in self._debts.keys() | spent.keys()
        }
        self._debts = {plugin: debt for plugin, debt in debts.items() if debt > 0}
        self._behind.intersection_update(self._debts)
        self._behind.update(plugin for plugin, debt in self._debts.items() if debt > BURST)

    def _is_behind(self, leaf: str) -> bool:
        try:
            return read_file(f"{self._cpu}/{leaf}/{IDLE}").strip() == "1"
        except OSError:
            return False


def plugin_of(leaf: str) -> str:
    """The name before the run's: of a plugin, or of a caller of a runner, which has a dot in it."""
    return leaf.rpartition(".")[0]
