"""Threads that exist for one piece of work: they may leave the process's namespaces, for they end right after.

Unlike with ``asyncio.to_thread`` nothing of a pool is imported or kept, and unlike with ``threading.Thread`` nobody
waits until the thread has begun. They may also leave the process's table of descriptors (``leave_descriptors``), which
the loop's own way to be woken does not survive: each loop has one more, whose descriptor they keep.
"""

from __future__ import annotations

import _thread
import asyncio
import functools
import os
import threading
import weakref
from collections import deque
from collections.abc import Callable
from typing import Any, TypeVar

from isolator.linux._libc import syscall
from isolator.linux.garbage import CollectorPause

T = TypeVar("T")

_CLOSE_RANGE_UNSHARE, _EVERY = 2, 0xFFFFFFFF

_apart: dict[int, int] = {}
"""The threads that do nothing after what they do now, by their identifiers: the descriptor that each ends by."""
collector = CollectorPause()
"""Paused while threads with a table of descriptors of their own have any open."""


class _Waker:
    """Has a loop call something, from any thread that shares its memory and has its descriptor."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self.fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._calls: deque[Callable[[], None]] = deque()
        loop.add_reader(self.fd, self._woken)
        weakref.finalize(loop, _close, self.fd, os.getpid())  # not before: a thread that ends late still writes to it

    def call(self, function: Callable[[], None]) -> None:
        self._calls.append(function)
        os.eventfd_write(self.fd, 1)

    def _woken(self) -> None:
        os.eventfd_read(self.fd)
        while self._calls:
            self._calls.popleft()()


def _close(fd: int, owner: int) -> None:
    if os.getpid() == owner:  # in a fork the number may be another's
        os.close(fd)


_wakers: weakref.WeakKeyDictionary[asyncio.AbstractEventLoop, _Waker] = weakref.WeakKeyDictionary()


def is_apart() -> bool:
    """Whether the calling thread is one of these, and may leave what the threads of its process share."""
    return threading.get_ident() in _apart


def leave_descriptors() -> None:
    """Give the calling thread, which ends after its work, a table of descriptors of its own, with few or none in it.

    It keeps those that are not above the one that it ends by. The kernel copies no others (from Linux 5.9): a copy of a
    daemon's of a thousand is closed one by one when the thread ends. Raises OSError.
    """
    kept = _apart.get(threading.get_ident(), 2)
    collector.begin()
    syscall("close_range", kept + 1, _EVERY, _CLOSE_RANGE_UNSHARE)


def outcome_of(work: Callable[[], T]) -> tuple[T | None, BaseException | None]:
    """Do ``work``; returns its result, or the error that it raises, whatever that is, for another thread to take."""
    try:
        return work(), None
    except BaseException as error:
        return None, error


def settle(future: asyncio.Future[Any], result: object, error: BaseException | None) -> None:
    """Give a future an outcome, unless nobody waits for it any more."""
    if future.cancelled():
        return
    if error is not None:
        future.set_exception(error)
    else:
        future.set_result(result)


async def apart(work: Callable[[], T]) -> T:
    """Do ``work`` in a thread of its own, and return or raise what it does.

    The thread cannot be cancelled: what it makes after its caller was is lost, unless the caller shields this.
    """
    loop = asyncio.get_running_loop()
    waker = _wakers.get(loop)
    if waker is None:
        waker = _wakers[loop] = _Waker(loop)
    done: asyncio.Future[T] = loop.create_future()

    def body() -> None:
        _apart[threading.get_ident()] = waker.fd
        outcome = outcome_of(work)
        del _apart[threading.get_ident()]
        waker.call(functools.partial(settle, done, *outcome))
        collector.end(threading.get_ident())

    _thread.start_new_thread(body, ())
    return await done
