"""The parts that every cage of one process shares: launcher, journal, control groups, warm pool."""

from __future__ import annotations

import asyncio
import functools
from typing import TYPE_CHECKING

from isolator.cage.warm_pool import WarmPool
from isolator.launcher.client import Launcher
from isolator.layers.cgroup.subtree import Subtree
from isolator.recovery.journal import Journal

if TYPE_CHECKING:
    from isolator.layers.proc.drift import ProcWatch

_HANGS = 10.0
"""Seconds in which a launcher that does not hang has answered what the pool has asked it."""


class CageRuntime:
    """Shared by every cage of one process. ``keep_warm``: refill the pool after each start."""

    def __init__(
        self, launcher: Launcher | None, journal: Journal, subtree: Subtree, *, keep_warm: bool = False
    ) -> None:
        """``launcher``: None has it started by whoever needs it first, as without a cage nobody does."""
        self.journal, self.subtree, self.keep_warm = journal, subtree, keep_warm
        self.launched = asyncio.Event()
        """Set once there is a launcher."""
        self._launcher = launcher
        if launcher is not None:
            self.launched.set()
        self.pool = WarmPool(lambda: self.launcher, journal, subtree)

    @functools.cached_property
    def proc_watch(self) -> ProcWatch:
        """The watch over every cage's /proc, which a single run has no need of."""
        from isolator.layers.proc.drift import ProcWatch

        return ProcWatch()

    @property
    def present_launcher(self) -> Launcher | None:
        """The launcher, if anybody has needed one."""
        return self._launcher

    @property
    def launcher(self) -> Launcher:
        """The launcher, which is started if there is none yet, and replaced when it dies."""
        if self._launcher is None:
            self.launcher = Launcher()
        assert self._launcher is not None
        return self._launcher

    @launcher.setter
    def launcher(self, started: Launcher) -> None:
        self._launcher = started
        self.launched.set()

    def launch(self) -> None:
        """Start the launcher ahead of a cage that is expected: it loads meanwhile."""
        _ = self.launcher

    async def close(self) -> None:
        """Remove what waits in the pool, and end the launcher, also one that hangs; there is no cage any more."""
        closing = asyncio.ensure_future(self.pool.close())
        await asyncio.wait([closing], timeout=_HANGS)
        if not closing.done() and self._launcher is not None:
            self._launcher.kill()
        await closing
        self.close_launcher()

    def stop_watching(self) -> None:
        """Let go of every cage's /proc, if any was looked at."""
        if "proc_watch" in vars(self):
            self.proc_watch.mounts.close()

    def close_launcher(self) -> None:
        """End the launcher if there is one, whichever it is by then."""
        if self._launcher is not None:
            self._launcher.close()
