"""Plugins of a cluster that another host holds: what only that host can do is refused here, with its name.

Registration, policy, grants, config and approved tools are each host's own, so they change here whoever holds the
plugin. Its runs and its deliveries are the holder's.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from isolator.errors import UnavailableError


class Elsewhere:
    """``holders`` names the other hosts that hold a plugin of which this one holds nothing."""

    def __init__(self, holders: Callable[[str], Sequence[str]] = lambda _: ()) -> None:
        self.holders = holders

    def check(self, plugin: str, why: str, remedy: str = "") -> None:
        """Raise UnavailableError for a plugin that another host holds: ``why`` this takes that host, and what to do."""
        holders = self.holders(plugin)
        if holders:
            names = ", ".join(holders)
            remedy = remedy.format(names) or f"run it on {names}"
            raise UnavailableError(f"plugin {plugin}", f"is held by {names}: {why}", remedy)
