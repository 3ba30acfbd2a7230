"""The memory of TCP's buffers: what a cage holds of the host's one pool beside its memory cap.

The kernel charges a connection's buffers to a control group as it is accepted, and has those of all networks in one
pool (``tcp_mem``, tcp(7)). So connections that a plugin makes to a port of its own, fills and never accepts are in no
cap, and once the pool is used up, TCP fails for the whole host. On cgroup v1 those that it closes with bytes that
nobody reads are beyond the cap, too. A cage that holds much in such connections is ended once the pool is in use to
half of what the kernel thinks nothing of; before that it takes nothing from anybody.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import logging
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Protocol

from isolator.cage.cage import Cage
from isolator.ipc.messages import Origin
from isolator.layers.network.namespace import tcp_memory_of_nobody
from isolator.linux.apart import apart

logger = logging.getLogger(__name__)

INTERVAL = 1.0
"""Seconds between two looks at the pool; a plugin with a quarter of a processor fills some 100 MB in one."""
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
    """Look at the pool from now on; ``runs`` returns the runs that there are."""
    while True:
        await asyncio.sleep(INTERVAL)
        for run in [*runs()] if pool_is_low() else []:
            cage = run.cage
            if cage is None or not cage.started:
                continue
            with contextlib.suppress(OSError):  # it has ended, or this kernel does not tell
                held = await apart(functools.partial(tcp_memory_of_nobody, cage.network))
                if held > cage.spec.policy.resources.memory // SHARE:
                    logger.warning("cage %s is ended: %d bytes in TCP connections of no process", cage.spec.leaf, held)
                    run.terminate(CAUSE, Origin.PLUGIN)


def pool_is_low() -> bool:
    """Whether the buffers take more than half of the first value of ``tcp_mem``; no where it is not told."""
    try:
        used = Path("/proc/net/sockstat").read_text()
        calm = int(Path("/proc/sys/net/ipv4/tcp_mem").read_text().split()[0])
    except OSError:
        return False
    return int(used.partition("TCP: ")[2].partition(" mem ")[2].split()[0]) > calm // 2
