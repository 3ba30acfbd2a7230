"""``./dev vm``: what is tried once more, and what is left out, whatever the machine or the tests in it do."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

from vagrant.box import Box
from vagrant.inside import run
from vagrant.legs import legs_for
from vagrant.machine import SSH_FAILED, InfrastructureError, Machine
from vagrant.run import EXIT_INFRASTRUCTURE, parse

REPORT = '<testsuites><testsuite name="{name}"/></testsuites>'


@dataclass(frozen=True)
class Played(Machine):
    """Answers each leg with the next code of a list; ``None`` is a machine that does not come back from its reboot."""

    codes: list[int | None]
    ran: list[str]

    def send_tree(self, tree: Path, target: str) -> None:
        assert (tree / "dev").exists()

    def reboot(self, how: str) -> None:
        if self.codes[0] is None:
            raise InfrastructureError(f"the machine did not come back from '{how}'")

    def ssh(self, command: str, *, stdin: int | None = None, stdout: int | None = None) -> int:
        self.ran.append(command)
        code = self.codes.pop(0)
        assert code is not None
        return code

    def fetch(self, source: str, target: Path) -> bool:
        target.write_text(REPORT.format(name=Path(source).stem))
        return True


@dataclass
class Machines:
    """Every machine that was asked for: a list of codes is one that boots, an empty one does not."""

    lives: list[list[int | None]]
    started: int = 0

    def __post_init__(self) -> None:
        self.ran: list[str] = []

    @contextmanager
    def start(self, _box: Box, folder: Path) -> Iterator[Machine]:
        codes = self.lives[self.started]
        self.started += 1
        if not codes:
            raise InfrastructureError("it did not boot")
        yield Played("nowhere", 22, folder / "key", folder, codes, self.ran)


def options(*words: str) -> Namespace:
    return parse(list(words))


def played(folder: Path, *lives: list[int | None], words: tuple[str, ...] = ()) -> tuple[int, Machines]:
    machines = Machines(list(lives))
    return run(machines.start, Box(folder), folder, options(*words)), machines


@pytest.mark.parametrize("failed", [[], [0, None], [0, 0, SSH_FAILED]], ids=["boot", "reboot", "connection"])
def test_what_breaks_down_is_tried_once_more_from_the_start(
    tmp_path: Path, failed: list[int | None], capfd: pytest.CaptureFixture[str]
) -> None:
    told = list(failed)
    code, machines = played(tmp_path, failed, [0, 0, 0, 0])
    assert (code, machines.started) == (0, 2)
    assert len(machines.ran) == sum(code is not None for code in told) + 4
    assert capfd.readouterr().err.count("infrastructure, not a test") == 1


def test_what_breaks_down_twice_has_an_exit_code_of_its_own(tmp_path: Path) -> None:
    code, machines = played(tmp_path, [], [])
    assert (code, machines.started) == (EXIT_INFRASTRUCTURE, 2)


@pytest.mark.parametrize("number", range(4))
def test_a_failing_test_is_never_tried_again(tmp_path: Path, number: int) -> None:
    codes: list[int | None] = [0, 0, 0, 0]
    codes[number] = 1
    code, machines = played(tmp_path, codes, [0, 0, 0, 0])
    assert (code, machines.started) == (1, 1)


def test_a_failing_test_stays_the_result_when_the_machine_breaks_down_after_it(tmp_path: Path) -> None:
    code, machines = played(tmp_path, [1, SSH_FAILED], [0, 0, 0, 0])
    assert (code, machines.started) == (1, 1)
    assert (tmp_path / "junit.xml").read_text().count("<testsuite ") == 2


def test_no_reboot_after_a_failure_but_the_other_tests_run(tmp_path: Path) -> None:
    _, machines = played(tmp_path, [1, 0])
    assert [("reboot" in command) for command in machines.ran] == [True, False]


def test_which_tests_run() -> None:
    def commands(*words: str) -> list[str]:
        return [leg.command for leg in legs_for(options(*words))]

    assert len(commands()) == 4 and "-m vm" in commands()[-1]
    assert "tests/vm/test_service.py" in commands()[-1] and "tests/test_machine.py" not in commands()[-1]
    assert commands("--all")[:-1] == commands() and "-m 'not vm'" in commands("--all")[-1]
    assert len(commands("--reboots")) == 3
    (one,) = commands("--", "-k", "cgroup")
    assert "-m vm" in one and "ADDOPTS" not in one
    (one,) = commands("--all", "--", "-k", "cgroup")
    assert "-m vm" not in one and one.startswith("sudo PYTEST_ADDOPTS=--all ./dev test ")
    assert commands("--command", "true") == ["true"]
