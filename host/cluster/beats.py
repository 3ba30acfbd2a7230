"""Contents of beats: how far a host is, what it could hold and how far it is with that; its claims; its digest."""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Callable, Iterable
from typing import Final

from host.cluster.entries import Beat, Claim, Parting, Position
from host.cluster.fold import Shard, State
from host.cluster.lease import Fence, Watch
from host.cluster.parts import Parts
from host.cluster.problems import StoppedError
from isolator import __version__

CLAIMS: Final = 200
"""Claims in one message."""
POSITIONS: Final = 110_000
"""Bytes of positions in one beat, by estimate."""
REMEMBERED: Final = 4096
"""Places whose digest is known here; a beat about an earlier one says nothing."""
LASTS: Final = 5.0
"""Seconds for which another host's fold has to differ."""


class Beats:
    """The end of each message of decisions, in one life."""

    def __init__(self, parts: Parts, watch: Watch, fence: Fence, parting: Callable[[], Parting]) -> None:
        self._parts, self._watch, self._fence, self._parting = parts, watch, fence, parting
        self._positions: dict[Shard, Position] = {}
        """Positions that no beat has carried yet."""

    def rest(self) -> tuple[list[Claim | Beat], bool]:
        """The claims of the moment and the beat, the last; and whether positions are left for another."""
        parts, now = self._parts, self._parts.clock.now()
        settings, state, parting = parts.settings, parts.footing.state, self._parting()
        claims: list[Claim | Beat] = []
        if self._fence.is_steady(now) and not parting:
            claims += [state.claim(shard) for shard in self._watch.claimable(state, now)[:CLAIMS]]
        positions = self._some_positions()
        beat = Beat(
            labels=settings.labels,
            version=__version__,
            clock=parts.clock.wall(),
            place=state.place,
            digest=state.digest,
            ready=() if parting else tuple(parts.follower.ready()),
            lacking=() if parting else tuple(parts.follower.lacking()),
            positions=tuple(positions),
            parting=parting,
        )
        return [*claims, beat], bool(self._positions)

    def due(self, since: float) -> float:
        """The first time after ``since`` at which there may be more to claim, by this host's clock."""
        steady = self._fence.steady_at
        return min(self._watch.due(self._parts.footing.state, since), steady if steady > since else math.inf)

    def drop(self, shards: Iterable[Shard]) -> None:
        """Carry no position of shards that were lost."""
        for shard in shards:
            self._positions.pop(shard, None)

    def forget(self) -> None:
        """Carry no position that is known now."""
        self._positions.clear()

    def _some_positions(self) -> list[Position]:
        self._positions |= {(one.plugin, one.shard): one for one in self._parts.follower.positions()}
        found: list[Position] = []
        size = 0
        for shard, position in [*self._positions.items()]:
            size += 200 + 110 * (len(position.read) + len(position.open))
            if found and size > POSITIONS:
                break
            found.append(self._positions.pop(shard))
        return found


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
