"""Owners of tasks and threads: each notices when its work ends, and nothing dies in silence.

Work that never ends is *kept*: begun anew after a pause, however it ended (``Tasks.keep``, ``keep_in_thread``). Work
that comes to an end is *run* (``Tasks.run``). Work without which a process is of no use is *essential*: when it fails,
its process ends, and the supervisor starts another one.

Failures go to the event loop's exception handler, with what the loop itself finds (a callback that raises, a failed
task that nobody awaits). The supervisor's makes an alarm and a record of each; elsewhere they are in the log.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import threading
import types
from collections.abc import Awaitable, Callable, Coroutine, Generator, Iterable
from typing import Any, TypeVar

from isolator.base.pacing import Backoff
from isolator.linux.descriptors import close_all

_log = logging.getLogger(__name__)

T = TypeVar("T")

_BACKOFF_FIRST, _BACKOFF_LAST = 0.1, 30.0
_STEADY_SECONDS = 60.0
_AGAIN = "; it is begun again"


def report(loop: asyncio.AbstractEventLoop, work: str, error: BaseException | None, then: str = "") -> None:
    """Give ``loop``, the present one, the failure of ``work`` to handle; without an error, that it has ended."""
    context: dict[str, Any] = {"message": f"{work} has {'ended' if error is None else 'failed'}{then}", "work": work}
    if error is not None:
        context["exception"] = error
    loop.call_exception_handler(context)


def essential(work: Coroutine[Any, Any, None], name: str) -> asyncio.Task[None]:
    """Run ``work`` in a task whose failure ends this process; that it returns or is cancelled is its owner's doing."""
    task = asyncio.get_running_loop().create_task(work, name=name)
    task.add_done_callback(_end_if_failed)
    return task


def essential_at_once(work: Coroutine[Any, Any, None], name: str) -> asyncio.Task[None] | None:
    """As ``essential``, but ``work`` begins in this call; returns None if it has ended in it, and needs no task."""
    try:
        rest = begun(work)
    except Exception as error:
        end_process(name, error)
        raise
    return None if rest is None else essential(rest, name)


def begun(work: Coroutine[Any, Any, None]) -> Coroutine[Any, Any, None] | None:
    """Begin ``work`` in this call; returns what is left of it, for a task, or None. Raises what it raises.

    Until it awaits something it is in no task of its own, which asyncio.timeout needs.
    """
    try:
        awaited = work.send(None)
    except StopIteration:
        return None
    rest = _go_on(work, awaited)
    rest.send(None)  # so that ``work`` hears of it if its task is cancelled before its first step
    return rest


async def opened_in_thread(make: Callable[[], list[int]]) -> list[int]:
    """The descriptors that ``make`` opens in a thread; those for a caller who is cancelled meanwhile are closed."""
    return await made_in_thread(make, close_all)


async def made_in_thread(make: Callable[[], T], undo: Callable[[T], object]) -> T:
    """Return what ``make`` makes in a thread; what it makes for a caller who is cancelled meanwhile is undone."""

    def undo_made(making: asyncio.Future[T]) -> None:
        if not making.cancelled() and making.exception() is None:
            undo(making.result())

    making = asyncio.ensure_future(asyncio.to_thread(make))
    try:
        return await asyncio.shield(making)
    except asyncio.CancelledError:
        making.add_done_callback(undo_made)
        raise


async def _go_on(work: Coroutine[Any, Any, None], awaited: Any) -> None:
    await _steps(work, awaited)  # since Python 3.12 no task takes a generator


@types.coroutine
def _steps(work: Coroutine[Any, Any, None], awaited: Any) -> Generator[Any, Any, None]:
    """Yield to ``begun``, and then whatever ``work`` awaits."""
    with contextlib.suppress(StopIteration):
        try:
            yield
        except BaseException as error:
            awaited = work.throw(error)
        while True:
            try:
                result = yield awaited
            except BaseException as error:
                awaited = work.throw(error)
            else:
                awaited = work.send(result)


async def unless(stop: asyncio.Event, work: Coroutine[Any, Any, T]) -> T | None:
    """Return the outcome of ``work``; None when it was given up because ``stop`` is set. It ends with its caller."""
    task = asyncio.create_task(work)
    stopped = asyncio.create_task(stop.wait())
    try:
        await asyncio.wait({task, stopped}, return_when=asyncio.FIRST_COMPLETED)
    finally:
        await cancel_all((task, stopped))
    return None if task.cancelled() else task.result()


async def cancel_all(tasks: Iterable[asyncio.Task[T]]) -> list[T | BaseException]:
    """Cancel tasks, and wait until each has ended; returns their results, or the errors with which they ended."""
    ending = list(tasks)
    for task in ending:
        task.cancel()
    # Of none, a gathering would wait for the next turn of the loop.
    return await asyncio.gather(*ending, return_exceptions=True) if ending else []


def end_process(name: str, error: BaseException) -> None:
    """End this process at once, after one line."""
    why = f"{type(error).__name__}: {error}"
    _log.critical("%s has failed: %s; the process ends, and another takes its place", name, why)
    os._exit(1)


def _end_if_failed(task: asyncio.Task[None]) -> None:
    if not task.cancelled() and (error := task.exception()) is not None:
        end_process(task.get_name(), error)


class Tasks:
    """The tasks of one owner, which ``close`` ends."""

    def __init__(self) -> None:
        self._tasks: set[asyncio.Task[Any]] = set()

    def keep(self, name: str, loop: Callable[[], Awaitable[None]]) -> None:
        """Run ``loop``, which never returns; when it ends all the same, report it and begin anew after a pause."""
        self.run(name, _keep(name, loop))

    def run(
        self, name: str, work: Coroutine[Any, Any, T], *, expected: tuple[type[Exception], ...] = ()
    ) -> asyncio.Task[T]:
        """Run ``work``; report it when it fails, unless with an ``expected`` error, which is for those who await it."""

        def ended(task: asyncio.Task[T]) -> None:
            self._tasks.discard(task)
            error = None if task.cancelled() else task.exception()
            if error is not None and not isinstance(error, expected):
                report(task.get_loop(), name, error)

        task = asyncio.get_running_loop().create_task(work, name=name)
        self._tasks.add(task)
        task.add_done_callback(ended)
        return task

    def cancel(self) -> None:
        """End every task, without waiting for it."""
        for task in self._tasks:
            task.cancel()

    async def close(self) -> None:
        """End every task, and wait until it has ended. Idempotent."""
        await cancel_all(self._tasks)


async def _keep(name: str, work: Callable[[], Awaitable[None]]) -> None:
    loop, backoff = asyncio.get_running_loop(), Backoff(_BACKOFF_FIRST, _BACKOFF_LAST)
    while True:
        started = loop.time()
        try:
            await work()
            report(loop, name, None, _AGAIN)
        except Exception as error:  # whatever it was, the work has to go on
            report(loop, name, error, _AGAIN)
        if loop.time() - started > _STEADY_SECONDS:
            backoff.reset()
        await asyncio.sleep(backoff.next())


def keep_in_thread(name: str, work: Callable[[], None], stopped: threading.Event) -> threading.Thread:
    """Run ``work`` in a thread until ``stopped``, anew after a pause when it fails: as ``Tasks.keep`` for threads."""
    loop, backoff = asyncio.get_running_loop(), Backoff(_BACKOFF_FIRST, _BACKOFF_LAST)

    def body() -> None:
        while not stopped.is_set():
            started = loop.time()
            try:
                work()
            except Exception as error:  # whatever it was, the work has to go on
                with contextlib.suppress(RuntimeError):  # the loop has ended
                    loop.call_soon_threadsafe(report, loop, name, error, _AGAIN)
                if loop.time() - started > _STEADY_SECONDS:
                    backoff.reset()
                stopped.wait(backoff.next())

    thread = threading.Thread(target=body, name=name, daemon=True)
    thread.start()
    return thread
