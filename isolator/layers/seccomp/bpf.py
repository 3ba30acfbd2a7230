"""Compiles system-call rules to classic BPF (seccomp(2)): small programs, because each start of a cage loads one.

libseccomp knows the calls' numbers; its own generator needs six times as many instructions for the same profile, since
it has no "otherwise" (each set of values needs the masked values of all others), and the kernel, which checks,
translates and tries a program out when it is loaded, takes longer for each.

The program: the architecture; the number, by a binary search among ranges of calls that are answered alike; for a call
that is judged by its arguments, its rules in their order. Arguments are compared in halves of 32 bits, as BPF has it.
"""

from __future__ import annotations

import struct
import sys
from collections.abc import Mapping, Sequence
from itertools import groupby

from isolator.base.structs import field, struct_class

AUDIT_ARCH_X86_64 = 0xC000003E
RET_KILL_PROCESS = 0x80000000

_LOAD, _AND, _RETURN = 0x20, 0x54, 0x06  # a word at a place; with a constant; a constant
_JUMP, _EQUAL, _AT_LEAST, _ANY_BIT = 0x05, 0x15, 0x35, 0x45
_NUMBER, _ARCH, _ARGUMENTS = 0, 4, 16  # places in struct seccomp_data
_LOW, _HIGH = (0, 4) if sys.byteorder == "little" else (4, 0)
_WORD = 0xFFFFFFFF
_X32, _NO_CALL = 0x40000000, 0xFFFFFFFF  # x32's calls start there; -1 is what a tracer puts to skip a call
_FARTHEST = 255  # of a conditional jump, in instructions


@struct_class(frozen=True)
class Equal:
    """Argument ``index`` under ``mask`` equals ``value``."""

    index: int
    mask: int
    value: int


@struct_class(frozen=True)
class AnyBit:
    """Argument ``index`` has at least one bit of ``mask``."""

    index: int
    mask: int


Condition = Equal | AnyBit


@struct_class(frozen=True)
class Judged:
    """One rule of a call: what the kernel answers (SECCOMP_RET_*) when every condition holds."""

    answer: int
    conditions: tuple[Condition, ...] = ()


def compile_calls(calls: Mapping[int, Sequence[Judged]], *, otherwise: int, arch: int) -> bytes:
    """Compile the rules of calls, by number, to a program of 8 bytes an instruction.

    ``calls``: the rules of each number; the first one that holds decides. Calls and arguments that no rule names are
    answered ``otherwise``. Another architecture than ``arch`` (AUDIT_ARCH_*) ends the process, x32 among them.
    Raises ValueError for a rule that can never be reached.
    """
    code = _Code()
    native, odd, foreign, known = code.label(), code.label(), code.label(), code.label()
    code.load(_ARCH)
    code.jump(_EQUAL, arch, native, foreign)
    code.place(native)
    code.load(_NUMBER)
    if arch == AUDIT_ARCH_X86_64:
        code.jump(_AT_LEAST, _X32, odd, known)
        code.place(odd)
        code.jump(_EQUAL, _NO_CALL, known, foreign)
    else:
        code.jump(_JUMP, 0, known, known)
    code.place(foreign)
    code.answer(RET_KILL_PROCESS)
    code.place(known)
    _search(code, _ranges(calls, otherwise), otherwise)
    return code.assemble()


def _ranges(calls: Mapping[int, Sequence[Judged]], otherwise: int) -> list[tuple[int, Sequence[Judged]]]:
    """(first number, rules) of each range of neighbours with the same rules, from 0 to the end of all numbers."""
    edges = sorted({0} | calls.keys() | {number + 1 for number in calls})
    unknown = [Judged(otherwise)]
    found = [(number, calls.get(number, unknown)) for number in edges]
    return [next(alike) for _, alike in groupby(found, key=lambda entry: tuple(entry[1]))]


def _search(code: _Code, ranges: list[tuple[int, Sequence[Judged]]], otherwise: int) -> None:
    """Find the range that the number, which is loaded, is in."""
    if len(ranges) == 1:
        _judge(code, ranges[0][1], otherwise)
        return
    middle = len(ranges) // 2
    below, above = code.label(), code.label()
    code.jump(_AT_LEAST, ranges[middle][0], above, below)
    code.place(below)
    _search(code, ranges[:middle], otherwise)
    code.place(above)
    _search(code, ranges[middle:], otherwise)


def _judge(code: _Code, rules: Sequence[Judged], otherwise: int) -> None:
    """Try the rules of one call in their order."""
    if not all(rule.conditions for rule in rules[:-1]):
        raise ValueError(f"there are rules after one that always holds: {rules}")
    for answer, group in groupby(rules, key=lambda rule: rule.answer):
        hit, missed = code.label(), code.label()
        for number, rule in enumerate(group):
            if number:
                code.place(missed)
                missed = code.label()
            _all_hold(code, rule.conditions, hit, missed)
        code.place(hit)
        code.answer(answer)
        code.place(missed)
    if rules[-1].conditions:
        code.answer(otherwise)


def _all_hold(code: _Code, conditions: Sequence[Condition], hit: int, missed: int) -> None:
    for number, condition in enumerate(conditions, 1):
        held = hit if number == len(conditions) else code.label()
        _test(code, condition, held, missed)
        if held != hit:
            code.place(held)


def _test(code: _Code, condition: Condition, held: int, missed: int) -> None:
    place = _ARGUMENTS + 8 * condition.index
    halves = [(place + _LOW, condition.mask & _WORD, 0), (place + _HIGH, condition.mask >> 32, 32)]
    halves = [half for half in halves if half[1]]
    for number, (at, mask, shift) in enumerate(halves, 1):
        following = code.label()
        on = held if number == len(halves) else following
        code.load(at)
        if isinstance(condition, AnyBit):
            code.jump(_ANY_BIT, mask, held, missed if on == held else following)
        elif mask == _WORD:
            code.jump(_EQUAL, condition.value >> shift & _WORD, on, missed)
        elif not condition.value >> shift & _WORD:
            code.jump(_ANY_BIT, mask, missed, on)
        else:
            code.mask(mask)
            code.jump(_EQUAL, condition.value >> shift & _WORD, on, missed)
        code.place(following)


@struct_class()
class _Instruction:
    operation: int
    constant: int
    yes: int = -1
    no: int = -1
    """Labels of where to go, for a jump."""


@struct_class()
class _Code:
    """Instructions with labels, all of them ahead, and what is known to be loaded at the current place."""

    _instructions: list[_Instruction] = field(default_factory=list)
    _labels: list[int] = field(default_factory=list)
    _arrivals: dict[int, set[int]] = field(default_factory=dict)
    """The places that may be loaded at a label; -1: any."""
    _loaded: int = -1

    def label(self) -> int:
        """A new label, whose place is not known yet."""
        self._labels.append(-1)
        return len(self._labels) - 1

    def place(self, label: int) -> None:
        """Put the label here. Only jumps lead here: the instruction before it is an end or a jump."""
        self._labels[label] = len(self._instructions)
        found = self._arrivals.pop(label, {-1})
        self._loaded = found.pop() if len(found) == 1 else -1

    def load(self, at: int) -> None:
        """Load a word of seccomp_data, unless it is there already."""
        if self._loaded != at:
            self._instructions.append(_Instruction(_LOAD, at))
            self._loaded = at

    def mask(self, mask: int) -> None:
        """Clear all bits of the accumulator but these."""
        self._instructions.append(_Instruction(_AND, mask))
        self._loaded = -1

    def jump(self, operation: int, constant: int, yes: int, no: int) -> None:
        """Compare the accumulator, and go on at one of two labels."""
        self._instructions.append(_Instruction(operation, constant, yes, no))
        for label in (yes, no):
            self._arrivals.setdefault(label, set()).add(self._loaded)

    def answer(self, value: int) -> None:
        """End with this answer."""
        self._instructions.append(_Instruction(_RETURN, value))

    def assemble(self) -> bytes:
        """The program's bytes."""
        self._lengthen()
        return b"".join(self._bytes(place, one) for place, one in enumerate(self._instructions))

    def _bytes(self, place: int, one: _Instruction) -> bytes:
        if one.operation == _JUMP:
            return struct.pack("=HBBI", _JUMP, 0, 0, self._distance(place, one.yes))
        yes, no = (self._distance(place, label) for label in (one.yes, one.no))
        return struct.pack("=HBBI", one.operation, yes, no, one.constant)

    def _distance(self, place: int, label: int) -> int:
        return self._labels[label] - place - 1 if label >= 0 else 0

    def _lengthen(self) -> None:
        """Lengthen conditional jumps, which have one byte for their distance, by a long jump that follows them."""
        place = 0
        while place < len(self._instructions):
            one = self._instructions[place]
            far = max(one.yes, one.no, key=lambda label: self._distance(place, label))
            if one.operation == _JUMP or self._distance(place, far) <= _FARTHEST:
                place += 1
                continue
            self._labels = [target + (target > place) for target in self._labels]
            self._instructions.insert(place + 1, _Instruction(_JUMP, 0, far, far))
            near = self.label()
            self._labels[near] = place + 1
            one.yes, one.no = (near if label == far else label for label in (one.yes, one.no))
            place = 0  # what was near enough before may not be any more
