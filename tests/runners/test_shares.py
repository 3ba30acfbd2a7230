"""Shares of ``[runner]``: nobody takes more than the whole, one user no more than its part, and all comes back."""

from __future__ import annotations

import pytest

from isolator.errors import UnavailableError
from isolator.policy.host import Runner
from isolator.supervisor.runners.shares import Shares

BOUNDS = Runner(cages=4, all_tasks=100, all_memory=1 << 30, share=50)


def test_one_user_has_no_more_than_a_share_of_the_runs_and_the_others_theirs() -> None:
    shares = Shares(BOUNDS)
    first = [shares.enter(1000) for _ in range(2)]
    with pytest.raises(UnavailableError, match=r"2 of your runs .* cages in \[runner\] of host.toml"):
        shares.enter(1000)
    second = [shares.enter(1001) for _ in range(2)]
    with pytest.raises(UnavailableError, match=r"4 of the runs of all users"):
        shares.enter(1002)
    for place in (*first, *second):
        place.leave()
        place.leave()
    assert [shares.enter(uid).uid for uid in (1002, 1002, 1001, 1001)] == [1002, 1002, 1001, 1001]


def test_tasks_and_memory_are_counted_together_and_all_or_nothing() -> None:
    shares = Shares(BOUNDS)
    place = shares.enter(1000)
    with pytest.raises(UnavailableError, match=r"all_memory"):
        place.claim(tasks=10, memory=1 << 30)
    place.claim(tasks=40, memory=1 << 20)  # nothing was taken before
    other = shares.enter(1000)
    with pytest.raises(UnavailableError, match=r"11 tasks beside the 40 of your runs .* than 50, .* all_tasks"):
        other.claim(tasks=11, memory=1)
    other.claim(tasks=10, memory=1)
    place.leave()
    other.claim(tasks=40, memory=1)


def test_smallest_share_is_one() -> None:
    shares = Shares(Runner(cages=1, share=1))
    shares.enter(1000)
    with pytest.raises(UnavailableError):
        shares.enter(1001)
