"""The part of ``./dev vm`` that lives in namespaces of its own (see ``vagrant.run``): a machine, the tests in it."""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
import sys
import time
import traceback
from argparse import Namespace
from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path

from vagrant import direct, libvirt
from vagrant.box import Box
from vagrant.legs import GUEST_TREE, Leg, Outcome, legs_for, merge
from vagrant.machine import SSH_FAILED, InfrastructureError, Machine, say
from vagrant.run import EXIT_INFRASTRUCTURE, PID_OUTSIDE, RESULTS, parse

_TREE = Path(__file__).parents[1]  # the root-owned copy that ./dev made of the clone

Start = Callable[[Box, Path], AbstractContextManager[Machine]]


def main() -> int:
    box, folder = Box(Path(sys.argv[1])), Path(sys.argv[2])
    options = parse(sys.argv[3:])
    subprocess.run(["ip", "link", "set", "lo", "up"], check=True)
    boot = direct.boot if options.direct else libvirt.boot
    return run(partial(boot, cpus=options.cpus, memory_mb=options.memory), box, folder, options)


def run(start: Start, box: Box, folder: Path, options: Namespace) -> int:
    """Every leg in a machine that ``start`` gives, in a second one if the first breaks down; the exit code.

    ``folder`` (temporary) takes the merged report, and a folder of its own for each machine.
    """
    for attempt in (1, 2):
        work = folder / str(attempt)
        work.mkdir()
        outcome = Outcome()
        try:
            _once(start, box, work, options, outcome)
            return outcome.code
        except InfrastructureError as error:
            say(f"infrastructure, not a test: {error}")
            if outcome.code:  # what has failed by then is a result, and is not tried again until it passes
                return outcome.code
            if attempt == 1:
                say("trying once more, with another machine")
        finally:
            if merge(outcome.reports, folder / "junit.xml"):
                say(f"results: {RESULTS}/junit.xml")
    return EXIT_INFRASTRUCTURE


def _once(start: Start, box: Box, work: Path, options: Namespace, outcome: Outcome) -> None:
    """One machine from start to end, and every leg in it once."""
    began = time.monotonic()
    say(f"starting the machine ({'QEMU' if options.direct else 'Vagrant'}; it is emulated in software)")
    with start(box, work) as machine:
        machine.send_tree(_TREE, GUEST_TREE)
        say(f"the machine is up after {time.monotonic() - began:.0f} s")
        for leg in legs_for(options):
            _walk(leg, machine, work, outcome)
        if options.stay:
            _stay(machine)
    say(f"the machine is gone; {time.monotonic() - began:.0f} s in all")


def _walk(leg: Leg, machine: Machine, work: Path, outcome: Outcome) -> None:
    """Run one leg, and fetch its report."""
    if leg.reboot is not None and outcome.last_passed:
        say(f"starting the machine anew: {leg.reboot}")
        machine.reboot(leg.reboot)
    elif leg.reboot is not None:
        say(f"'{leg.name}' is left out: what comes before it has failed")
        return
    say(f"{leg.name}: $ {leg.command}")
    began = time.monotonic()
    code = machine.ssh(f"cd {GUEST_TREE} && {leg.command}")
    if leg.report and machine.fetch(leg.report, work / Path(leg.report).name):
        outcome.reports.append(work / Path(leg.report).name)
    if code == SSH_FAILED:
        raise InfrastructureError(f"the connection to the machine broke during '{leg.name}'")
    outcome.add(leg, code)
    say(f"{leg.name}: {'passed' if code == 0 else f'FAILED ({code})'} after {time.monotonic() - began:.0f} s")


def _stay(machine: Machine) -> None:
    """Keep the machine for somebody who wants to look around in it."""
    enter = ["nsenter", "-t", os.environ[PID_OUTSIDE], "-n", *machine.ssh_command()]
    say(f"the machine stays until ^C; to enter it: sudo {shlex.join(enter)}")
    signal.pause()


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
