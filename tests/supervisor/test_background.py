"""A cage that computes goes into the background, and comes back; what it has then is what nobody else wants."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from isolator.layers.cgroup.leaf import IDLE, Leaf, read_file
from isolator.layers.cgroup.subtree import Subtree, open_subtree
from isolator.linux.files import write_file
from isolator.supervisor.background import Background
from tests.system.daemon import wait_for

pytestmark = pytest.mark.vm

COMPUTES = "while True: pass"


@pytest.fixture
def subtree() -> Iterator[Subtree]:
    made = open_subtree(f"isolator-background-{os.getpid()}")
    try:
        yield made
    finally:
        made.remove()


@contextlib.contextmanager
def computing(subtree: Subtree, name: str, *, processor: int | None = None) -> Iterator[tuple[Leaf, int]]:
    """A process that computes, in a leaf of its own; on one processor alone if that is given."""
    leaf = Leaf.under(subtree, name)
    leaf.create(None)
    leaf.create_v1()
    process = subprocess.Popen([sys.executable, "-I", "-c", COMPUTES])
    try:
        for folder in leaf.folders():
            write_file(f"{folder}/cgroup.procs", str(process.pid))
        if processor is not None:
            os.sched_setaffinity(process.pid, {processor})
        yield leaf, process.pid
    finally:
        process.kill()
        process.wait()
        leaf.wait_empty(10)
        leaf.remove()


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
    with computing(subtree, "busy") as (_, pid), computing(subtree, "waiting") as (_, other):
        os.kill(other, signal.SIGSTOP)
        background = Background(subtree, lambda: ["busy", "waiting", "gone"])
        wait_for(lambda: looked(background, subtree, "busy"), what="it computes in the foreground")
        assert not is_behind(subtree, "waiting")
        os.kill(pid, signal.SIGSTOP)
        wait_for(lambda: not looked(background, subtree, "busy"), what="it rests, and stays behind")


def test_one_that_was_behind_before_a_reload_comes_back(subtree: Subtree) -> None:
    with computing(subtree, "busy") as (_, pid):
        background = Background(subtree, lambda: ["busy"])
        wait_for(lambda: looked(background, subtree, "busy"))
        os.kill(pid, signal.SIGSTOP)
        another = Background(subtree, lambda: ["busy"])
        wait_for(lambda: not looked(another, subtree, "busy"), what="nobody knows that it is behind")


@pytest.mark.parametrize("behind", [True, False])
def test_the_background_has_what_the_foreground_leaves(subtree: Subtree, behind: bool) -> None:
    processor = min(os.sched_getaffinity(0))
    with (
        computing(subtree, "one", processor=processor) as (_, first),
        computing(subtree, "other", processor=processor) as (_, second),
    ):
        group = subtree.v1.get("cpu", subtree.unified)
        write_file(f"{group}/one/{IDLE}", str(int(behind)))
        before = used(first), used(second)
        wait_for(lambda: used(second) - before[1] >= 50)
        share = (used(first) - before[0]) / 50
        assert share < 0.2 if behind else share > 0.5
        if behind:
            os.kill(second, signal.SIGSTOP)
            before = used(first), used(second)
            wait_for(lambda: used(first) - before[0] >= 20, what="it has no processor that nobody else wants")
