"""Memory of a process that lasts: its garbage collector, and the heap of the C library."""

from __future__ import annotations

import gc

from isolator.linux._libc import libc


def spare_the_collector() -> None:
    """Keep it from walking the objects of the start-up over and over, and from looking after every few requests.

    Pages of the heap that the start-up alone has used go back to the kernel.
    """
    gc.collect()
    libc.malloc_trim(0)
    gc.freeze()
    gc.set_threshold(20_000, 20, 50)
