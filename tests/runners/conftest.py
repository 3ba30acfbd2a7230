"""A daemon with two runners, and the command line as users of the host."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.support.timeouts import seconds
from tests.system.taken_over import TakenOver, taken_over

ALICE, BOB, STRANGER = 64901, 64902, 64903
"""Two runners, and somebody without a role. Each has a group of the same number."""

HOST_TOML = f"""
    [roles]
    runner = [{ALICE}, {BOB}]
    [runner]
    cages = 4
    all_tasks = 300
    all_memory = "1G"
    memory = "512M"
    egress = ["names.example:443"]
    [audit]
    snapshot_interval = "1s"
"""
PROGRAM = "import sys; from host.cli.main import main; sys.exit(main())"


def words(root: Path, uid: int, *arguments: str, groups: tuple[int, ...] = ()) -> list[str]:
    """The command line of ``isolator`` as a user."""
    more = f"--groups={','.join(map(str, groups))}" if groups else "--clear-groups"
    return [
        "setpriv", f"--reuid={uid}", f"--regid={uid}", more, "--", sys.executable, "-I", "-c", PROGRAM,
        "--root", str(root), *arguments,
    ]  # fmt: skip


def run_as(d: TakenOver, uid: int, *arguments: str, **further: Any) -> subprocess.CompletedProcess[str]:
    """``isolator run ARGUMENTS`` as a user, in /; standard input is /dev/null."""
    how: dict[str, Any] = {"stdin": subprocess.DEVNULL} if "input" not in further else {}
    return subprocess.run(
        words(d.root, uid, "run", *arguments), capture_output=True, text=True, check=False, cwd="/",
        timeout=seconds(90), **(how | further),
    )  # fmt: skip


@pytest.fixture(scope="package")
def daemon() -> Iterator[TakenOver]:
    with taken_over(HOST_TOML) as made:
        yield made


@pytest.fixture
def home(shared_dir: Path) -> Path:
    """A folder of Alice's."""
    folder = shared_dir / "alice"
    folder.mkdir()
    os.chown(folder, ALICE, ALICE)
    return folder
