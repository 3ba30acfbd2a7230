"""Pauses and rates: what they promise over any sequence of calls, on a clock that the test turns."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from isolator.base.pacing import Backoff, TokenBucket


def test_pauses_double_up_to_the_longest_and_begin_anew_after_a_reset() -> None:
    backoff = Backoff(0.1, 0.5)
    assert [backoff.next() for _ in range(5)] == [0.1, 0.2, 0.4, 0.5, 0.5]
    backoff.reset()
    assert backoff.next() == 0.1


def test_a_spread_stays_within_its_fraction_and_differs() -> None:
    backoff = Backoff(1.0, 60.0, spread=0.2)
    pauses = [backoff.after(3) for _ in range(200)]
    assert all(6.4 <= pause <= 9.6 for pause in pauses)
    assert len(set(pauses)) > 100


def test_no_number_of_failures_overflows() -> None:
    assert Backoff(0.5, 60.0).after(100_000) == 60.0


@given(
    rate=st.floats(0.5, 1000), burst=st.floats(1, 1000),
    steps=st.lists(st.tuples(st.floats(0, 5), st.integers(0, 50)), max_size=30),
)  # fmt: skip
def test_never_more_than_the_burst_and_the_rate_allow(
    rate: float, burst: float, steps: list[tuple[float, int]]
) -> None:
    now = 0.0
    bucket = TokenBucket(rate, burst, clock=lambda: now)
    taken = 0
    for pause, tries in steps:
        now += pause
        taken += sum(bucket.try_take() for _ in range(tries))
        assert taken <= burst + rate * now + 1e-6


def test_credit_is_paid_back_at_the_rate() -> None:
    now = 0.0
    bucket = TokenBucket(10.0, 5.0, clock=lambda: now)
    assert bucket.take(5) == 0.0
    assert bucket.take(20) == 2.0
    now = 1.0
    assert bucket.tokens == -10.0
    assert not bucket.try_take()
    assert bucket.until(2) == 1.2
    assert bucket.until(50) == bucket.until(5) == 1.5  # it never has more than the burst
    now = 2.5
    assert bucket.tokens == 5.0
    assert bucket.until(5) == 0.0
