"""Threads that exist for one piece of work: they may leave the process's namespaces, for they end right after.

Unlike ``asyncio.to_thread`` nothing of a pool is imported or kept.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")


class Apart(threading.Thread):
    """A thread that does nothing after its work, so that it may leave what its process's threads share."""

    def __init__(self, work: Callable[[], None]) -> None:
        super().__init__(target=work, name="apart", daemon=True)


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
        made: list[T] = []
        errors: list[BaseException] = []
        try:
            made.append(work())
        except BaseException as error:  # handed to who awaits it, whatever it is
            errors.append(error)
        with contextlib.suppress(RuntimeError):  # the loop has ended
            loop.call_soon_threadsafe(settle, made, errors)

    Apart(body).start()
    return await done
