"""Descriptors of strangers are closed in threads of their own.

Closing the last reference may take as long as who opened it likes (socket(7), SO_LINGER; a file system in user space).
So many threads and no more: whoever would need another one waits at the door.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import Iterable

from isolator.linux.descriptors import close_all

MOST = 64
"""Threads that close at a time."""


class Closers:
    """The threads that close strangers' descriptors for one event loop."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._under_way = 0

    @property
    def exhausted(self) -> bool:
        """Whether so many hang that no more connections may be accepted."""
        return self._under_way >= MOST

    async def close(self, fds: Iterable[int]) -> None:
        """Close descriptors, and return when they are closed, however long that takes."""
        owned = [fd for fd in fds if fd >= 0]
        if not owned:
            return
        done = self._loop.create_future()
        self._under_way += 1

        def work() -> None:
            close_all(owned)
            with contextlib.suppress(RuntimeError):  # the loop has ended
                self._loop.call_soon_threadsafe(self._closed, done)

        threading.Thread(target=work, name="close", daemon=True).start()
        await asyncio.shield(done)

    def _closed(self, done: asyncio.Future[None]) -> None:
        self._under_way -= 1
        if not done.done():
            done.set_result(None)
