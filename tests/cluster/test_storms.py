"""Invariants of delivery under faults of every kind: what is accepted is handled, in order, by one actor, seldom twice.

In each history hosts are killed, stopped and cut off, and messages get lost, late and doubled. Bounds are small there,
so that they matter. One actor and one fold are looked at all the time (``Witness``).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest

from host.cluster.delivery import cursor, follower
from host.cluster.delivery.places import Places
from host.cluster.entries import Plugin, Position
from tests.cluster.faulty_log import Faults
from tests.cluster.queues import MOST_AT_ONCE, Hosts, Make

STORM = Faults(lost=0.03, unacknowledged=0.05, late=0.03, doubled=0.05)
ENDED, OPEN = 5, 12


@pytest.fixture(autouse=True)
def small_bounds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(follower, "MOST_ENDED", ENDED)
    monkeypatch.setattr(cursor, "MOST_OPEN", OPEN)


def _disturb(hosts: Hosts) -> None:
    """Cut off, stop or kill a host for a while, the plugin's holder more often than others."""
    chance, now = hosts.random, hosts.clock.time
    host = (hosts.holder("p") if chance.random() < 0.6 else None) or chance.choice(hosts.hosts)
    until = now + chance.choice((2, 8, 25, 40))
    fault = chance.random()
    if fault < 0.02:
        host.cut_until(until)
    elif fault < 0.04:
        host.clock.stopped_until = until
    elif fault < 0.06:
        host.down_until = until


async def _storm(hosts: Hosts, seconds: int) -> None:
    """Emit for a while under faults, then let all heal, and look at what was done."""
    chance = hosts.random
    for _ in range(seconds):
        for _ in range(chance.choice((0, 1, 2, 6))):
            host = chance.choice(hosts.hosts)
            if host.is_up and not host.clock.is_stopped:
                await hosts.emit(host, chance.choice(("a", "b", "c", None)))
        _disturb(hosts)
        for host in hosts.hosts:
            if not host.clock.is_stopped and host.is_up != (hosts.clock.time >= host.down_until):
                await (host.end() if host.is_up else host.start())
        await hosts.passes(1.0)
    await hosts.heal()
    await hosts.until(lambda: hosts.all_handled("p"))
    hosts.witness.check_order()
    repeated, moves = hosts.witness.repeated("p"), hosts.witness.moves["p"]
    assert repeated <= moves * (ENDED + MOST_AT_ONCE), f"{repeated} events were handled twice in {moves} moves"


async def _storms(make: Make, seeds: range, seconds: int = 150, shards: int = 1) -> int:
    """How often shards have moved, in these histories."""
    moves = 0
    for seed in seeds:
        hosts = make(seed, faults=replace(STORM))
        hosts.failing = hosts.rejecting = 0.05
        await hosts.start(Plugin("p", "d", shards=shards))
        await _storm(hosts, seconds)
        moves += hosts.witness.moves["p"]
        await hosts.close()
    return moves


async def test_invariants_hold_in_a_storm(make: Make) -> None:
    assert await _storms(make, range(2)) > 1


@pytest.mark.wide
@pytest.mark.parametrize("first", range(100, 140, 4))
async def test_invariants_hold_in_many_storms(make: Make, first: int) -> None:
    assert await _storms(make, range(first, first + 4), 200) > 4


@pytest.mark.wide
@pytest.mark.parametrize("first", range(200, 208, 2))
async def test_invariants_hold_in_storms_over_shards(make: Make, first: int) -> None:
    assert await _storms(make, range(first, first + 2), 200, shards=3) > 6


def _position_without_open(patch: pytest.MonkeyPatch) -> None:
    def position(self: Any) -> Position:
        return replace(whole(self), open=())

    whole = cursor.Held.position
    patch.setattr(cursor.Held, "position", position)


def _reads_although_it_is_behind(patch: pytest.MonkeyPatch) -> None:
    def offer(self: Any, reads: Sequence[Any]) -> None:
        self.behind = False
        self._go(reads)

    patch.setattr(cursor.Cursor, "offer", offer)


def _open_in_no_order(patch: pytest.MonkeyPatch) -> None:
    def of(self: Any, refs: Any) -> Any:
        return whole(self, refs)[::-1]

    whole = Places.of
    patch.setattr(Places, "of", of)


def _numbers_are_not_compared(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(cursor, "is_later", lambda *_: True)
    patch.setattr(Places, "begin", lambda _, __, ___, began: (began + 1, 0))


@pytest.mark.parametrize(
    ("ablation", "seen"),
    [
        (_position_without_open, "come about"),
        pytest.param(_reads_although_it_is_behind, "come about|of the places", marks=pytest.mark.wide),
        pytest.param(_open_in_no_order, "of the places", marks=pytest.mark.wide),
        pytest.param(_numbers_are_not_compared, "twice", marks=pytest.mark.wide),
    ],
)
async def test_each_rule_is_needed(
    make: Make,
    monkeypatch: pytest.MonkeyPatch,
    ablation: Callable[[pytest.MonkeyPatch], None],
    seen: str,
) -> None:
    ablation(monkeypatch)
    with pytest.raises(AssertionError, match=seen):
        await _storms(make, range(8))
