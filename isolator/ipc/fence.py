"""Fence: the deadline of a plugin, which each process of the daemon keeps by itself. Past it nothing of it may act.

Whoever may let a plugin act (a lease, say) moves its deadline on; if nobody does, no message is needed for it to end.
Times are seconds of CLOCK_BOOTTIME.
"""

from __future__ import annotations

import asyncio
import functools
import math
from collections.abc import Callable

from isolator.linux.boottime import boottime
from isolator.linux.readable import resolve

LOST = 0.0
"""A deadline that has passed for as long as the machine runs."""


class Fence:
    """The deadline of one plugin; ``until`` None: it is bound to none."""

    def __init__(self, until: float | None = None) -> None:
        self.until = until
        self.opened_at = -math.inf
        """When it was last moved on after it had passed."""
        self._stalled: list[Callable[[], None]] = []

    @property
    def closed(self) -> bool:
        """Whether the plugin may not act at this moment."""
        return self.until is not None and boottime() >= self.until

    @property
    def lost(self) -> bool:
        """Whether it is closed for good, until somebody holds the plugin anew."""
        return self.until == LOST

    def closed_since(self, then: float) -> bool:
        """Whether there was a moment since ``then`` at which it was closed."""
        return self.closed or self.opened_at >= then

    def move(self, until: float | None) -> None:
        """Set the deadline; whatever has stalled goes on if that lies ahead."""
        before = self.closed
        self.until = until
        if self.closed:
            return
        if before:
            self.opened_at = boottime()
        stalled, self._stalled = self._stalled, []
        for go_on in stalled:
            go_on()

    def stall(self, go_on: Callable[[], None]) -> None:
        """Call ``go_on`` once the deadline is moved on; it may be of no use to anybody by then."""
        self._stalled.append(go_on)

    async def opened(self) -> None:
        """Return while it is not closed."""
        while self.closed:
            opened: asyncio.Future[None] = asyncio.get_running_loop().create_future()
            self.stall(functools.partial(resolve, opened))
            await opened
