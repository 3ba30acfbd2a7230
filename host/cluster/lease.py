"""Time in a cluster: how long this host may act on what it holds, and when it may claim what another one held.

Both rest on one clock of this host alone (CLOCK_BOOTTIME, which goes on while the machine sleeps), never on another's.
A host's deadline is ``HOLD`` after it *first sent* the newest decision of its own that it has read back; it counts
from the sending, so a slow log only shortens it. Another host claims when it has read nothing new of the holder for
``SILENCE``, and cites the last that it read.
If the holder's next decision stands before the claim, the claim is void; if it comes after, the holder reads the claim
first. The cited one was sent at least ``SILENCE`` before the claim, so the holder's deadline has been over for
``SILENCE - HOLD``, whatever was delayed.
"""

from __future__ import annotations

import math
from typing import Final

from host.cluster.entries import Beat, Number, Plugin
from host.cluster.fold import Freed, Lease, Shard, State
from host.cluster.placement import pick

BEAT: Final = 2.0
"""Seconds between two beats of a host."""
HOLD: Final = 12.0
"""Seconds for which a host may act after it sent what it has read back."""
SILENCE: Final = 17.0
"""Seconds without a new decision of a host after which others may claim its shards."""
STEADY: Final = 4.0
"""Seconds for which a host's own beats must have come back before it claims: an outage of the log moves nothing."""
_LATE: Final = BEAT + 1.0


class Fence:
    """The deadline of this host. Times are those of ``boottime``."""

    def __init__(self) -> None:
        self.deadline = 0.0
        self._sent: dict[Number, float] = {}
        self._back: float | None = None
        self._steady_since: float | None = None

    def sending(self, number: Number, now: float) -> None:
        """Note that a decision is about to be sent; when it is sent again the first time counts."""
        self._sent.setdefault(number, now)

    def read_back(self, number: Number, now: float) -> None:
        """Note that this host's decision has been read from the log; what it sent later came back no sooner."""
        at = self._sent.get(number)
        if at is None:
            return  # of a session before this one
        self.deadline = max(self.deadline, at + HOLD)
        self._sent = {later: since for later, since in self._sent.items() if later > number}
        if self._back is None or now - self._back > _LATE or now - at > _LATE:
            self._steady_since = now
        self._back = now

    def may_act(self, now: float) -> bool:
        """Whether what this host holds may be acted on."""
        return now < self.deadline

    def is_steady(self, now: float) -> bool:
        """Whether this host's beats have come back in time for a while."""
        if self._back is None or self._steady_since is None:
            return False
        return now - self._back <= _LATE and now >= self.steady_at

    @property
    def steady_at(self) -> float:
        """From when this host's beats have come back for long enough, if they go on so."""
        return self._steady_since + STEADY if self._steady_since is not None else math.inf


class Watch:
    """Entries that this host has read of the others, and when. Times are those of ``boottime``."""

    def __init__(self, host: str, now: float) -> None:
        self._host, self._began = host, now
        self._heard: dict[str, tuple[Number, float]] = {}
        self._freed: dict[Shard, tuple[int, float]] = {}
        self._leases: dict[Shard, Lease] = {}
        self._taken: dict[Shard, float] = {}
        """Until when the host may act from which another took a shard, which need not have waited for that."""

    def look(self, state: State, now: float) -> None:
        """Note what is new in the state; to be called after each message that was folded."""
        for host, member in state.members.items():
            if self._heard.get(host, (None,))[0] != member.decisions:
                self._heard[host] = (member.decisions, now)
        known = self._freed
        self._freed = {
            shard: known[shard] if known.get(shard, (0,))[0] == freed.place else (freed.place, now)
            for shard, freed in state.freed.items()
        }
        for shard, before in self._leases.items():
            lease = state.leases.get(shard)
            if lease is not None and before.holder not in (lease.holder, self._host):
                self._taken[shard] = self._silent_at(before.holder)
        self._leases = dict(state.leases)
        self._taken = {shard: at for shard, at in self._taken.items() if at > now}

    def is_silent(self, host: str, now: float) -> bool:
        """Whether nothing new has come of a host for ``SILENCE``."""
        return now >= self._silent_at(host)

    def _silent_at(self, host: str) -> float:
        return self._heard.get(host, (None, self._began))[1] + SILENCE

    def due(self, state: State, since: float) -> float:
        """The first time after ``since`` at which nobody may act on some shard any more, as far as is known now."""
        times = [self._silent_at(lease.holder) for lease in state.leases.values() if lease.holder != self._host]
        times += [self._free_at(shard, freed) for shard, freed in state.freed.items()]
        return min((one for one in times if one > since), default=math.inf)

    def alive(self, state: State, now: float) -> list[str]:
        """The hosts that are not silent, this one among them."""
        return [host for host in state.members if host == self._host or not self.is_silent(host, now)]

    def claimable(self, state: State, now: float) -> list[Shard]:
        """The shards that this host should claim: it is their place, and nobody may act on them any more."""
        found = []
        alive = {host: Said(state.member(host).beat) for host in self.alive(state, now)}
        for name, known in state.plugins.items():
            if known.plugin.placement != "one":
                continue
            ready = [host for host, said in alive.items() if said.fits(known.plugin)]
            for number in range(known.plugin.shards):
                shard = (name, number)
                if self._is_free(state, shard, now) and pick(shard, ready) == self._host:
                    found.append(shard)
        return found

    def _is_free(self, state: State, shard: Shard, now: float) -> bool:
        lease = state.leases.get(shard)
        if lease is not None:
            return lease.holder != self._host and self.is_silent(lease.holder, now)
        freed = state.freed.get(shard)
        return freed is None or now >= self._free_at(shard, freed)

    def _free_at(self, shard: Shard, freed: Freed) -> float:
        if freed.drained:
            return self._taken.get(shard, self._began)
        return self._freed.get(shard, (0, self._began))[1] + SILENCE


class Said:
    """A host's beat, which may be long, as each plugin is looked for in it."""

    def __init__(self, beat: Beat) -> None:
        self.ready, self.lacking, self.labels = {*beat.ready}, {*beat.lacking}, {*beat.labels}

    def fits(self, plugin: Plugin) -> bool:
        """Whether the host could hold a plugin."""
        return plugin.name in self.ready and self.labels.issuperset(plugin.labels)


def could_hold(state: State, host: str, name: str) -> bool:
    """Whether a host has said that it could hold a plugin, and has the labels that this one wants."""
    return Said(state.member(host).beat).fits(state.plugins[name].plugin)
