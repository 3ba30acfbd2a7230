"""Ten rows of the table in every run of the tests, on what a host has anyway."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from tests.compat import sandboxes
from tests.compat.program import Program
from tests.compat.rows import ORDER, PROGRAMS

CORE = {
    "CPython": "python3",
    "Node.js' interfaces": "node",
    "Perl": "perl",
    "bash": "bash",
    "dash and coreutils": "dash",
    "gcc and make": "make",
    "git": "git",
    "curl": "curl",
    "OpenSSL": "openssl",
    "tar, gzip, xz, zstd, bzip2": "zstd",
    "flock, timeout, setsid, nice, stdbuf": "flock",
}
"""Names of rows, and a program that each needs."""
_BY_NAME = {program.name: program for _, program in PROGRAMS}


@pytest.mark.parametrize("program", [_BY_NAME[name] for name in CORE], ids=list(CORE))
def test_everyday_program_works_in_a_cage(program: Program, root: Path) -> None:
    if not shutil.which(CORE[program.name], path="/usr/bin"):
        pytest.skip(f"{CORE[program.name]} is not installed")
    ending = sandboxes.isolator(root, program, None)
    assert ending.done, f"exit {ending.code}: {ending.output}"


def test_names_of_rows_are_unique() -> None:
    assert len(set(ORDER)) == len(ORDER)


def test_table_has_a_hundred_programs() -> None:
    assert len([program for _, program in PROGRAMS if not program.capped]) >= 100
