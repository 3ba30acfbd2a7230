"""A thousand plugins registered, two hundred of them running: start of the daemon, listing, memory, work at rest.

The plugins are those of ``many``; goals: ready after 3 s, ``plugin list`` in 0.5 s. The start is that of a daemon which
ended by itself; the plugins are started after it, by a verb each. Rows of the table are times; memory (PSS) and
processor time at rest, of all the daemon's processes, stand below it.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from bench.frame import Report, Series
from bench.many import at_rest, for_all, memory, register
from host.client.client import Client
from tests.system.daemon import Daemon, daemon

REGISTERED, RUNNING = 1000, 200
ADDING = 8
"""Plugins that are added at one time."""
STARTS, LISTS = 3, 10


def measure(rounds: int) -> Report:
    """Run ``STARTS`` starts and ``LISTS`` listings of each kind, however many ``rounds`` are asked for."""
    with tempfile.TemporaryDirectory(prefix="isolator-bench-") as folder, daemon() as running:
        work = Path(folder)
        work.chmod(0o755)
        names = register(running, work, REGISTERED, ADDING)
        for_all(running, names[:RUNNING], "plugin.start")  # makes the images, which happens once in a plugin's life
        starts = [_start(running) for _ in range(STARTS)]
        before = memory(running)
        for_all(running, names[:RUNNING], "plugin.start")
        commands = [_timed(lambda: running.cli("plugin", "list")) for _ in range(LISTS)]
        with Client(running.root) as client:
            verbs = [_timed(lambda: client.call("plugin.list")) for _ in range(LISTS)]
        idle = at_rest(running)
        after = memory(running)
    figures = ", ".join(f"{name} {kib / 1024:.0f}" for name, kib in after.items())
    return Report(
        name="registered",
        title=f"{REGISTERED} plugins registered, {RUNNING} running",
        series=(
            Series("start of the daemon to ready", "goal 3000", "ms", tuple(starts)),
            Series("isolator plugin list", "goal 500", "ms", tuple(commands)),
            Series("the verb plugin.list", "on an open connection", "ms", tuple(verbs)),
        ),
        notes=(
            f"memory (PSS) in MiB: {sum(after.values()) / 1024:.0f} ({figures}); "
            f"{sum(before.values()) / 1024:.0f} before the first start",
            f"processor time at rest: {idle:.2f} % of one",
        ),
    )


def _start(running: Daemon) -> float:
    running.stop(timeout=120)
    return _timed(running.start)


def _timed(work: Callable[[], object]) -> float:
    """Milliseconds that ``work`` takes."""
    began = time.perf_counter()
    work()
    return (time.perf_counter() - began) * 1e3
