"""What is run in the machine, and in which order: tests that start it anew, and all others.

A reboot ends whoever asks for it, so the outside does it, between two pytest runs: ``tests/vm/reboot_before.py`` puts
the service to work and leaves it in the middle of that, ``tests/vm/reboot_after.py`` looks at what has become of it.
First the host goes down in order; then, without a warning to anybody, the kernel restarts at once, as after a power
cut: what was not synced to the disk is gone. Under emulation an installation takes a minute, so the other tests of the
service come last and use the one that is there.
"""

from __future__ import annotations

import shlex
from argparse import Namespace
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from xml.etree import ElementTree

GUEST_TREE = "isolator"  # in the home of the guest's user, which nobody else can read: as a clone may lie

_ORDERLY = "sudo systemctl reboot"
_POWER_CUT = "echo b | sudo tee /proc/sysrq-trigger"


@dataclass(frozen=True)
class Leg:
    """One command in the guest's tree.

    ``reboot``: how the machine is started anew before it; such a leg is left out when the one before it has failed.
    """

    name: str
    command: str
    report: str = ""
    reboot: str | None = None


@dataclass
class Outcome:
    """What is known so far: the first exit code that is not 0, and the reports on this side."""

    code: int = 0
    last_passed: bool = True
    reports: list[Path] = field(default_factory=list)

    def add(self, leg: Leg, code: int) -> None:
        """Take in one leg's exit code."""
        self.code = self.code or code
        self.last_passed = code == 0


def legs_for(options: Namespace) -> list[Leg]:
    """The legs of one run, from the command line."""
    if options.command is not None:
        return [Leg("command", options.command)]
    if options.pytest:  # somebody is after certain tests
        return [_pytest("tests", *([] if options.all else ["-m", "vm"]), *options.pytest, wide=options.all)]
    tests = [_pytest("tests", "-m", "vm", *_marked_files())]
    if options.all:
        # The marked ones have the machine to themselves: they set its clock and fill its disk. The others mostly wait.
        tests.append(_pytest("others", "-m", "not vm", "-n", str(options.cpus), "--dist", "loadfile"))
    kept, before, after = "--leaks=off", "tests/vm/reboot_before.py", "tests/vm/reboot_after.py"
    reboots = [
        _pytest("reboot-1", kept, before),
        _pytest("reboot-2", kept, after, before, reboot=_ORDERLY),
        _pytest("reboot-3", kept, after, reboot=_POWER_CUT),
    ]
    return reboots if options.reboots else [*reboots, *tests]


def _marked_files() -> list[str]:
    """Where the marked tests are: to import all the others, only to find no mark in them, takes the better part of a
    minute under emulation."""
    tree = Path(__file__).parents[1]
    files = [path for path in sorted(tree.glob("tests/**/test_*.py")) if "mark.vm" in path.read_text()]
    return [str(path.relative_to(tree)) for path in files]


def _pytest(name: str, *words: str, reboot: str | None = None, wide: bool = False) -> Leg:
    """One run of pytest; ``wide``: also what is marked so, without packages that can only be fetched outside."""
    report = f"/var/tmp/junit-{name}.xml"
    command = ["sudo", *(["PYTEST_ADDOPTS=--all"] if wide else []), "./dev", "test", f"--junitxml={report}"]
    command += ["-o", f"junit_suite_name={name}", "-v", *words]
    return Leg(name, shlex.join(command), report, reboot)


def merge(reports: Sequence[Path], target: Path) -> bool:
    """Write the suites of several junit files into one; False if there are none."""
    suites = [suite for report in reports for suite in ElementTree.parse(report).getroot().iter("testsuite")]
    if suites:
        whole = ElementTree.Element("testsuites")
        whole.extend(suites)
        ElementTree.ElementTree(whole).write(target, encoding="utf-8", xml_declaration=True)
    return bool(suites)
