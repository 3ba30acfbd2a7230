"""Threads that exist for one piece of work: they may leave the process's namespaces, for they end right after.

Unlike with ``asyncio.to_thread`` nothing of a pool is imported or kept, and unlike with ``threading.Thread`` nobody
waits until the thread has begun.
"""

from __future__ import annotations

import _thread
import asyncio
import contextlib
import threading
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")


_apart: set[int] = set()
"""The threads that do nothing after what they do now, by their identifiers."""


def is_apart() -> bool:
    """Whether the calling thread is one of these, and may leave what the threads of its process share."""
    return threading.get_ident() in _apart


async def apart(work: Callable[[], T]) -> T:
    """Do ``work`` in a thread of its own, and return or raise what it does.

    The thread cannot be cancelled: what it makes after its caller was is lost, unless the caller shields this.
    """
    loop = asyncio.get_running_loop()
    done: asyncio.Future[T] = loop.create_future()

    def settle(made: list[T], errors: list[BaseException]) -> None:
        if done.cancelled():
            return
        if errors:
            done.set_exception(errors[0])
        else:
            done.set_result(made[0])

    def body() -> None:
        _apart.add(threading.get_ident())
        made: list[T] = []
        errors: list[BaseException] = []
        try:
            made.append(work())
        except BaseException as error:  # handed to who awaits it, whatever it is
            errors.append(error)
        _apart.discard(threading.get_ident())
        with contextlib.suppress(RuntimeError):  # the loop has ended
            loop.call_soon_threadsafe(settle, made, errors)

    _thread.start_new_thread(body, ())
    return await done
