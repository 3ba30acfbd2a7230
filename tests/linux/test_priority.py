"""Precedence on a contended processor: who has it, and that nobody inherits it."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest

from isolator.linux.priority import FIRST, SLICE, Attributes, go_as_far_forward_as, go_behind, go_first, take_turns


def nice() -> int:
    return os.getpriority(os.PRIO_PROCESS, 0)


def in_a_child(work: Callable[[], object]) -> str:
    """Do ``work`` in a process that has a nice value of its own; returns what it returns, as text."""
    reading, writing = os.pipe()
    pid = os.fork()
    if pid == 0:
        with suppress(BaseException):
            os.write(writing, str(work()).encode())
        os._exit(0)
    os.close(writing)
    with os.fdopen(reading) as said:
        text = said.read()
    os.waitpid(pid, 0)
    return text


def begun_with(value: int, work: Callable[[], object]) -> str:
    def begin() -> object:
        os.setpriority(os.PRIO_PROCESS, 0, value)
        return work()

    return in_a_child(begin)


@pytest.mark.parametrize(("before", "after"), [(0, FIRST), (7, 7), (-9, -9)])
def test_precedence_is_taken_unless_somebody_has_set_a_nice_value(before: int, after: int) -> None:
    assert begun_with(before, lambda: (go_first(), go_first(), nice())[2]) == str(after)


@pytest.mark.parametrize("before", [0, -9])
def test_neither_child_nor_thread_inherits_precedence(before: int) -> None:
    def work() -> list[object]:
        go_first()
        found: list[object] = [in_a_child(nice)]
        thread = threading.Thread(target=lambda: found.append(nice()))
        thread.start()
        thread.join()
        return found

    assert begun_with(before, work) == "['0', 0]"


def test_without_the_privilege_nothing_changes() -> None:
    def work() -> list[int]:
        os.setresuid(65534, 65534, 65534)
        go_first()
        go_as_far_forward_as(FIRST)
        return [nice()]

    assert in_a_child(work) == "[0]"


@pytest.mark.parametrize(("before", "other", "after"), [(0, -3, -3), (0, 3, 0), (5, -3, -3), (-9, -3, -9)])
def test_precedence_of_another_is_taken_over(before: int, other: int, after: int) -> None:
    assert begun_with(before, lambda: (go_as_far_forward_as(other), nice())[1]) == str(after)


@pytest.mark.parametrize(("before", "after"), [(-9, 10), (0, 10), (3, 13), (15, 19)])
def test_step_behind_is_counted_from_no_precedence(before: int, after: int) -> None:
    assert begun_with(before, lambda: (go_behind(10), nice())[1]) == str(after)


@pytest.mark.parametrize(("before", "after"), [(-9, 0), (0, 0), (4, 4)])
def test_precedence_is_given_up_and_a_value_behind_others_stays(before: int, after: int) -> None:
    assert begun_with(before, lambda: (take_turns(), nice())[1]) == str(after)


@pytest.mark.skipif(not Path("/proc/self/autogroup").exists(), reason="this kernel groups no sessions")
@pytest.mark.parametrize(("leads", "after"), [(True, f"nice {FIRST}"), (False, "nice 0")])
def test_session_that_is_its_own_gets_the_precedence_too(leads: bool, after: str) -> None:
    """Else it would count for nothing beside other sessions."""

    def work() -> str:
        os.setsid()
        return in_a_child(lambda: (leads and os.setsid(), go_first(), Path("/proc/self/autogroup").read_text())[-1])

    assert in_a_child(work).strip().endswith(after)


def test_real_time_policy_is_given_up() -> None:
    def work() -> object:
        try:
            os.sched_setscheduler(0, os.SCHED_RR, os.sched_param(1))
        except PermissionError:
            return "none here"
        take_turns()
        return os.sched_getscheduler(0)

    found = in_a_child(work)
    if found == "none here":
        pytest.skip("this container allows no real-time policy")
    assert found == str(os.SCHED_OTHER)


@pytest.mark.skipif(not Attributes.of(0).runtime, reason="the kernel has one slice for all threads (before Linux 6.12)")
@pytest.mark.parametrize("policy", [os.SCHED_OTHER, os.SCHED_BATCH])
def test_who_takes_turns_is_interrupted_by_who_is_woken_and_so_are_its_children(policy: int) -> None:
    def work() -> list[object]:
        os.sched_setscheduler(0, policy, os.sched_param(0))
        before = Attributes.of(0)
        take_turns()
        after = Attributes.of(0)
        kept = all(getattr(before, name) == getattr(after, name) for name in ("policy", "flags", "nice"))
        return [before.runtime < SLICE, after.runtime == SLICE, in_a_child(lambda: Attributes.of(0).runtime), kept]

    assert begun_with(7, work) == f"[True, True, '{SLICE}', True]"
