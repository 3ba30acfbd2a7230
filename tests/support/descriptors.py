"""The open descriptors of the tests' process."""

from __future__ import annotations

import contextlib
import gc
import os
import resource
from collections.abc import Collection, Iterator


def open_descriptors() -> list[str]:
    """Their numbers, without those that event loops of earlier tests leave to the collector (``linux/apart.py``)."""
    gc.collect()
    return os.listdir("/proc/self/fd")


def opened_since(before: Collection[str]) -> set[str]:
    """Those that were not open before; an earlier test's event loop may have been collected meanwhile."""
    return set(os.listdir("/proc/self/fd")).difference(before)


@contextlib.contextmanager
def none_free() -> Iterator[None]:
    """Let this process open nothing meanwhile: the kernel answers EMFILE."""
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    highest = max(map(int, os.listdir("/proc/self/fd")))
    held: list[int] = []
    resource.setrlimit(resource.RLIMIT_NOFILE, (highest + 1, limits[1]))
    try:
        with contextlib.suppress(OSError):
            while True:
                held.append(os.dup(0))
        yield
    finally:
        for fd in held:
            os.close(fd)
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
