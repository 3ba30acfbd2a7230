"""Whether this host's fold is that of the others: beats carry a place and the fold's digest there."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable
from typing import Final

from host.cluster.entries import Beat
from host.cluster.fold import State
from host.cluster.problems import StoppedError

REMEMBERED: Final = 4096
"""Places whose digest is known here; a beat about an earlier one says nothing."""
LASTS: Final = 5.0
"""Seconds for which another host's fold has to differ."""


class Agreement:
    """The digests of this host's fold, and which hosts have had another, since when."""

    def __init__(self) -> None:
        self._digests: OrderedDict[int, str] = OrderedDict()
        self._differs: dict[str, float] = {}

    def folded(self, state: State) -> None:
        """Remember the digest at the state's place."""
        self._digests[state.place] = state.digest
        if len(self._digests) > REMEMBERED:
            self._digests.popitem(last=False)

    def compare(self, host: str, beat: Beat, alive: Iterable[str], now: float) -> bool:
        """Compare another host's; whether it is the same, as far as one can tell.

        Raises StoppedError if half of the hosts that are ``alive``, or more, have had another for a while: a log that
        lost its newest entries is not noticed by all at once. One that lies, or whose disk does, is alone with it.
        """
        known = self._digests.get(beat.place)
        if known is None:
            return True
        if known == beat.digest:
            self._differs.pop(host, None)
            return True
        self._differs.setdefault(host, now)
        living = {*alive}
        differing = sorted(one for one, since in self._differs.items() if now - since >= LASTS and one in living)
        if differing and 2 * len(differing) >= len(living):
            raise StoppedError(
                "diverged",
                f"the log means something else to {', '.join(differing[:5])} than to this host: a host or a server is "
                "damaged; this host holds nothing until its daemon is started again",
            )
        return False
