"""Isolator's side of the cage benchmark: the calls that the supervisor makes, from one warm process.

Timed is a complete cage: journalled, network namespace with its ruleset, cgroup leaf with caps, clone, the
child's layers, every layer confirmed from the kernel, exec of ``/usr/bin/true``, its end, and everything removed again.

There are two contenders. A daemon at rest keeps a warm pool (isolator.cage.warm_pool) and refills it a moment after
each start: the first contender finds it full. The second finds it empty, as the second start of a burst does.
"""

from __future__ import annotations

import asyncio
import itertools
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from bench.frame import Contender
from bench.peers import CPU_PERCENT, TRUE
from isolator.cage.cage import Cage, Stdio
from isolator.cage.runtime import CageRuntime
from isolator.launcher.client import Launcher
from isolator.layers.base import CageSpec
from isolator.layers.cgroup.subtree import open_subtree
from isolator.layers.ledger import EVERY_LAYER
from isolator.paths import Paths
from isolator.policy.model import EffectivePolicy, ResourcePolicy
from isolator.recovery.journal import Journal

NAME = "isolator"
COLD = "isolator, nothing made ahead"
_UID = 64999  # no user of this number has to exist: a cage is given numbers


@contextmanager
def cages(work: Path) -> Iterator[tuple[list[Contender], dict[str, list[float]]]]:
    """Set up both contenders; yields them, and the first one's milliseconds by step. ``work``: a root-owned folder."""
    paths = Paths.of(work / "root")
    numbers = itertools.count(1)
    steps: dict[str, list[float]] = {}
    with asyncio.Runner() as runner:

        async def open_runtime() -> CageRuntime:
            return CageRuntime(Launcher(), Journal(paths.journal), open_subtree(paths.named("isolator-bench")))

        runtime = runner.run(open_runtime())
        null = os.open("/dev/null", os.O_RDWR | os.O_CLOEXEC)
        stdio = Stdio(null, null, null)
        policy = EffectivePolicy(plugin="bench", resources=ResourcePolicy(cpu=CPU_PERCENT * 10))

        async def start_and_wait(noted: dict[str, list[float]]) -> None:
            run = f"r{next(numbers)}"
            spec = CageSpec("bench", run, _UID, _UID, "bench", policy, paths, [TRUE], {"PATH": "/usr/bin:/bin"})
            began = time.perf_counter()
            async with Cage(spec, runtime, stdio) as cage:
                await cage.start()
                started = time.perf_counter()
                end = await cage.wait()
                ended = time.perf_counter()
            released = time.perf_counter()
            if end.returncode != 0:
                raise RuntimeError(f"the caged /usr/bin/true ended with {end.returncode} ({end.cause})")
            around = {"start": started - began, "run": ended - started, "release": released - ended}
            for step, took in (*cage.steps.items(), *((name, seconds * 1e3) for name, seconds in around.items())):
                noted.setdefault(step, []).append(took)

        async def make_ahead() -> None:
            runtime.pool.begin(EVERY_LAYER)
            await runtime.pool.filled()

        try:
            yield (
                [
                    Contender(
                        NAME, "everything", lambda: runner.run(start_and_wait(steps)), lambda: runner.run(make_ahead())
                    ),
                    Contender(COLD, "everything", lambda: runner.run(start_and_wait({}))),
                ],
                steps,
            )
        finally:
            os.close(null)

            async def close() -> None:
                await runtime.pool.close()
                runtime.launcher.close()
                runtime.subtree.remove()
                runtime.journal.close()

            runner.run(close())
