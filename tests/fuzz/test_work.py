"""Reading what strangers send takes steps in proportion to its bytes, whatever they are, and ends in a known way.

Counted are the lines that the interpreter executes, which no busy machine changes. ``sudo ./dev test tests/fuzz
--fuzz 600`` looks for seconds on end, for each parser, where the default suite looks at a few patterns.
"""

from __future__ import annotations

import time

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.fuzz.parsers import PARSERS, steps

EXAMPLES = 15


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
        def made(size: int) -> bytes:
            return begin + part * (size // len(part)) + end

        steps(parser, made(64))  # what is compiled or imported once
        half, whole = steps(parser, made(parser.size // 2)), steps(parser, made(parser.size))
        assert whole <= 2.5 * half + 2000, (begin, part, end, half, whole)

    while True:
        check()
        if time.monotonic() >= end:
            return
