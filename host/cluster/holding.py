"""The shards that this host holds: whoever acts on them learns of each, and of the deadline, in the log's order."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from host.cluster.clock import Handle
from host.cluster.entries import Position, Release
from host.cluster.fold import Shard, State
from host.cluster.lease import Fence

if TYPE_CHECKING:
    from host.cluster.parts import Parts

_EXTENDED = 1.0
"""Seconds by which a deadline has to have moved before those beside the host hear of it."""


class Holding:
    """Shards that the follower holds. ``fence`` is this life's."""

    def __init__(self, parts: Parts) -> None:
        self._host, self._follower, self._fences, self._clock = parts.host, parts.follower, parts.fences, parts.clock
        self.fence = Fence()
        self.epochs: dict[Shard, int] = {}
        """The shards, with their epochs."""
        self._released: set[Shard] = set()
        """Those of them that this host has given up itself."""
        self._extended: dict[str, float] = {}
        self._over = True
        self._timer: Handle | None = None

    def may_act(self, plugin: str) -> bool:
        """Whether shards of a plugin may be acted on now."""
        held = any(shard[0] == plugin and shard not in self._released for shard in self.epochs)
        return held and self.fence.may_act(self._clock.now())

    def release(self, entry: Release) -> None:
        """Act no more on a shard that is about to be released."""
        if self.epochs.get((entry.plugin, entry.shard)) == entry.epoch:
            self._released.add((entry.plugin, entry.shard))

    def keep(self, entry: Release) -> None:
        """Go on with a shard whose release was never sent."""
        self._released.discard((entry.plugin, entry.shard))

    def follow(self, state: State, *, came_back: bool) -> Iterable[Shard]:
        """Lose and take up what the state says, which has just changed; returns what was lost.

        Nothing is taken up before a decision of this life ``came_back``: until then nobody knows how old this is.
        """
        mine = {shard: one.epoch for shard, one in state.leases.items() if one.holder == self._host}
        lost = [shard for shard, epoch in self.epochs.items() if mine.get(shard) != epoch]
        for shard in lost:
            self._lose(shard, _fate_of(state, shard))
        if came_back:
            for shard, epoch in mine.items():
                if shard not in self.epochs:
                    self.epochs[shard] = epoch
                    self._released.discard(shard)
                    self._fences.hold(shard[0], self.fence.deadline)
                    self._follower.held(shard, epoch, state.positions.get(shard) or Position(*shard, epoch))
            for name in {shard[0] for shard in self.epochs}:
                if self._extended.get(name, 0.0) + _EXTENDED <= self.fence.deadline:
                    self._extended[name] = self.fence.deadline
                    self._fences.hold(name, self.fence.deadline)
            self._look()
        return lost

    def give_up(self, why: str) -> None:
        """Lose everything, and act on nothing until another life has begun."""
        self.fence = Fence()
        for shard in [*self.epochs]:
            self._lose(shard, why)
        self._look()

    def close(self) -> None:
        """Watch the deadline no more."""
        if self._timer is not None:
            self._timer.cancel()

    def _lose(self, shard: Shard, why: str) -> None:
        del self.epochs[shard]
        drained = shard in self._released
        self._released.discard(shard)
        if not drained or not any(name == shard[0] for name, _ in self.epochs):
            # The cage may have work of this shard in it, so it ends although it serves others, too. First, because a
            # delivery whose outcome came past the deadline goes back to the queue, and moves with the others.
            self._fences.lost(shard[0])
            self._extended.pop(shard[0], None)
        self._follower.lost(shard, why)

    def _look(self) -> None:
        """Note whether the deadline is over, now and when it will be."""
        now = self._clock.now()
        over = not self.fence.may_act(now)
        if over != self._over:
            self._over = over
            self._follower.fenced(over)
        self.close()
        self._timer = None if over else self._clock.call_later(self.fence.deadline - now, self._look)


def _fate_of(state: State, shard: Shard) -> str:
    lease = state.leases.get(shard)
    if lease is not None:
        return f"held by {lease.holder}"
    freed = state.freed.get(shard)
    return "released" if freed is not None and freed.drained else "freed"
