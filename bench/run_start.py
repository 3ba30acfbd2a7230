"""``isolator run -- /usr/bin/true`` from the shell's point of view: spawned, confined, waited for, wall time.

Beside bubblewrap, which sets up namespaces and little else, and firejail, each as ``peers`` has it and in the way most
people call it: the whole file system read-only, no flags besides. ``plain Python`` is the interpreter alone. Through
the daemon it is a user without privilege who runs it (``setpriv`` makes one of this process, in about a millisecond).
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from bench.frame import Contender, Report, Skipped, interleave
from bench.peers import TRUE, bubblewrap, find, firejail, plain, spawn
from isolator.layers.seccomp.layer import compiled

NAME = "isolator run"
BY_USER = "isolator run, through the daemon"
_RUNNER = 64998  # no user of this number has to exist
_REST_SECONDS = 0.3
"""After a start a daemon at rest makes the next cage's parts ahead."""


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
        with _daemon(work, skipped) as by_user:
            series = interleave([*usable, *by_user], rounds)
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


@contextmanager
def _daemon(work: Path, skipped: list[Skipped]) -> Iterator[list[Contender]]:
    """The contender that needs a daemon, and one for it, without a network."""
    root = work / "daemon"
    (root / "etc/isolator").mkdir(parents=True)
    (root / "etc/isolator/host.toml").write_text(f"[roles]\nrunner = [{_RUNNER}]\n")
    program = os.path.join(os.path.dirname(sys.executable), "isolator")
    command = [program, "--root", str(root)]
    process = subprocess.Popen(["unshare", "-n", *command, "serve"], stdout=subprocess.PIPE, stdin=subprocess.DEVNULL)
    assert process.stdout is not None
    try:
        process.stdout.readline()
        user = [find("setpriv"), f"--reuid={_RUNNER}", f"--regid={_RUNNER}", "--clear-groups", "--"]
        argv = [*user, *command, "run", "--", TRUE]
        contender = Contender(BY_USER, "everything, by a user", lambda: spawn(argv), lambda: time.sleep(_REST_SECONDS))
        try:
            contender.once()
        except (OSError, RuntimeError) as error:
            skipped.append(Skipped(BY_USER, str(error)))
            yield []
        else:
            yield [contender]
    finally:
        process.terminate()
        process.wait()
        process.stdout.close()
        subprocess.run([*command, "uninstall", "--purge", "--yes"], check=False, stdout=subprocess.DEVNULL)
