"""Sizes, shares and durations mean what people think, and are written back to the very same value."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from isolator.policy.units import (
    format_cpu,
    format_duration,
    format_size,
    parse_cpu,
    parse_duration,
    parse_size,
)


@pytest.mark.parametrize(
    ("text", "size"),
    [("64M", 64 << 20), ("1.5G", 3 << 29), ("64 MiB", 64 << 20), ("10kb", 10240), ("0", 0), (4096, 4096), ("7B", 7)],
)
def test_sizes_are_powers_of_1024(text: object, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize(
    "text", ["-64M", "64X", "M", "", "1e9", "0x10", "64M!", "0.3", None, True, 1.5, -1, "9999999T", "６４M"]
)
def test_nonsense_sizes_are_refused(text: object) -> None:
    with pytest.raises(ValueError, match=r"size|negative|whole|larger"):
        parse_size(text)


@pytest.mark.parametrize(("text", "cpu"), [("25%", 250), ("12.5%", 125), ("400%", 4000), ("0.1%", 1)])
def test_cpu_is_thousandths_of_a_core(text: str, cpu: int) -> None:
    assert parse_cpu(text) == cpu


@pytest.mark.parametrize("text", ["25", "25%%", "-25%", "0%", "0.04%", "%", 25, 0.25, None, "1e2%", "nan%"])
def test_nonsense_cpu_is_refused(text: object) -> None:
    with pytest.raises(ValueError, match=r"cpu|negative"):
        parse_cpu(text)


@pytest.mark.parametrize(("text", "seconds"), [("500ms", 0.5), ("10s", 10), ("15m", 900), ("1.5h", 5400), (3, 3.0)])
def test_durations_are_seconds(text: object, seconds: float) -> None:
    assert parse_duration(text) == seconds


@pytest.mark.parametrize("text", ["10", "10x", "-1s", "", None, True, float("nan"), float("inf"), -1, "1h30m"])
def test_nonsense_durations_are_refused(text: object) -> None:
    with pytest.raises(ValueError, match=r"duration|negative"):
        parse_duration(text)


@given(st.integers(0, 1 << 50))
def test_a_size_is_written_back_exactly(number: int) -> None:
    assert parse_size(format_size(number)) == number


@given(st.integers(1, 10_000))
def test_cpu_is_written_back_exactly(number: int) -> None:
    assert parse_cpu(format_cpu(number)) == number


@given(st.integers(0, 10**9).map(lambda millis: millis / 1000))
def test_a_duration_is_written_back_exactly(seconds: float) -> None:
    assert parse_duration(format_duration(seconds)) == seconds
