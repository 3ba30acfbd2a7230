"""The part of ``./dev vm`` that lives in namespaces of its own (see ``vagrant.run``): a machine, the tests in it."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path

from vagrant import direct, libvirt
from vagrant.box import Box
from vagrant.machine import SSH_FAILED, InfrastructureError, Machine
from vagrant.run import EXIT_INFRASTRUCTURE, RESULTS, parse

_TREE = Path(__file__).parents[1]  # the root-owned copy that ./dev made of the clone
_GUEST_TREE = "isolator"  # in the home of the guest's user, which nobody else can read: as a clone may lie


def main() -> int:
    box, folder = Box(Path(sys.argv[1])), Path(sys.argv[2])
    options = parse(sys.argv[3:])
    subprocess.run(["ip", "link", "set", "lo", "up"], check=True)
    start: Callable[[Box, Path], AbstractContextManager[Machine]] = partial(
        direct.boot if options.direct else libvirt.boot, cpus=options.cpus, memory_mb=options.memory
    )
    if options.command is not None:
        command = f"cd {_GUEST_TREE} && {options.command}"
    else:
        select = [] if options.all else ["-m", "vm"]
        words = ["sudo", "./dev", "test", "--junitxml=/var/tmp/junit.xml", *select, *options.pytest]
        command = f"cd {_GUEST_TREE} && {shlex.join(words)}"
    for attempt in (1, 2):
        work = folder / str(attempt)
        work.mkdir()
        try:
            return _once(start, box, work, command)
        except InfrastructureError as error:
            again = "; trying once more" if attempt == 1 else ""
            print(f"isolator dev: infrastructure, not a test: {error}{again}", file=sys.stderr, flush=True)
    return EXIT_INFRASTRUCTURE


def _once(start: Callable[[Box, Path], AbstractContextManager[Machine]], box: Box, work: Path, command: str) -> int:
    """One machine from start to end; the command's exit code. A command that fails is never run again."""
    began = time.monotonic()
    print("isolator dev: starting the machine", file=sys.stderr, flush=True)
    with start(box, work) as machine:
        machine.send_tree(_TREE, _GUEST_TREE)
        print(f"isolator dev: up after {time.monotonic() - began:.0f} s; $ {command}", file=sys.stderr, flush=True)
        code = machine.ssh(command)
        if code != SSH_FAILED and machine.fetch("/var/tmp/junit.xml", work.parent / "junit.xml"):
            print(f"isolator dev: results: {RESULTS}/junit.xml", file=sys.stderr)
    if code == SSH_FAILED:
        raise InfrastructureError("the connection to the machine broke while the command ran")
    return code


def _with_reaper(work: Callable[[], int]) -> int:
    """Run ``work`` in a child, and be the init of this PID namespace meanwhile: reap whatever loses its parent.

    libvirt's helpers detach themselves, and libvirt then waits, 40 s each, until their zombies are gone.
    """
    worker = os.fork()
    if worker == 0:
        os._exit(_guarded(work))
    while True:
        pid, status = os.wait()
        if pid == worker:
            code = os.waitstatus_to_exitcode(status)
            return code if code >= 0 else 128 - code


def _guarded(work: Callable[[], int]) -> int:
    try:
        return work()
    except BaseException:
        traceback.print_exc()
        return 1
    finally:
        sys.stdout.flush()
        sys.stderr.flush()


if __name__ == "__main__":
    sys.exit(_with_reaper(main))
