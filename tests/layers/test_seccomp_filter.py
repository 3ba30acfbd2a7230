"""The compiled filters answer every call as the rules say: the programs are interpreted here.

The attacks show that the kernel does the same (``isolator prove``, tests/escape).
"""

from __future__ import annotations

import itertools
import struct
from collections.abc import Iterator, Mapping, Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from isolator.broker import hardening
from isolator.layers.seccomp import layer as seccomp
from isolator.layers.seccomp.bpf import (
    AUDIT_ARCH_X86_64,
    RET_KILL_PROCESS,
    AnyBit,
    Condition,
    Equal,
    Judged,
    compile_calls,
)

ARM64 = 0xC00000B7
NO_CALL = 0xFFFFFFFF
WORD = 0xFFFFFFFF
Arguments = tuple[int, ...]
NONE: Arguments = (0,) * 6


def carry_out(program: bytes, number: int, arguments: Arguments, arch: int = AUDIT_ARCH_X86_64) -> int:
    """The program's answer; raises IndexError if it runs past its end."""
    data = [number, arch, 0, 0]
    for argument in arguments:
        data += [argument & WORD, argument >> 32]
    code = list(struct.iter_unpack("=HBBI", program))
    at = accumulator = 0
    while True:
        operation, yes, no, constant = code[at]
        at += 1
        match operation:
            case 0x20:
                accumulator = data[constant // 4]
            case 0x54:
                accumulator &= constant
            case 0x05:
                at += constant
            case 0x15:
                at += yes if accumulator == constant else no
            case 0x35:
                at += yes if accumulator >= constant else no
            case 0x45:
                at += yes if accumulator & constant else no
            case 0x06:
                return constant
            case _:
                raise AssertionError(f"operation {operation:#x}")


def holds(condition: Condition, arguments: Arguments) -> bool:
    found = arguments[condition.index] & condition.mask
    return found == condition.value if isinstance(condition, Equal) else found != 0


def expected(rules: Sequence[Judged], arguments: Arguments, otherwise: int) -> int:
    return next((r.answer for r in rules if all(holds(c, arguments) for c in r.conditions)), otherwise)


def edge_arguments(rules: Sequence[Judged]) -> Iterator[Arguments]:
    """Arguments at, beside and between the values that the rules compare with, in all combinations; and each single bit
    of one argument with those of the others."""
    values: dict[int, set[int]] = {}
    bits: dict[int, set[int]] = {}
    for condition in (one for rule in rules for one in rule.conditions):
        middle = condition.value if isinstance(condition, Equal) else condition.mask
        beside = {middle, middle - 1, middle + 1, middle | 1 << 32, middle | 1 << 63, ~condition.mask}
        values.setdefault(condition.index, {0, 1 << 32, (1 << 64) - 1}).update(one % (1 << 64) for one in beside)
        bits.setdefault(condition.index, set()).update(1 << bit for bit in range(64) if condition.mask & 1 << bit)
    for swept in (-1, *bits):
        for picked in itertools.product(*(bits[index] if index == swept else values[index] for index in values)):
            changed = dict(zip(values, picked, strict=True))
            yield tuple(changed.get(index, 0) for index in range(6))


@pytest.mark.parametrize("name", ["default", "strict", seccomp.SEALING, "broker"])
def test_a_filter_answers_as_its_rules_say(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: dict[int, Sequence[Judged]] = {}

    def noted(calls: Mapping[int, Sequence[Judged]], *, otherwise: int, arch: int) -> bytes:
        seen.update(calls)
        return compile_calls(calls, otherwise=otherwise, arch=arch)

    monkeypatch.setattr("isolator.layers.seccomp.bpf.compile_calls", noted)
    program = seccomp.compile_rules(hardening.rules()) if name == "broker" else seccomp.compile_profile(name)
    assert len(seen) > (2 if name == seccomp.SEALING else 300)
    otherwise = carry_out(program, 5000, NONE)
    for number in range(1024):
        for arguments in edge_arguments(seen.get(number, ())):
            assert carry_out(program, number, arguments) == expected(seen.get(number, ()), arguments, otherwise)
    assert len(program) // 8 < 520, "each start of a cage pays for the length"


@pytest.mark.parametrize("name", ["default", "strict", seccomp.SEALING])
def test_a_call_of_another_architecture_ends_the_process(name: str) -> None:
    program = seccomp.compile_profile(name)
    for number in (0x40000000, 0x40000001, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFE):
        assert carry_out(program, number, NONE) == RET_KILL_PROCESS
    assert carry_out(program, NO_CALL, NONE) == carry_out(program, 0x3FFFFFFF, NONE) != RET_KILL_PROCESS
    for arch in (0x40000003, ARM64, 0):  # i386 first
        for number in (0, 1, 59, NO_CALL):
            assert carry_out(program, number, NONE, arch) == RET_KILL_PROCESS


def test_a_rule_that_cannot_be_reached_is_refused() -> None:
    with pytest.raises(ValueError, match="always holds"):
        compile_calls({1: [Judged(1), Judged(2)]}, otherwise=0, arch=AUDIT_ARCH_X86_64)


words = st.one_of(st.sampled_from([0, 1, WORD, 1 << 32, (1 << 64) - 1]), st.integers(0, (1 << 64) - 1))
masks = words.filter(bool)
indices = st.integers(0, 5)
conditions = st.one_of(
    st.builds(lambda index, mask, value: Equal(index, mask, value & mask), indices, masks, words),
    st.builds(AnyBit, indices, masks),
)
answers = st.integers(1, 5)
judged = st.lists(
    st.builds(Judged, answers, st.lists(conditions, min_size=1, max_size=3).map(tuple)), min_size=1, max_size=4
)


@settings(max_examples=150, deadline=None)
@given(
    plain=st.dictionaries(st.integers(0, 600), answers, max_size=400),
    by_argument=st.dictionaries(st.integers(0, 600), judged, max_size=60),
    arch=st.sampled_from([AUDIT_ARCH_X86_64, ARM64]),
    data=st.data(),
)
def test_any_rules_are_compiled_to_what_they_say(
    plain: dict[int, int], by_argument: dict[int, list[Judged]], arch: int, data: st.DataObject
) -> None:
    calls: dict[int, Sequence[Judged]] = {number: [Judged(answer)] for number, answer in plain.items()} | by_argument
    program = compile_calls(calls, otherwise=9, arch=arch)
    for number in {0, 599, 600, 601, *calls}:
        assert carry_out(program, number, NONE, arch) == expected(calls.get(number, ()), NONE, 9)
    for number, rules in by_argument.items():
        arguments = data.draw(st.sampled_from(list(itertools.islice(edge_arguments(rules), 200))))
        assert carry_out(program, number, arguments, arch) == expected(rules, arguments, 9)


def test_long_programs_reach_their_far_ends() -> None:
    """Conditional jumps have one byte for their distance."""
    rules = [Judged(1 + number % 2, (Equal(0, WORD, number),)) for number in range(300)]
    program = compile_calls({2 * n: rules for n in range(40)}, otherwise=9, arch=AUDIT_ARCH_X86_64)
    assert len(program) // 8 > 40 * 300
    for call in (0, 1, 40, 78, 79):
        for value in (0, 1, 150, 299, 300):
            wanted = expected(rules, (value, 0, 0, 0, 0, 0), 9) if call % 2 == 0 else 9
            assert carry_out(program, call, (value, 0, 0, 0, 0, 0)) == wanted
