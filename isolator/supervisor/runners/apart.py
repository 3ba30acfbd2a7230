"""Descriptors of strangers are closed in threads of their own.

Closing the last reference may take as long as who opened it likes (socket(7), SO_LINGER; a file system in user space).
Each user has one thread, and what hangs in it holds up that user's own alone; one that has too much to close is not let
in until it is closed.

No thread may be left at an exec of this process, which would wait for one that hangs in a file system, and closes what
it is not told to keep. A signal ends the wait for a connection, whose close goes on in the kernel; not that for a file.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterable

MOST = 1024
"""Descriptors of one user's that may wait to be closed before it is let in no more."""
_INTERRUPT = signal.SIGUSR2
_SECONDS, _BEAT = 2.0, 0.01
"""For interrupted threads to end, and between two interrupts."""


class Closers:
    """The threads that close strangers' descriptors for one event loop."""

    def __init__(self, crowded: Callable[[], None] = lambda: None) -> None:
        """``crowded`` is called when the answer of ``exhausted`` has changed for somebody."""
        self._loop = asyncio.get_running_loop()
        self._lock = threading.Lock()
        self._waiting: dict[int, deque[tuple[int, asyncio.Future[None] | None]]] = {}
        """By uid, in the order in which they are closed, descriptors and what is done then."""
        self._running: dict[int, threading.Thread] = {}
        """The threads by uid."""
        self._crowded, self._paused = crowded, False
        self._full: set[int] = set()
        signal.signal(_INTERRUPT, lambda *_: None)  # for good: a thread may come back to it much later

    @property
    def exhausted(self) -> frozenset[int]:
        """The uids that are to be let in no more."""
        return frozenset(self._full)

    async def close(self, uid: int, fds: Iterable[int]) -> None:
        """Close descriptors of a user's, and return when they are closed, however long that takes."""
        owned = [fd for fd in fds if fd >= 0]
        if owned:
            done = self._loop.create_future()
            self._add(uid, [*((fd, None) for fd in owned[:-1]), (owned[-1], done)])
            await asyncio.shield(done)

    @property
    def unclosed(self) -> tuple[int, ...]:
        """The descriptors that wait to be closed; those that are being closed are not among them."""
        with self._lock:
            return tuple(fd for waiting in self._waiting.values() for fd, _ in waiting)

    async def pause(self) -> frozenset[int]:
        """Begin to close none any more, until ``go_on``; returns the uids whose descriptors hang in spite of that."""
        with self._lock:
            self._paused = True
        end = self._loop.time() + _SECONDS
        while self._running and self._loop.time() < end:
            with self._lock:  # whoever is among them has not ended
                for thread in self._running.values():
                    signal.pthread_kill(thread.ident or 0, _INTERRUPT)
            await asyncio.sleep(_BEAT)
        return frozenset(self._running)

    def go_on(self) -> None:
        """Close what waits."""
        with self._lock:
            self._paused = False
            for uid in self._waiting:
                self._start(uid)

    def _add(self, uid: int, more: Iterable[tuple[int, asyncio.Future[None] | None]]) -> None:
        with self._lock:
            self._waiting.setdefault(uid, deque()).extend(more)
            self._start(uid)
        self._look(uid)

    def _start(self, uid: int) -> None:
        if uid not in self._running and not self._paused:
            thread = self._running[uid] = threading.Thread(target=self._work, args=(uid,), name="close", daemon=True)
            thread.start()

    def _work(self, uid: int) -> None:
        while True:
            with self._lock:
                waiting = self._waiting[uid]
                if self._paused or not waiting:
                    if not waiting:
                        del self._waiting[uid]
                    del self._running[uid]
                    return
                fd, done = waiting.popleft()
            with contextlib.suppress(OSError):
                os.close(fd)
            with contextlib.suppress(RuntimeError):  # the loop has ended
                self._loop.call_soon_threadsafe(self._closed, uid, done)

    def _closed(self, uid: int, done: asyncio.Future[None] | None) -> None:
        self._look(uid)
        if done is not None and not done.done():
            done.set_result(None)

    def _look(self, uid: int) -> None:
        with self._lock:
            full = len(self._waiting.get(uid, ())) >= MOST
        if full != (uid in self._full):
            self._full ^= {uid}
            self._crowded()
