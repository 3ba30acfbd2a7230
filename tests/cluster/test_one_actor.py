"""At most one host acts on a shard at any moment, whatever the network, the clocks and the processes do."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from host.cluster import fold, lease
from tests.cluster.simulation import Cluster
from tests.support.timeouts import seconds

STEPS = 800
"""Quarters of a second: 200 s, about ten times the time after which a silent host loses its shards."""


def _run(seeds: range) -> int:
    moves = 0
    for seed in seeds:
        cluster = Cluster(seed)
        for _ in range(STEPS):
            cluster.step()
        moves += cluster.moves
    return moves


def test_one_host_acts_on_a_shard_and_shards_do_move() -> None:
    assert _run(range(12)) > 20


@pytest.mark.wide
@pytest.mark.timeout(seconds(1800))
def test_one_host_acts_on_a_shard_in_many_histories() -> None:
    assert _run(range(100, 700)) > 1000


def _short_silence(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(lease, "SILENCE", 8.0)


def _deadline_from_reading(patch: pytest.MonkeyPatch) -> None:
    def read_back(self: lease.Fence, number: Any, now: float) -> None:
        whole(self, number, now)
        self.deadline = now + lease.HOLD

    whole = lease.Fence.read_back
    patch.setattr(lease.Fence, "read_back", read_back)


def _long_hold(patch: pytest.MonkeyPatch) -> None:
    def may_act(self: lease.Fence, now: float) -> bool:
        return now < self.deadline + 12

    patch.setattr(lease.Fence, "may_act", may_act)


def _claims_cite_nothing(patch: pytest.MonkeyPatch) -> None:
    def claim(self: Any, claim: Any) -> str:
        expected = self._state.claim((claim.plugin, claim.shard)) if claim.plugin in self._state.plugins else claim
        return whole(self, replace(claim, cited=expected.cited))

    whole = fold._Folding._claim
    patch.setattr(fold._Folding, "_claim", claim)


def _freed_at_once(patch: pytest.MonkeyPatch) -> None:
    def free(self: Any, shard: Any, *, drained: bool) -> None:
        whole(self, shard, drained=True)

    whole = fold._Folding._free
    patch.setattr(fold._Folding, "_free", free)


@pytest.mark.parametrize(
    ("ablation", "seed"),
    [
        (_short_silence, 0),
        (_deadline_from_reading, 0),
        (_long_hold, 0),
        (_claims_cite_nothing, 280),
        (_freed_at_once, 80),
    ],
)
def test_each_rule_is_needed(
    monkeypatch: pytest.MonkeyPatch, ablation: Callable[[pytest.MonkeyPatch], None], seed: int
) -> None:
    ablation(monkeypatch)
    with pytest.raises(AssertionError, match=r"acts? on"):
        _run(range(seed, seed + 400))
