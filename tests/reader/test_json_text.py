"""Reading a manifest takes time in proportion to its size, whatever is in it."""

from __future__ import annotations

import os
import resource
import signal

from hypothesis import example, given, settings
from hypothesis import strategies as st

from isolator.errors import UsageError
from isolator.policy.request import MAX_BYTES
from isolator.reader.manifest import parse_manifest_core

CPU_SECONDS = 10
"""Quadratic reading of the largest manifest takes minutes; ours takes less than one."""


def reads_in_proportion(text: bytes) -> bool:
    """Whether a child with a bound on its processor time (not on the clock's) gets through with a manifest."""
    child = os.fork()
    if child == 0:
        try:
            used = resource.getrusage(resource.RUSAGE_SELF)
            most = int(used.ru_utime + used.ru_stime) + CPU_SECONDS
            resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
            resource.setrlimit(resource.RLIMIT_CPU, (most, most))
            parse_manifest_core(text)
        except UsageError:
            os._exit(0)
        finally:
            os._exit(0)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert code in (0, -signal.SIGKILL, -signal.SIGXCPU)
    return code == 0


@settings(max_examples=25, deadline=None)
@given(
    begin=st.sampled_from(['{"a": "', '{"', "{", "[", ""]),
    part=st.text('"\\{}[]:,\n eE+-.19xé', min_size=1, max_size=5),
    end=st.sampled_from(["", '"', '"}', "\n}"]),
)
@example('{"a": "', '\\"', "")
@example('{"a": "', '"\\', "")
@example('{"a": ', "1" * 299 + ",", "}")
@example("{", '"a', "\\")
def test_largest_manifest_of_any_pattern_is_read_in_proportion_to_its_size(begin: str, part: str, end: str) -> None:
    text = f"{begin}{part * (MAX_BYTES // len(part.encode()))}".encode()[: MAX_BYTES - len(end)] + end.encode()
    assert reads_in_proportion(text), (begin, part, end)


def test_values_are_bounded_in_number() -> None:
    many = b'{"a": [' + b"0," * 30_000 + b"0]}"
    try:
        parse_manifest_core(many)
    except UsageError as error:
        assert "more than 20000 keys and values" in str(error)
    else:
        raise AssertionError("it was read")
