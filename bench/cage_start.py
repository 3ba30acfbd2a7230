"""Start of a cage: ``/usr/bin/true``, confined and waited for, wall time, beside the tools of today.

Isolator's figure is taken in a warm process, as the daemon starts its sidecars; the peers are command-line tools and
are timed as such, spawned with vfork, so that no interpreter's fork is put on their bill.

A peer returns when its program's exit code is known, and the kernel takes its namespaces down behind it. So there are
two rows of Isolator's, and two of bubblewrap's: until the exit code is known, and until nothing is left.
"""

from __future__ import annotations

import statistics
import tempfile
from pathlib import Path

from bench import isolator_side
from bench.frame import Report, interleave
from bench.peers import BUBBLEWRAP, Orphans, bubblewrap, peers
from isolator.layers.seccomp.layer import compiled


def measure(rounds: int) -> Report:
    """Time every contender that works on this host, ``rounds`` times each."""
    with tempfile.TemporaryDirectory(prefix="isolator-bench-") as folder:
        work = Path(folder)
        work.chmod(0o755)
        program = work / "filter.bpf"
        program.write_bytes(compiled("default", work))
        with (
            Orphans() as orphans,
            peers(work, program) as (usable, skipped),
            isolator_side.cages(work) as (isolator, steps),
        ):
            contenders = [orphans.settled(one) for one in usable]
            if any(one.name == BUBBLEWRAP for one in usable):
                contenders.append(orphans.until_removed(bubblewrap(work, program)))
            series = interleave([*contenders, *isolator], rounds)
    breakdown = ", ".join(f"{step} {statistics.median(took):.2f}" for step, took in steps.items())
    return Report(
        name="cage_start",
        title="Starting a cage (/usr/bin/true, confined, waited for)",
        series=tuple(sorted(series, key=lambda one: one.median)),
        skipped=tuple(skipped),
        baselines=("plain spawn", BUBBLEWRAP, f"{BUBBLEWRAP}, until all is removed"),
        notes=(f"isolator, medians in ms by step: {breakdown}",),
    )
