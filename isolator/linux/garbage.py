"""Memory of a process that lasts: its garbage collector, and the heap of the C library."""

from __future__ import annotations

import gc
import threading

from isolator.linux._libc import libc


def spare_the_collector() -> None:
    """Keep it from walking the objects of the start-up over and over, and from looking after every few requests.

    Pages of the heap that the start-up alone has used go back to the kernel.
    """
    gc.collect()
    libc.malloc_trim(0)
    gc.freeze()
    gc.set_threshold(20_000, 20, 50)


class CollectorPause:
    """Keeps the collector from running in any thread, while some thread has begun a pause and not ended it.

    What it collects may own descriptors, by their numbers: in a thread with a table of its own it would close others'.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._threads: set[int] = set()
        self._was_on = False

    def begin(self) -> None:
        """Pause for the calling thread; harmless when repeated."""
        with self._lock:
            if not self._threads:
                self._was_on = gc.isenabled()
                gc.disable()
            self._threads.add(threading.get_ident())

    def end(self, thread: int) -> None:
        """End a thread's pause, by its identifier, if it has begun one."""
        with self._lock:
            if thread in self._threads:
                self._threads.discard(thread)
                if not self._threads and self._was_on:
                    gc.enable()
