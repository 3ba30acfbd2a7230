"""TCP's memory: what a cage holds of the host's beside its memory cap.

The kernel charges a connection and its buffers to a control group as it is accepted, and has the buffers of all
networks in one pool (``tcp_mem``, tcp(7)). So connections that a plugin makes to a port of its own, fills and never
accepts are in no cap, and once the pool is used up, TCP fails for the whole host. On cgroup v1 those that it closes
with bytes that nobody reads are beyond the cap, too. A cage that holds much in such connections is ended once TCP
takes, in all, half of the memory of which the kernel thinks nothing; before that it takes nothing from anybody.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import logging
import os
import time
from collections.abc import Callable, Iterable
from mmap import PAGESIZE
from typing import Protocol

from isolator.cage.cage import Cage
from isolator.ipc.messages import Origin
from isolator.layers.cgroup.leaf import read_file
from isolator.layers.network.namespace import tcp_memory_of_nobody
from isolator.linux.apart import apart
from isolator.linux.netlink import TCP_SOCKET

logger = logging.getLogger(__name__)

INTERVAL, LONGEST = 1.0, 5.0
"""Seconds between two looks, and after one that took long; a plugin with a quarter of a processor fills some 100 MB in
one second."""
LOOKING = 50
"""Looks take one part in so many of the time, unless that would put them off for longer."""
SHARE = 8
"""A cage may hold this part of its memory cap in connections of no process."""
CAUSE = "connections that no process has hold too much memory"


class Holder(Protocol):
    """A run, which may have a cage."""

    @property
    def cage(self) -> Cage | None:
        """Its cage."""

    def terminate(self, cause: str, origin: Origin) -> None:
        """End it at once."""


async def keep_tcp_memory(runs: Callable[[], Iterable[Holder]]) -> None:
    """Look from now on; ``runs`` returns the runs that there are."""
    while True:
        began = time.monotonic()
        for run in [*runs()] if is_much_in_use() else []:
            cage = run.cage
            if cage is None or not cage.started or not cage.processes.lasts:
                continue
            with contextlib.suppress(OSError):  # it has ended, or this kernel does not tell
                held = await apart(functools.partial(tcp_memory_of_nobody, cage.network))
                if held > cage.spec.policy.resources.memory // SHARE and cage.processes.lasts:
                    logger.info("cage %s is ended: %d bytes for TCP connections of no process", cage.spec.leaf, held)
                    run.terminate(CAUSE, Origin.PLUGIN)
        await asyncio.sleep(min(max(INTERVAL, (time.monotonic() - began) * LOOKING), LONGEST))


def is_much_in_use() -> bool:
    """Whether TCP takes more than half of the first value of ``tcp_mem``; no where the kernel does not tell."""
    try:
        words = read_file("/proc/net/sockstat").partition("TCP: ")[2].split()
        connections, pages = (int(words[words.index(name) + 1]) for name in ("alloc", "mem"))
        return pages + connections * TCP_SOCKET // PAGESIZE > _calm() // 2
    except OSError:
        return False


@functools.cache
def _calm() -> int:
    """The first value of ``tcp_mem``, in pages, as it was at the first look: /proc/sys takes long to look through.

    The kernel shows it in the host's first network alone; elsewhere, as in a container, it is taken for what the kernel
    makes it at boot, three quarters of a sixteenth of the memory (``tcp_init_mem``).
    """
    try:
        return int(read_file("/proc/sys/net/ipv4/tcp_mem").split()[0])
    except FileNotFoundError:
        return os.sysconf("SC_PHYS_PAGES") * 3 // 64
