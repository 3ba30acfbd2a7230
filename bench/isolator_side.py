"""Isolator's side of the cage benchmark: the calls that the supervisor makes, from one warm process.

Timed is a complete cage: journalled, network namespace with its ruleset, cgroup leaf with caps, clone, the
child's layers, every layer confirmed from the kernel, exec of ``/usr/bin/true``, its end, and everything removed again;
or until its exit code is known and nothing of the program runs, which is when the host hears of an invocation's end.
Callers of bubblewrap see the second: it returns while the kernel still takes its namespaces down.

A daemon at rest keeps a warm pool (isolator.cage.warm_pool), whose network has the rules of the cage before, and
refills it a moment after each start: two contenders find it full, as where the same plugin runs again. The others find
it empty, as the second start of a burst does.
"""

from __future__ import annotations

import asyncio
import itertools
import os
import time
from collections.abc import Callable, Coroutine, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

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
TOLD = "isolator, until its exit code is known"
COLD_TOLD = "isolator, nothing made ahead, until its exit code is known"
Noted = dict[str, list[float]]
_UID = 64999  # no user of this number has to exist: a cage is given numbers


@contextmanager
def cages(work: Path) -> Iterator[tuple[list[Contender], dict[str, list[float]]]]:
    """Set up both contenders; yields them, and the first one's milliseconds by step. ``work``: a root-owned folder."""
    paths = Paths.of(work / "root")
    numbers = itertools.count(1)
    steps: Noted = {}
    with asyncio.Runner() as runner:

        async def open_runtime() -> CageRuntime:
            return CageRuntime(Launcher(), Journal(paths.journal), open_subtree(paths.named("isolator-bench")))

        runtime = runner.run(open_runtime())
        loop = runner.get_loop()
        null = os.open("/dev/null", os.O_RDWR | os.O_CLOEXEC)
        stdio = Stdio(null, null, null)
        policy = EffectivePolicy(plugin="bench", resources=ResourcePolicy(cpu=CPU_PERCENT * 10))

        left: list[Cage] = []
        """Cages whose programs have ended."""

        async def start_and_wait(noted: Noted) -> None:
            run = f"r{next(numbers)}"
            spec = CageSpec("bench", run, _UID, _UID, "bench", policy, paths, [TRUE], {"PATH": "/usr/bin:/bin"})
            began = time.perf_counter()
            cage = Cage(spec, runtime, stdio)
            left.append(cage)
            await cage.start()
            started = time.perf_counter()
            end = await cage.wait()
            await cage.processes.silence()
            ended = time.perf_counter()
            if end.returncode != 0:
                raise RuntimeError(f"the caged /usr/bin/true ended with {end.returncode} ({end.cause})")
            around = {"start": started - began, "run": ended - started}
            for step, took in (*cage.steps.items(), *((name, seconds * 1e3) for name, seconds in around.items())):
                noted.setdefault(step, []).append(took)

        async def remove(noted: Noted) -> None:
            began = time.perf_counter()
            while left:
                await left.pop().release()
            noted.setdefault("release", []).append((time.perf_counter() - began) * 1e3)

        async def all_of_it(noted: Noted) -> None:
            await start_and_wait(noted)
            await remove(noted)

        async def make_ahead() -> None:
            runtime.pool.begin(EVERY_LAYER)
            await runtime.pool.filled()

        def contender(name: str, work: Callable[[Noted], Coroutine[Any, Any, None]], *, warm: bool) -> Contender:
            noted = steps if name == NAME else {}

            def before() -> None:
                if warm:
                    runner.run(make_ahead())

            def once() -> None:
                loop.run_until_complete(work(noted))  # as a daemon's loop, which asks for no signal at each start

            return Contender(name, "everything", once, before, after=lambda: runner.run(remove({})))

        try:
            yield (
                [
                    contender(NAME, all_of_it, warm=True),
                    contender(COLD, all_of_it, warm=False),
                    contender(TOLD, start_and_wait, warm=True),
                    contender(COLD_TOLD, start_and_wait, warm=False),
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
