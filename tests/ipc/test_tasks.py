"""Work of the daemon that fails, or that ends, is noticed, and what has to go on is begun anew."""

from __future__ import annotations

import asyncio
import threading
import types
from typing import Any

import pytest

from isolator.ipc import tasks
from tests.support.timeouts import seconds


@pytest.fixture
async def reported() -> list[str]:
    """What came to the event loop's exception handler."""
    seen: list[str] = []

    def handle(_: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        seen.append(f"{context['message']}: {context.get('exception')!r}")

    asyncio.get_running_loop().set_exception_handler(handle)
    return seen


async def test_loop_that_fails_is_named_and_begun_again(reported: list[str]) -> None:
    begun, owner, third = 0, tasks.Tasks(), asyncio.Event()

    async def loop() -> None:
        nonlocal begun
        begun += 1
        if begun == 1:
            raise ValueError("for once")
        if begun == 3:
            third.set()
            await asyncio.Event().wait()

    owner.keep("snapshots", loop)
    await asyncio.wait_for(third.wait(), seconds(30))
    assert reported == [
        "snapshots has failed; it is begun again: ValueError('for once')",
        "snapshots has ended; it is begun again: None",
    ]
    await owner.close()
    assert not [task for task in asyncio.all_tasks() if task.get_name() == "snapshots"]


async def test_thread_that_fails_is_named_and_begun_again(reported: list[str]) -> None:
    loop, again, stopped, begun = asyncio.get_running_loop(), asyncio.Event(), threading.Event(), 0

    def work() -> None:
        nonlocal begun
        begun += 1
        if begun == 1:
            raise ValueError("for once")
        loop.call_soon_threadsafe(again.set)
        stopped.wait()

    thread = tasks.keep_in_thread("answers", work, stopped)
    await asyncio.wait_for(again.wait(), seconds(30))
    assert reported == ["answers has failed; it is begun again: ValueError('for once')"]
    stopped.set()
    await asyncio.to_thread(thread.join)


async def test_failure_of_work_that_nobody_awaits_is_reported_unless_it_is_expected(reported: list[str]) -> None:
    async def fail(error: Exception) -> None:
        raise error

    owner = tasks.Tasks()
    works = [
        owner.run("refill", fail(OSError("away")), expected=(OSError,)),
        owner.run("refill", fail(ValueError("a fault")), expected=(OSError,)),
    ]
    await asyncio.wait(works)
    await asyncio.sleep(0)
    assert reported == ["refill has failed: ValueError('a fault')"]


async def test_work_ends_with_its_caller_although_nothing_has_stopped_it() -> None:
    begun, ended = asyncio.Event(), list[str]()

    async def work() -> None:
        try:
            begun.set()
            await asyncio.Event().wait()
        finally:
            ended.append("ended")

    caller = asyncio.create_task(tasks.unless(asyncio.Event(), work()))
    await begun.wait()
    caller.cancel()
    await asyncio.wait([caller])
    assert caller.cancelled() and ended == ["ended"]


async def test_work_that_begins_at_once_needs_a_task_only_where_it_waits() -> None:
    done: list[str] = []

    async def work(*waits: asyncio.Future[str]) -> None:
        done.append("begun")
        for wait in waits:
            done.append(await wait)

    assert tasks.essential_at_once(work(), "work") is None
    assert done == ["begun"]
    first, second = (asyncio.get_running_loop().create_future() for _ in range(2))
    task = tasks.essential_at_once(work(first, second), "work")
    assert done == ["begun", "begun"]
    first.set_result("first")
    await asyncio.sleep(0)
    second.set_result("second")
    assert task is not None
    await task
    assert done == ["begun", "begun", "first", "second"]


async def test_rest_of_work_that_has_begun_is_a_coroutine() -> None:
    """No task of Python 3.12 takes a generator."""
    rest = tasks.begun(asyncio.sleep(0))
    assert isinstance(rest, types.CoroutineType)
    await asyncio.create_task(rest)


async def test_work_that_began_at_once_is_cancelled_where_it_waits() -> None:
    ended: list[BaseException] = []

    async def work(wait: asyncio.Future[None]) -> None:
        try:
            await wait
        except asyncio.CancelledError as error:
            ended.append(error)
            raise

    for turns in range(3):
        task = tasks.essential_at_once(work(asyncio.get_running_loop().create_future()), "work")
        assert task is not None
        for _ in range(turns):
            await asyncio.sleep(0)
        task.cancel()
        await asyncio.wait([task])
        assert task.cancelled()
    assert len(ended) == 3
