"""Threads of one piece of work: what comes of it, and that they alone leave the process's network."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import os
import tempfile
import threading

import pytest

from isolator.linux import netns
from isolator.linux.apart import apart, is_apart, leave_descriptors
from tests.support.descriptors import open_descriptors


def _network() -> str:
    return os.readlink("/proc/thread-self/ns/net")


async def test_work_is_done_in_a_network_of_its_own_and_by_no_further_thread() -> None:
    def work() -> tuple[str, int, int]:
        before = threading.get_native_id()
        return netns.in_new_network(lambda: (_network(), before, threading.get_native_id()))

    inside, before, doing = await apart(work)
    assert inside != _network()
    assert before == doing != threading.get_native_id()
    assert not is_apart()


async def test_thread_that_leaves_the_descriptors_copies_none_above_its_own_and_is_heard() -> None:
    await apart(lambda: None)  # the loop has its descriptor from the first piece of work on
    with contextlib.ExitStack() as opened:
        numbers = [opened.enter_context(tempfile.TemporaryFile()).fileno() for _ in range(80)]

        def work() -> set[int]:
            leave_descriptors()
            here = set(map(int, os.listdir("/proc/thread-self/fd")))
            os.close(min(here))  # of this thread's table alone
            return here

        before = set(map(int, open_descriptors()))
        here = await apart(work)
        assert not here & {*numbers[40:]} and here & before
        assert before - set(map(int, os.listdir("/proc/self/fd"))) <= {max(before)}  # that of the first listing
        assert [os.fstat(number).st_size for number in numbers] == [0] * len(numbers)


@pytest.mark.parametrize("how", ["apart", "in a network"])
async def test_no_garbage_is_collected_while_a_thread_has_left_the_descriptors(how: str) -> None:
    """The owner of a descriptor would close one of the thread's own, which has the same number."""
    collected = threading.Event()

    class Owner:
        def __init__(self) -> None:
            self.itself = self

        def __del__(self) -> None:
            collected.set()

    def work() -> bool:
        leave_descriptors()
        Owner()
        for _ in range(100_000):  # garbage enough for the collector to be due
            one: list[object] = []
            one.append(one)
        return collected.is_set()

    assert not await (apart(work) if how == "apart" else asyncio.to_thread(netns.in_new_network, work))
    while not (gc.isenabled() and collected.is_set()):  # the thread may still be on its way out, and be collecting then
        gc.collect()
        await asyncio.sleep(0)


async def test_error_of_the_work_is_raised() -> None:
    def work() -> None:
        raise LookupError("of the work")

    with pytest.raises(LookupError, match="of the work"):
        await apart(work)


async def test_result_that_nobody_waits_for_any_more_is_dropped() -> None:
    begun, go_on, thread = threading.Event(), threading.Event(), list[int]()
    loop, faults = asyncio.get_running_loop(), list[str]()
    loop.set_exception_handler(lambda _, context: faults.append(str(context)))

    def work() -> None:
        thread.append(threading.get_native_id())
        begun.set()
        go_on.wait()

    waiting = asyncio.create_task(apart(work))
    await asyncio.to_thread(begun.wait)
    waiting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiting
    go_on.set()
    while os.path.exists(f"/proc/self/task/{thread[0]}"):  # noqa: ASYNC110 # the end of a thread wakes nobody
        await asyncio.sleep(0)
    await asyncio.sleep(0)  # the callback of the result has been called, and has set nothing
    assert not faults
