"""``./dev``: unknown options are refused before anything is done; which failures of the suite are run once more."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

REPO = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize("command", ["demo", "setup", "shell"])
def test_unknown_option_is_refused_at_once(command: str) -> None:
    ran = subprocess.run(["sh", REPO / "dev", command, "--nonsense"], capture_output=True, text=True, check=False)
    assert (ran.returncode, ran.stdout) == (2, "")
    assert f"{command}: takes no options" in ran.stderr and "and got: --nonsense" in ran.stderr


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
