"""A cage that computes goes into the background, and comes back; what it has then is what nobody else wants."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from isolator.layers.cgroup.layer import Cgroup
from isolator.layers.cgroup.leaf import IDLE, Leaf, read_file, used_by
from isolator.layers.cgroup.subtree import Subtree, open_subtree
from isolator.linux.files import write_file
from isolator.supervisor.background import SHARE, Background
from tests.system.daemon import wait_for

pytestmark = pytest.mark.vm

COMPUTES = "while True: pass"
BURSTS = """
import os, time
while os.read(0, 1):
    end = time.process_time() + 0.1
    while time.process_time() < end:
        pass
    os.write(1, b"x")
"""
TICK = 2 / os.sysconf("SC_CLK_TCK")
"""Seconds by which two readings of a process's time may differ from the truth."""


@pytest.fixture
def subtree() -> Iterator[Subtree]:
    made = open_subtree(f"isolator-background-{os.getpid()}")
    try:
        yield made
    finally:
        made.remove()


@contextlib.contextmanager
def program(subtree: Subtree, name: str, text: str) -> Iterator[subprocess.Popen[bytes]]:
    """A program in Python, in a leaf of its own."""
    leaf = Leaf.under(subtree, name)
    leaf.create()
    leaf.create_v1()
    pipe = subprocess.PIPE
    process = subprocess.Popen([sys.executable, "-I", "-c", text], stdin=pipe, stdout=pipe, bufsize=0)
    try:
        for folder in leaf.folders():
            write_file(f"{folder}/cgroup.procs", str(process.pid))
        yield process
    finally:
        process.kill()
        process.communicate()
        leaf.wait_empty(10)
        leaf.remove()


@contextlib.contextmanager
def waiting(subtree: Subtree, name: str) -> Iterator[None]:
    """A program that waits, in a leaf of its own; its start, which takes a slow machine long, is over."""
    with program(subtree, name, "import os; os.write(1, b'x'); os.read(0, 1)") as process:
        assert process.stdout is not None
        process.stdout.read(1)
        yield


@contextlib.contextmanager
def computing(subtree: Subtree, name: str, *, processor: int | None = None) -> Iterator[int]:
    """The pid of a process that computes, in a leaf of its own; on one processor alone if that is given."""
    with program(subtree, name, COMPUTES) as process:
        if processor is not None:
            os.sched_setaffinity(process.pid, {processor})
        yield process.pid


def is_behind(subtree: Subtree, name: str) -> bool:
    return read_file(f"{subtree.v1.get('cpu', subtree.unified)}/{name}/{IDLE}").strip() == "1"


def used(pid: int) -> int:
    """Ticks of processor time that a process has used."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return int(fields[11]) + int(fields[12])


def looked(background: Background, subtree: Subtree, name: str) -> bool:
    background.look()
    return is_behind(subtree, name)


def test_who_computes_goes_behind_until_it_has_rested(subtree: Subtree) -> None:
    with computing(subtree, "busy.1") as pid, computing(subtree, "waiting.1") as other:
        os.kill(other, signal.SIGSTOP)
        background = Background(subtree, lambda: ["busy.1", "waiting.1", "gone.1"])
        wait_for(lambda: looked(background, subtree, "busy.1"), what="it computes in the foreground")
        assert not is_behind(subtree, "waiting.1")
        os.kill(pid, signal.SIGSTOP)
        wait_for(lambda: not looked(background, subtree, "busy.1"), what="it rests, and stays behind")


def test_one_that_was_behind_before_a_reload_comes_back(subtree: Subtree) -> None:
    with computing(subtree, "busy.1") as pid:
        background = Background(subtree, lambda: ["busy.1"])
        wait_for(lambda: looked(background, subtree, "busy.1"))
        os.kill(pid, signal.SIGSTOP)
        another = Background(subtree, lambda: ["busy.1"])
        wait_for(lambda: not looked(another, subtree, "busy.1"), what="nobody knows that it is behind")


def test_another_cage_of_one_that_computes_is_behind_at_the_first_look(subtree: Subtree) -> None:
    with waiting(subtree, "busy.2"), waiting(subtree, "other.1"):
        background = Background(subtree, lambda: ["busy.1", "busy.2", "other.1"])
        with computing(subtree, "busy.1"):
            wait_for(lambda: looked(background, subtree, "busy.1"))
            assert is_behind(subtree, "busy.2") and not is_behind(subtree, "other.1")
        with waiting(subtree, "busy.3"):
            later = Background(subtree, lambda: ["busy.2", "busy.3"])
            assert looked(later, subtree, "busy.3"), "a reloaded daemon has forgotten it"


def test_callers_of_runners_have_each_a_debt_of_their_own(subtree: Subtree) -> None:
    with waiting(subtree, "_run.1001.a"), computing(subtree, "_run.1000.b"):
        background = Background(subtree, lambda: ["_run.1000.b", "_run.1001.a"])
        wait_for(lambda: looked(background, subtree, "_run.1000.b"))
        assert not is_behind(subtree, "_run.1001.a") and subtree.behind == {"_run.1000"}


def test_who_computes_in_bursts_has_its_share_in_the_foreground_and_no_more(subtree: Subtree) -> None:
    with program(subtree, "bursts.1", BURSTS) as process:
        assert process.stdin is not None and process.stdout is not None
        background = Background(subtree, lambda: ["bursts.1"])
        background.look()
        began, before = time.monotonic(), used(process.pid)
        for _ in range(3):
            process.stdin.write(b"x")
            assert process.stdout.read(1) == b"x"
            assert looked(background, subtree, "bursts.1")
            wait_for(lambda: not looked(background, subtree, "bursts.1"))
        spent = (used(process.pid) - before) / os.sysconf("SC_CLK_TCK")
        assert spent <= SHARE * (time.monotonic() - began) + TICK


def test_what_cages_used_that_no_look_has_seen_is_a_debt_too(subtree: Subtree) -> None:
    with waiting(subtree, "short.0"):
        background = Background(subtree, lambda: ["short.0"])
        background.look()

        def burst() -> bool:
            cage = Cgroup(subtree)
            with program(subtree, "short.1", BURSTS) as process:
                process.communicate(b"x")
                cage.leaf = Leaf.under(subtree, "short.1")
                cage.release()
            return looked(background, subtree, "short.0")

        wait_for(burst, what="a cage for each burst hides them")


@pytest.mark.parametrize("behind", [True, False])
def test_the_background_has_what_the_foreground_leaves(subtree: Subtree, behind: bool) -> None:
    processor = min(os.sched_getaffinity(0))
    with (
        computing(subtree, "one.1", processor=processor) as first,
        computing(subtree, "other.1", processor=processor) as second,
    ):
        group = subtree.v1.get("cpu", subtree.unified)
        write_file(f"{group}/one.1/{IDLE}", str(int(behind)))
        before = used(first), used(second)
        wait_for(lambda: used(second) - before[1] >= 50)
        share = (used(first) - before[0]) / 50
        assert share < 0.2 if behind else share > 0.5
        if behind:
            os.kill(second, signal.SIGSTOP)
            before = used(first), used(second)
            wait_for(lambda: used(first) - before[0] >= 20, what="it has no processor that nobody else wants")


def test_cage_that_has_ended_and_is_not_removed_yet_is_charged_once(subtree: Subtree) -> None:
    with program(subtree, "short.1", BURSTS) as process:
        assert process.stdin is not None and process.stdout is not None
        process.stdin.write(b"x")
        process.stdout.read(1)
        background = Background(subtree, lambda: ["short.1"])
        background.look()
        subtree.ended.append(("short.1", read := used_by(subtree, "short.1") or 0.0))
        background._look_at_each()
        assert read > 0 and sum(background._look_at_each().values()) < read / 2
