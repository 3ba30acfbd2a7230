"""Rows of the table that every run of the tests has: programs of any host, plugins on small client libraries."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.compat import plugged, sandboxes
from tests.compat.plugged import Platform
from tests.compat.program import Plugin, Program
from tests.compat.rows import ORDER, PROGRAMS
from tests.compat.rows.plugins import PLUGINS

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
CORE_PLUGINS = [plugin for plugin in PLUGINS if not plugin.more]
_BY_NAME = {program.name: program for _, program in PROGRAMS}


@pytest.mark.parametrize("program", [_BY_NAME[name] for name in CORE], ids=list(CORE))
def test_everyday_program_works_in_a_cage(program: Program, root: Path) -> None:
    if not shutil.which(CORE[program.name], path="/usr/bin"):
        pytest.skip(f"{CORE[program.name]} is not installed")
    ending = sandboxes.isolator(root, program, None)
    assert ending.done, f"exit {ending.code}: {ending.output}"


@pytest.fixture(scope="module")
def platform() -> Iterator[Platform]:
    with plugged.platform() as made:
        yield made


@pytest.mark.parametrize("plugin", CORE_PLUGINS, ids=[plugin.name for plugin in CORE_PLUGINS])
def test_plugin_does_its_work_with_a_client_library(plugin: Plugin, platform: Platform) -> None:
    if plugged.missing(plugin):
        pytest.skip(f"{plugin.tool} is not installed")
    plugged.check(platform, plugin, plugged.deliver(platform, plugin, plugged.built(plugin, None)))


def test_names_of_rows_are_unique() -> None:
    assert len(set(ORDER)) == len(ORDER)


def test_table_has_a_hundred_programs() -> None:
    assert len([program for _, program in PROGRAMS if not program.capped]) >= 100
