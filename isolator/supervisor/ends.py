"""Ends of a plugin's runs: how each ended, and what they add up to, a pause or giving up."""

from __future__ import annotations

import time
from collections import deque
from typing import TYPE_CHECKING

from isolator.base.pacing import Backoff
from isolator.base.structs import field, struct_class
from isolator.cage.processes import CageExit
from isolator.ipc.messages import Origin
from isolator.supervisor.run import NO_ANSWER, NO_SOCKET

if TYPE_CHECKING:
    from isolator.policy.model import RestartPolicy

_BACKOFF_SPREAD = 0.2
_ONCE = "a program that runs once for each event has the mode exec"


@struct_class(frozen=True)
class Ended:
    """End of a run, or of its start: then ``exit`` is None and ``problem`` the reason."""

    run: str
    exit: CageExit | None
    origin: Origin
    problem: str = ""
    counts: bool = False
    """It counts for giving the plugin up."""
    hopeless: bool = False
    """No further attempt helps before an operator has agreed to something."""
    up: bool = True
    """Its socket had been there, or its first answer."""

    @property
    def why(self) -> str:
        """How it ended, in words."""
        end = self.exit
        if self.problem or end is None:
            return self.problem or "did not start"
        if end.cause in ("exit", "signal"):
            how = f"exit code {end.exit_code}" if end.signal is None else f"killed by signal {end.signal}"
            once = f"; {_ONCE}" if end.exit_code == 0 else ""
            return how if self.up else f"{how} before it was up{once}"
        if end.cause.startswith((NO_SOCKET, NO_ANSWER)):
            where = ", nothing listens on PLUGIN_SOCKET or PLUGIN_PORT" if end.cause.startswith(NO_SOCKET) else ""
            return f"{end.cause}{where}; raise start_timeout in [restart] of its policy if it needs longer"
        return end.cause


@struct_class()
class Ends:
    """The ends of one plugin's runs that nobody wanted."""

    times: deque[float] = field(default_factory=deque)
    """Of those of its own doing, in the window: the pauses grow with them."""
    others: int = 0
    """Those since it last ran that were the daemon's or the operator's doing."""
    crashes: deque[float] = field(default_factory=deque)
    """Times of those that count for giving up."""

    def forget(self) -> None:
        """Begin anew."""
        self.times.clear()
        self.others = 0
        self.crashes.clear()

    def note(self, ended: Ended, window: float) -> None:
        """Count an end; those of longer ago than ``window`` seconds count no more."""
        now = time.monotonic()
        if ended.origin == Origin.PLUGIN:
            self.times.append(now)
        else:
            self.others += 1
        if ended.counts:
            self.crashes.append(now)
        for times in (self.times, self.crashes):
            while times and now - times[0] > window:
                times.popleft()

    def pause(self, limits: RestartPolicy) -> float:
        """Seconds to the next start."""
        backoff = Backoff(limits.backoff_min, limits.backoff_max, spread=_BACKOFF_SPREAD)
        return backoff.after(len(self.times) + self.others - 1)
