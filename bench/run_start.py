"""``isolator run -- /usr/bin/true`` from the shell's point of view: spawned, confined, waited for, wall time.

Beside bubblewrap, which sets up namespaces and little else, and firejail, each as ``peers`` has it and in the way most
people call it: the whole file system read-only, no flags besides. ``plain Python`` is the interpreter alone.
"""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

from bench.frame import Contender, Report, Skipped, interleave
from bench.peers import TRUE, bubblewrap, find, firejail, plain, spawn
from isolator.layers.seccomp.layer import compiled

NAME = "isolator run"


def measure(rounds: int) -> Report:
    """Time every contender that works on this host, ``rounds`` times each."""
    with tempfile.TemporaryDirectory(prefix="isolator-bench-") as folder:
        work = Path(folder)
        work.chmod(0o755)
        program = work / "filter.bpf"
        program.write_bytes(compiled("default", work))
        usable: list[Contender] = []
        skipped: list[Skipped] = []
        for make in (plain, bubblewrap, _simple_bubblewrap, _simple_firejail, firejail, _python, _isolator):
            contender = _tried(make, work, program)
            if isinstance(contender, Contender):
                usable.append(contender)
            else:
                skipped.append(contender)
        series = interleave(usable, rounds)
    return Report(
        name="run_start",
        title="One command in a cage of its own, from the command line (/usr/bin/true)",
        series=tuple(sorted(series, key=lambda one: one.median)),
        skipped=tuple(skipped),
        baselines=("plain spawn", "bubblewrap, read-only host", "firejail, as it comes"),
    )


def _tried(make: Callable[[Path, Path], Contender], work: Path, program: Path) -> Contender | Skipped:
    try:
        contender = make(work, program)
        contender.once()
    except (OSError, RuntimeError) as error:
        return Skipped(make.__name__.strip("_").replace("_", " "), str(error))
    return contender


def _simple_bubblewrap(_work: Path, _program: Path) -> Contender:
    argv = [find("bwrap"), "--ro-bind", "/", "/", TRUE]
    return Contender("bubblewrap, read-only host", "a mount namespace alone", lambda: spawn(argv))


def _simple_firejail(_work: Path, _program: Path) -> Contender:
    argv = [find("firejail"), "--quiet", TRUE]
    return Contender("firejail, as it comes", "its default profile", lambda: spawn(argv))


def _python(_work: Path, _program: Path) -> Contender:
    argv = [sys.executable, "-I", "-c", ""]
    return Contender("plain Python", "nothing", lambda: spawn(argv))


def _isolator(work: Path, _program: Path) -> Contender:
    argv = [os.path.join(os.path.dirname(sys.executable), "isolator"), "--root", str(work / "root"), "run", "--", TRUE]
    return Contender(NAME, "everything, no daemon", lambda: spawn(argv))
