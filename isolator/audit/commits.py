"""The writer's thread: it does the work on the files, a call at a time, and the event loop goes on meanwhile.

An executor of the standard library makes two futures for each call, one of them with a lock, and passes the outcome
from one to the other: that took a tenth of the writer's processor time at a thousand events a second.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import Callable
from queue import SimpleQueue
from typing import Any, TypeVar

from isolator.linux.apart import outcome_of, settle

T = TypeVar("T")


class FileThread:
    """One thread. ``call`` has it do something, ``close`` waits until all of that is done."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._calls: SimpleQueue[tuple[asyncio.Future[Any], Callable[[], Any]] | None] = SimpleQueue()
        self._thread = threading.Thread(target=self._serve, name="commit", daemon=True)  # a process that fails ends
        self._thread.start()

    def call(self, function: Callable[[], T]) -> asyncio.Future[T]:
        """Have ``function`` called in the thread; the future has what it returns or raises."""
        future: asyncio.Future[T] = self._loop.create_future()
        self._calls.put((future, function))
        return future

    def close(self) -> None:
        """Let the thread end, and wait for it."""
        self._calls.put(None)
        self._thread.join()

    def _serve(self) -> None:
        while (call := self._calls.get()) is not None:
            future, function = call
            result, error = outcome_of(function)
            with contextlib.suppress(RuntimeError):  # the loop is closed: nobody waits
                self._loop.call_soon_threadsafe(settle, future, result, error)
