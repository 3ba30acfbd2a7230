"""Reading what strangers send takes steps in proportion to its bytes, whatever they are, and ends in a known way.

Counted are the lines that the interpreter executes, which no busy machine changes. ``sudo ./dev test tests/fuzz
--fuzz 600`` looks for seconds on end, for each parser, where the default suite looks at a few patterns.
"""

from __future__ import annotations

import time

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.fuzz.parsers import PARSERS, Parser, steps

EXAMPLES = 15
FEW_LINES = 3.0
"""Lines for each byte that are nothing to be compared: what has lengths in it may end in the half already."""


def grow_no_faster_than_bytes(parser: Parser, begin: bytes, part: bytes, end: bytes) -> None:
    def made(size: int) -> bytes:
        return begin + part * (size // len(part)) + end

    steps(parser, made(64))  # what is compiled or imported once
    half, whole = steps(parser, made(parser.size // 2)), steps(parser, made(parser.size))
    assert whole <= max(2.5 * half + 2000, FEW_LINES * parser.size), (begin, part, end, half, whole)


@pytest.mark.timeout(0)
@pytest.mark.parametrize("name", PARSERS)
def test_steps_grow_no_faster_than_bytes(request: pytest.FixtureRequest, name: str) -> None:
    parser = PARSERS[name]
    end = time.monotonic() + request.config.getoption("fuzz")

    @settings(max_examples=EXAMPLES, deadline=None, database=None, suppress_health_check=list(HealthCheck))
    @given(
        begin=st.sampled_from(parser.begins),
        part=st.lists(st.one_of(st.sampled_from(parser.pieces), st.binary(min_size=1, max_size=2)),
                      min_size=1, max_size=6).map(b"".join),
        end=st.sampled_from(parser.ends),
    )  # fmt: skip
    def check(begin: bytes, part: bytes, end: bytes) -> None:
        grow_no_faster_than_bytes(parser, begin, part, end)

    while True:
        check()
        if time.monotonic() >= end:
            return


@pytest.mark.parametrize("part", [
    b"\xc0\xff\x15\x00\x00\x05\x00\x01", b"\x11\x03\xc0\xff", b"\xe3\xc0\x0c\x03", b"\xc0\x0c\x05",
])  # fmt: skip
def test_answer_with_a_record_that_is_longer_than_its_half_is_no_dear_one(part: bytes) -> None:
    parser = PARSERS["DNS answer"]
    grow_no_faster_than_bytes(parser, parser.begins[0], part, b"")


def test_work_that_grows_with_the_square_is_noticed() -> None:
    def parse(data: bytes) -> None:
        for at in range(0, len(data), 16):
            for _ in range(0, at, 64):
                pass

    with pytest.raises(AssertionError):
        grow_no_faster_than_bytes(Parser(parse, ValueError, 8192, (b"",), (b"x",)), b"", b"x", b"")
