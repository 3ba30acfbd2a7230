"""Alarms of the supervisor: lines that a person has to see, in the daemon's log and in every listing of alarms."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from typing import Any

from isolator.audit.client import AuditClient, utc_now
from isolator.audit.schema import ServiceEnded
from isolator.base.pacing import TokenBucket
from isolator.errors import UnavailableError, printable

logger = logging.getLogger(__name__)

STANDS = 3600.0
"""Seconds for which an alarm is shown after its cause is over."""
_MOST, _LONGEST, _LONGEST_WORK = 16, 1000, 200
_FAULTS_AT_ONCE, _FAULTS_PER_SECOND = 20, 1 / 60
"""Records of failures within this process: one that is repeated for ever must not fill the trail."""


class Alarms:
    """The present alarms. ``on_change`` is called with all their lines, oldest first."""

    def __init__(self, on_change: Callable[[tuple[str, ...]], None] = lambda _: None) -> None:
        self.on_change = on_change
        self._lines: dict[str, str] = {}
        self._ends: dict[str, asyncio.TimerHandle] = {}

    @property
    def lines(self) -> tuple[str, ...]:
        """The alarms at this moment, oldest first."""
        return tuple(self._lines.values())

    def hand_over(self) -> dict[str, str]:
        """The lines by their keys, for ``adopt``."""
        return dict(self._lines)

    @property
    def ends(self) -> dict[str, float]:
        """Loop times at which those end whose cause is over, by key."""
        return {key: end.when() for key, end in self._ends.items()}

    def adopt(self, before: dict[str, str], ends: dict[str, float]) -> None:
        """Show the alarms from before this process's exec, until their ``ends``.

        Whether a cause that was not over is so by now shows; until then that one stands.
        """
        loop = asyncio.get_running_loop()
        self._lines = dict(before)
        for key in before:
            self._ends[key] = loop.call_at(ends.get(key, loop.time() + STANDS), self._drop, key)

    def raise_(self, key: str, line: str) -> None:
        """Show a line, in place of the one that ``key`` had, until ``settle``."""
        line = printable(line)[:_LONGEST]
        self._keep_until_settled(key)
        if self._lines.get(key) == line:
            return
        logger.critical("ALARM: %s", line)
        self._lines.pop(key, None)
        while len(self._lines) >= _MOST:
            oldest = next(iter(self._lines))
            self._keep_until_settled(oldest)
            del self._lines[oldest]
        self._lines[key] = line
        self.on_change(self.lines)

    def settle(self, key: str, after: float = STANDS) -> None:
        """Let an alarm whose cause is over end ``after`` some seconds, at once for 0; nothing if there is none.

        One that is about to end does so at the earlier of both times.
        """
        if key not in self._lines:
            return
        loop = asyncio.get_running_loop()
        known = self._ends.get(key)
        if known is not None and known.when() <= loop.time() + after:
            return
        self._keep_until_settled(key)
        if after > 0:
            self._ends[key] = loop.call_later(after, self._drop, key)
        else:
            self._drop(key)

    def close(self) -> None:
        """Forget every alarm."""
        for key in list(self._ends):
            self._keep_until_settled(key)
        self._lines.clear()

    def _drop(self, key: str) -> None:
        del self._lines[key]
        self._ends.pop(key, None)
        self.on_change(self.lines)

    def _keep_until_settled(self, key: str) -> None:
        end = self._ends.pop(key, None)
        if end is not None:
            end.cancel()


class ServiceHealth:
    """Ends of the daemon's own processes, on record, and in an alarm when one hung or does not come up."""

    def __init__(self, alarms: Alarms, audit: AuditClient) -> None:
        self.alarms, self._audit = alarms, audit
        self._records = TokenBucket(_FAULTS_PER_SECOND, _FAULTS_AT_ONCE)

    def hangs(self, name: str, silent: UnavailableError) -> None:
        """Note that a process does not answer and is replaced."""
        self.alarms.raise_(name, f"{name}: {silent.why}; it is replaced ({utc_now()[:19]}Z)")

    def ended(self, name: str, why: str, *, hung: bool) -> None:
        """Note the end of a process that should have gone on."""
        self._audit.record(ServiceEnded(service=name, why=why, hung=hung))

    def work_failed(self, loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        """Note that a task, a thread or a callback of this process failed: the event loop's exception handler."""
        loop.default_exception_handler(context)
        message, error = str(context.get("message")), context.get("exception")
        work = printable(str(context.get("work") or message))[:_LONGEST_WORK]
        why = message if error is None else f"{type(error).__name__}: {error}"
        self.alarms.raise_(f"work {work}", message if error is None else f"{message} ({why})")
        self.alarms.settle(f"work {work}")
        if self._records.try_take():
            self._audit.record(ServiceEnded(service=f"supervisor: {work}", why=printable(why)[:_LONGEST], hung=False))

    def does_not_start(self, name: str, error: Exception) -> None:
        """Note that a process does not come up."""
        self.alarms.raise_(f"{name} down", f"{name} does not start: {error}")

    def is_up(self, name: str) -> None:
        """Note that a process is there again."""
        self.alarms.settle(name)
        self.alarms.settle(f"{name} down", 0.0)
