"""Deadlines of this host's plugins. The supervisor hears of each change, and the broker through it: all keep them.

Whoever holds plugins by a lease calls ``hold`` as the lease is extended. A plugin that is never held, lost or freed is
bound to no time. Before ``hello`` is answered, ``hold`` with a time that has passed keeps one from being started.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from isolator.ipc.body import Request
from isolator.ipc.fence import LOST, Fence
from isolator.ipc.messages import FreePlugin, HoldPlugin, LosePlugin

NO_LEASE = "it has no lease at the moment"
"""Why nothing is sent to a plugin past its deadline."""


class Fences:
    """The fence of each plugin; ``tell`` notifies the supervisor."""

    def __init__(self, tell: Callable[[Request[Any]], None]) -> None:
        self.opened: Callable[[str, bool], None] = lambda plugin, anew: None
        """Called when a plugin may act that could not; ``anew``: nothing of it has run meanwhile."""
        self.ended: Callable[[str], None] = lambda plugin: None
        """Called when a plugin is lost."""
        self._tell = tell
        self._fences: dict[str, Fence] = {}

    def of(self, plugin: str) -> Fence:
        """The fence of a plugin."""
        return self._fences.setdefault(plugin, Fence())

    def adopt(self, deadlines: Mapping[str, float]) -> None:
        """Take over the deadlines that the supervisor keeps, from a process before this one."""
        for plugin, until in deadlines.items():
            self.of(plugin).move(until)

    def hold(self, plugin: str, until: float) -> None:
        """Let a plugin act until a time of CLOCK_BOOTTIME, in seconds; each later call moves it."""
        self._move(plugin, until)
        self._tell(HoldPlugin(name=plugin, until=until))

    def bind(self, plugin: str) -> None:
        """Let a plugin that is bound to no time act on none, until it is held or freed."""
        if self.of(plugin).until is None:
            self.hold(plugin, LOST)

    def free(self, plugin: str) -> None:
        """Bind a plugin to no time any more: it is not the cluster's, or runs on all hosts."""
        self._move(plugin, None)
        self._tell(FreePlugin(name=plugin))

    def lost(self, plugin: str) -> None:
        """Let a plugin act no more, as another host may: its cages are killed, and none is started until ``hold``."""
        self._move(plugin, LOST)
        self._tell(LosePlugin(name=plugin))
        self.ended(plugin)

    def forget(self, plugin: str) -> None:
        """Forget a plugin that was removed."""
        self._move(plugin, None)
        self._fences.pop(plugin, None)

    def _move(self, plugin: str, until: float | None) -> None:
        fence = self.of(plugin)
        closed, lost = fence.closed, fence.lost
        fence.move(until)
        if closed and not fence.closed:
            self.opened(plugin, lost)
