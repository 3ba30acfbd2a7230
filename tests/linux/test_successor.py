"""A successor goes on in its maker's memory, and its maker runs no further instruction of its own."""

from __future__ import annotations

import errno
import os
import re
import select
import shutil
import signal
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from isolator.layers.cgroup.leaf import Leaf
from isolator.layers.cgroup.subtree import open_subtree
from isolator.linux import successor
from isolator.linux._libc import MACHINE
from isolator.linux.descriptors import FdSet
from isolator.linux.namespaces import CLONE_NEWNS, CLONE_NEWPID

CLONE_THREAD = 0x10000

LISTINGS = {
    "x86_64": ("i386:x86-64", "mov $0x1b3,%eax; syscall; test %rax,%rax; jle 0x15; xor %edi,%edi; mov $0xe7,%eax;"
               " syscall; ret"),
    "aarch64": ("aarch64", "mov x8, #0x1b3; svc #0x0; cmp x0, #0x0; b.le 0x1c; mov x0, #0x0; mov x8, #0x5e; svc #0x0;"
                " ret"),
}  # fmt: skip
"""By machine: its name in binutils, and the instructions."""


def in_a_process(work: Callable[[], None]) -> int:
    """Run ``work`` in a forked process, whose descendants are adopted by it, and return that process's exit code."""
    pid = os.fork()
    if pid == 0:
        try:
            work()
        except BaseException:  # what escaped would go on as a second run of the tests
            os._exit(99)
        os._exit(98)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def test_successor_has_memory_descriptors_and_a_pidfd_and_its_maker_ends_with_0() -> None:
    ready, its_ready = os.pipe()

    def work() -> None:
        seen = ["before"]
        before = os.getpid()
        opened = os.dup(its_ready)
        pid, pidfd = successor.become(CLONE_NEWPID, -1)
        seen.append("after")
        own = Path(f"/proc/self/fdinfo/{pidfd}").read_text()
        told = re.search(r"^Pid:\t(\d+)$", own, re.MULTILINE)
        facts = [seen == ["before", "after"], pid != before, told is not None and int(told[1]) == pid]
        os.write(opened, repr((os.getpid(), facts)).encode())
        os._exit(7)

    assert in_a_process(work) == 0, "its maker"
    assert os.read(ready, 4096).decode() == "(1, [True, True, True])"
    os.close(ready)
    os.close(its_ready)


def test_maker_is_in_neither_handlers_nor_code_of_its_own_once_there_is_a_successor() -> None:
    """Each signal that waits for the maker would have its handler run on the successor's stack."""
    ready, its_ready = os.pipe()

    def work() -> None:
        handled: list[int] = []
        signal.signal(signal.SIGUSR1, lambda number, _: handled.append(number))
        signal.signal(signal.SIGCHLD, lambda number, _: handled.append(number))
        before = os.getpid()
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR1})
        os.kill(before, signal.SIGUSR1)
        successor.become(0, -1)
        blocked = signal.pthread_sigmask(signal.SIG_BLOCK, ())
        os.write(its_ready, repr((handled, {int(one) for one in blocked} == {int(signal.SIGUSR1)})).encode())
        os._exit(0)

    assert in_a_process(work) == 0
    assert os.read(ready, 4096).decode() == "([], True)"
    os.close(ready)
    os.close(its_ready)


def test_caller_goes_on_when_the_kernel_makes_no_process() -> None:
    def work() -> None:
        try:
            successor.become(CLONE_THREAD, -1)  # without CLONE_SIGHAND
        except OSError as error:
            os._exit(error.errno or 0)

    assert in_a_process(work) == errno.EINVAL


def test_stacks_of_many_successors_in_a_row_hold() -> None:
    """Each goes on from the frames of the one before, while that one ends."""
    ready, its_ready = os.pipe()

    def work() -> None:
        pids = [os.getpid()]
        for number in range(200):
            pid, pidfd = successor.become(CLONE_NEWNS if number % 2 else 0, -1)
            os.close(pidfd)
            pids.append(pid)
        os.write(its_ready, repr(len(set(pids))).encode())
        os._exit(0)

    assert in_a_process(work) == 0
    assert os.read(ready, 4096).decode() == "201"
    os.close(ready)
    os.close(its_ready)


@pytest.mark.parametrize("machine", LISTINGS)
def test_code_is_what_its_listing_says(machine: str, tmp_path: Path) -> None:
    tool = "objdump" if machine == MACHINE else f"{machine}-linux-gnu-objdump"
    if shutil.which(tool) is None:
        pytest.skip(f"needs {tool}, of binutils")
    code, (name, listing) = tmp_path / "code", LISTINGS[machine]
    code.write_bytes(bytes.fromhex(successor._CODE[machine]))
    run = subprocess.run([tool, "-D", "-b", "binary", "-m", name, code], capture_output=True, text=True, check=True)
    lines = [line.split("\t", 2)[2] for line in run.stdout.splitlines() if re.match(r" +[0-9a-f]+:\t", line)]
    assert "; ".join(" ".join(line.split("//")[0].split()) for line in lines) == listing


def test_pages_that_a_successor_touches_are_charged_to_its_group() -> None:
    """The kernel charges a page to the group of the memory's owner (mm->owner): at first the process that ends."""
    size = 48 << 20
    subtree = open_subtree(f"isolator-test-{os.getpid()}")
    leaf, groups = Leaf.under(subtree, "successor"), FdSet()
    ready, its_ready = os.pipe()
    hold, its_hold = os.pipe()

    def work() -> None:
        maker = os.pidfd_open(os.getpid())
        successor.become(0, into)
        for group in groups:
            os.write(group, b"0")
        waits = select.poll()
        waits.register(maker, select.POLLIN)
        waits.poll()
        touched = b"x" * size
        os.write(its_ready, touched[:1])
        os.close(its_hold)
        os.read(hold, 1)
        os._exit(0)

    try:
        leaf.create()
        leaf.create_v1()
        leaf.open_v1(groups)
        into = leaf.open_folder()
        assert in_a_process(work) == 0
        assert os.read(ready, 1) == b"x"
        used = leaf.v1["memory"] / "memory.usage_in_bytes" if "memory" in leaf.v1 else leaf.unified / "memory.current"
        assert int(used.read_text()) >= size
        os.close(into)
    finally:
        for fd in (ready, its_ready, hold, its_hold):
            os.close(fd)
        groups.close()
        leaf.kill()
        leaf.wait_empty(5)
        leaf.remove()
        subtree.remove()
