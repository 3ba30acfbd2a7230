"""Invocations (runs of plugins with the mode ``exec``) as the trail tells of them, for those who follow it."""

from __future__ import annotations

from collections import Counter, defaultdict
from typing import TYPE_CHECKING, Any

from isolator.audit.schema import ExecEnded, ExecStarted, HostStarted

if TYPE_CHECKING:
    from collections.abc import Mapping

TYPES = (ExecStarted.TYPE, ExecEnded.TYPE, HostStarted.TYPE)
MOST = 4096
"""Invocations that are kept; the oldest makes room, whose end was not seen."""


class Invocations:
    """The invocations under way, and what those that ended have used since this follower began."""

    def __init__(self) -> None:
        self._running: dict[str, tuple[str, int]] = {}
        """Plugin and pid by run."""
        self._used: defaultdict[str, Counter[str]] = defaultdict(Counter)

    def take(self, type: str, plugin: str | None, run: str | None, data: Mapping[str, Any]) -> None:
        """Take a record of one of ``TYPES``."""
        if type == HostStarted.TYPE:
            self._running.clear()  # none outlives the daemon
        elif plugin is None or run is None:
            return
        elif type == ExecStarted.TYPE:
            while len(self._running) >= MOST:
                del self._running[next(iter(self._running))]
            self._running[run] = plugin, _number(data.get("pid"))
        elif type == ExecEnded.TYPE:
            self._running.pop(run, None)
            used = self._used[plugin]
            for field in ("cpu_us", "network_bytes"):
                used[field] += _number(data.get(field))

    def of(self, plugin: str) -> dict[str, int]:
        """The pids of a plugin's invocations under way, by run."""
        return {run: pid for run, (name, pid) in tuple(self._running.items()) if name == plugin}

    def used(self, plugin: str) -> Mapping[str, int]:
        """``cpu_us`` and ``network_bytes`` of those that have ended."""
        return self._used.get(plugin, {})


def _number(value: object) -> int:
    return value if isinstance(value, int) else 0
