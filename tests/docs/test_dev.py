"""``./dev``: unknown options are refused before anything is done; which failures of the suite are run once more."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from argparse import SUPPRESS, ArgumentParser
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from bench.run import BENCHMARKS, LONG
from bench.run import parser as bench
from tests.docs.blocks import PAGES, blocks
from vagrant.run import parser as vm

REPO = Path(__file__).resolve().parents[2]


COMMANDS = re.findall(
    r"^([a-z]+)(?: \| [a-z| -]+)?\)$", (REPO / "dev").read_text().partition("\ncase $command in")[2], re.M
)
PYTEST = "test"
"""The command whose options are pytest's."""


def dev(*words: str) -> subprocess.CompletedProcess[str]:
    """Run ``./dev``."""
    return subprocess.run(["sh", REPO / "dev", *words], capture_output=True, text=True, check=False)


def test_every_command_of_the_help_is_looked_at() -> None:
    assert set(re.findall(r"^  ([a-z]+) ", dev("help").stdout, re.M)) == set(COMMANDS)


@pytest.mark.parametrize("command", sorted({*COMMANDS} - {PYTEST}))
@pytest.mark.parametrize("words", [("--nonsense",), ("-x", "word")], ids="-".join)
def test_unknown_option_is_refused_at_once(command: str, words: tuple[str, ...]) -> None:
    ran = dev(command, *words)
    assert (ran.returncode, ran.stdout) == (2, ""), ran
    assert f"{command}: takes no option" in ran.stderr and words[0] in ran.stderr and ran.stderr.count("\n") == 1


def test_unknown_option_of_the_tests_is_refused_by_pytest() -> None:
    ran = subprocess.run(
        [sys.executable, "-I", "-m", "pytest", "--nonsense", "tests/docs"],
        cwd=REPO, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert ran.returncode == 4 and "unrecognized arguments: --nonsense" in ran.stderr


@pytest.mark.parametrize(("command", "parser", "more"), [("vm", vm, ()), ("bench", bench, ("--plots",))])
def test_options_that_are_let_through_are_those_of_the_program(
    command: str, parser: Callable[[], ArgumentParser], more: tuple[str, ...]
) -> None:
    found = re.search(rf'^{command}_options="(.*)"$', (REPO / "dev").read_text(), re.M)
    own = {
        option + ("" if action.nargs == 0 or action.help == SUPPRESS else "=")
        for action in parser()._actions
        for option in action.option_strings
        if option.startswith("--") and option not in ("--help", "--commit")
    }
    assert found is not None and {*found[1].split()} == {*own, *more}


@pytest.mark.parametrize(
    "words", [("--release", "x", "--nonsense"), ("--release=x", "--nonsense"), ("--memory", "-x", "--nonsense")]
)
def test_value_of_an_option_is_none(words: tuple[str, ...]) -> None:
    ran = dev("vm", *words)
    assert ran.returncode == 2 and "vm: takes no option --nonsense, only: --all" in ran.stderr


def test_fuzz_takes_seconds_first() -> None:
    ran = dev("fuzz", "wire")
    assert ran.returncode == 2 and "takes a number of seconds" in ran.stderr


def lines() -> Iterator[tuple[str, str]]:
    """Page and words of every command that begins with ``./dev`` in a block of a page."""
    for page in PAGES:
        for block in blocks(page):
            for command, _ in block.steps() if block.is_shell else ():
                if found := re.match(r"(?:sudo )?\./dev (.*)", command):
                    yield block.page, found[1]


@pytest.mark.parametrize(("page", "line"), [*lines()])
def test_line_of_a_page_is_a_command_of_dev_and_names_what_there_is(page: str, line: str) -> None:
    command, *words = shlex.split(line, comments=True)
    assert command in COMMANDS
    if command == "bench":
        names = bench().parse_args([word for word in words if word != "--quick"]).names
        assert {*names} <= {*BENCHMARKS, *LONG}
    if command == "vm":
        vm().parse_args(words)
    if command in ("demo", "setup", "shell"):
        assert {*words} <= {"--browser", "--screenshot", "DIR", "--hosts", "3"}
    if command == "test":
        places = [word for word in words if word.startswith("tests")]
        assert all((REPO / place).exists() for place in places)
        chosen = [*places, *words[words.index("-k") :][:2]] if "-k" in words else []
        assert not chosen or _collects(chosen)


def _collects(chosen: list[str]) -> bool:
    """Whether pytest finds a test; without conftest.py, which compares the host before and after."""
    command = [sys.executable, "-I", "-m", "pytest", "--noconftest", "--collect-only", "-q", *chosen]
    return subprocess.run(command, cwd=REPO, capture_output=True, check=False).returncode == 0


def test_screenshots_need_a_folder(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for words in (["--screenshot"], ["--screenshot", "--browser"], ["--screenshot", str(tmp_path / "file")]):
        ran = subprocess.run(["sh", REPO / "dev", "demo", *words], capture_output=True, text=True, check=False)
        assert ran.returncode == 2 and ("--screenshot takes a folder" in ran.stderr or "File exists" in ran.stderr)


_PYTEST = """#!/bin/sh
echo "ran $*"
case "$*" in *--last-failed*) exit {again} ;; esac
printf '{lines}' >"{file}"
exit {first}
"""


@pytest.mark.parametrize(
    ("first", "failed", "again", "status", "runs"),
    [
        (0, 0, 0, 0, 1),
        (1, 2, 0, 0, 2),
        (1, 2, 1, 1, 2),
        (1, 4, 0, 1, 1),
        (1, 0, 0, 1, 1),
        (10, 1, 0, 10, 1),
        (11, 1, 0, 11, 1),
    ],
)
def test_few_failures_of_the_suite_run_once_more(
    tmp_path: Path, first: int, failed: int, again: int, status: int, runs: int
) -> None:
    whole = (REPO / "dev").read_text()
    functions = [
        re.search(rf"^{name}\(\) .*?^}}$", whole, re.M | re.S)
        for name in ("test_processes", "run_until_its_end", "run_suite")
    ]
    fake, file = tmp_path / "pytest", tmp_path / "lastfailed"
    file.write_text("left by an earlier run: true\n")
    fake.write_text(_PYTEST.format(first=first, again=again, lines="test: true\\n" * failed, file=file))
    script = 'say() { echo "$*"; }\n' + "\n".join(found[0] for found in functions if found) + '\nrun_suite "$@"\n'
    ran = subprocess.run(["sh", "-euc", script, "sh", file, "sh", fake], capture_output=True, text=True, check=False)
    assert (ran.returncode, ran.stdout.count("ran ")) == (status, runs), ran
    assert ("UNSTEADY" in ran.stdout) == (first == 1 and status == 0)
