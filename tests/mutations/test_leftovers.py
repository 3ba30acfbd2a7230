"""Leftovers of a faulty daemon on the host are removed, also where its tests are killed."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from isolator.paths import Paths
from tests.support.leaks import MARKER, HostState
from tests.support.leftovers import ROOTS, left_by, nothing_left
from tests.support.timeouts import seconds

TREE = Path(__file__).parents[2]

LEAKING = """
import os, signal
from tests.system.daemon import Daemon, daemon, write_plugin

def test_it(tmp_path):
    Daemon.purge = lambda self: None
    with daemon() as d:
        d.cli("plugin", "add", str(write_plugin(tmp_path / "echo", sandbox={"filesystem": {"state": "4M"}})), "--yes")
        d.cli("plugin", "start", "echo")
        if DEAD:
            d.kill()
    os.kill(os.getpid(), signal.SIGKILL)
"""


def test_process_of_an_empty_environment_is_removed(shared_dir: Path) -> None:
    program = shared_dir / "sleep"
    shutil.copy("/usr/bin/sleep", program)
    with nothing_left(shared_dir):
        process = subprocess.Popen([program, "1000"], env={}, start_new_session=True)
    assert process.wait() == -signal.SIGKILL


@pytest.mark.parametrize("dead", [False, True], ids=["daemon that runs", "daemon that was killed"])
def test_whatever_a_killed_run_of_faulty_code_leaves_is_removed(shared_dir: Path, dead: bool) -> None:
    before, names = HostState.read(os.environ[MARKER]), list[str]()
    # Below the tree's own conftest.py, in a copy of it.
    tests = shared_dir / "tests"
    shutil.copytree(TREE / "tests", tests, ignore=shutil.ignore_patterns("__pycache__", "test_*"))
    (tests / "test_leaking.py").write_text(LEAKING.replace("DEAD", str(dead)))
    with nothing_left() as variables:
        environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
        result = subprocess.run(
            [sys.executable, "-m", "pytest", "-q", "--leaks=off", "-p", "no:cacheprovider", "tests/test_leaking.py"],
            cwd=shared_dir, env=environment | variables, capture_output=True, text=True, check=False,
            timeout=seconds(120),
        )  # fmt: skip
        assert result.returncode == -9, result.stdout + result.stderr
        roots = Path(variables[ROOTS]).read_text().split()
        names += [*roots, *(f"-{Paths.of(root).instance}" for root in roots)]
        left = set(left_by(before, variables[MARKER], names))
        assert left >= {"users", "groups", "cgroups", "folders", "loops"} | (set() if dead else {"processes"})
    assert not left_by(before, variables[MARKER], names)
