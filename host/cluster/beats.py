"""Contents of this host's beats: how far it is, what it could hold and how far it is with that; and its claims."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Final

from host.cluster.entries import Beat, Claim, Parting, Position
from host.cluster.fold import Shard
from host.cluster.lease import Fence, Watch
from host.cluster.parts import Parts

CLAIMS: Final = 200
"""Claims in one message."""
POSITIONS: Final = 110_000
"""Bytes of positions in one beat, by estimate."""


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
            version=settings.version,
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
