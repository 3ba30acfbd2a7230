"""Cages for tests that want one to look at: a whole one by default, or one whose cage is a subclass."""

from __future__ import annotations

import contextlib
import os
import secrets
import subprocess
import sys
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from isolator.cage.cage import Cage, Stdio
from isolator.layers.base import CageSpec
from isolator.layers.cgroup.subtree import find_hierarchies
from isolator.linux.descriptors import close_all
from isolator.paths import Paths
from isolator.policy.host import HostConfig
from isolator.policy.model import EffectivePolicy, NetworkPolicy
from isolator.standalone.records import Records
from isolator.standalone.session import StandaloneSession, run_spec

COMMAND = [sys.executable, "-I", "-c", "from host.cli.main import main; main()"]
"""The command line, by the interpreter that runs the tests."""


def policy(**fields: object) -> EffectivePolicy:
    """No network and the default caps, but for what is named."""
    return EffectivePolicy(plugin="test", network=NetworkPolicy(mode="none")).model_copy(update=fields)


@dataclass
class StartedCage:
    """A started cage and the file that its output goes to."""

    cage: Cage
    session: StandaloneSession
    out: Path

    def text(self) -> str:
        return self.out.read_text()


@contextlib.asynccontextmanager
async def cage(
    root: Path,
    argv: list[str],
    effective: EffectivePolicy | None = None,
    *,
    cage_type: type[Cage] = Cage,
    change: Callable[[CageSpec], None] = lambda spec: None,
    records: Records | None = None,
    **further: Any,
) -> AsyncIterator[StartedCage]:
    """One cage; standard input is /dev/null, output and errors go to one file. ``further``: for the cage's type."""
    host = HostConfig()
    out = root / "out"
    owned = [os.open(out, os.O_RDWR | os.O_CREAT | os.O_TRUNC), os.open("/dev/null", os.O_RDONLY)]
    try:
        async with StandaloneSession(Paths.of(root)) as session:
            lease = session.lease(host)
            run = secrets.token_hex(5)
            spec = run_spec(session.paths, effective or policy(), argv, run, lease.uid, owned)
            change(spec)
            records = records or Records(None, run, quiet=True)
            stdio = Stdio(owned[1], owned[0], owned[0])
            async with session.cage(spec, host, stdio, records, cage_type=cage_type, **further) as started:
                yield StartedCage(started, session, out)
            session.runtime.stop_watching()
    finally:
        close_all(owned)


def isolator(root: Path, *arguments: str, input: str = "", timeout: float = 60) -> subprocess.CompletedProcess[str]:
    """Run the command line; never raises for an exit code."""
    return subprocess.run(
        [*COMMAND, "--root", str(root), *arguments], input=input, capture_output=True, text=True, timeout=timeout,
        check=False,
    )  # fmt: skip


def leaves(root: Path) -> list[Path]:
    """Every control group that belongs to a root, in every hierarchy."""
    name = Paths.of(root).named("isolator")
    found = find_hierarchies()
    tops = [folder for folder in (found.unified, *found.v1.values()) if folder is not None]
    return [child for top in dict.fromkeys(tops) for child in top.glob(f"{name}*")]


def caged(root: Path) -> list[int]:
    """The processes in the one cage of a root that ``isolator run`` made: the v2 hierarchy has them all."""
    unified = find_hierarchies().unified
    assert unified is not None
    files = [file for top in leaves(root) if top.is_relative_to(unified) for file in top.glob("run.*/cgroup.procs")]
    return [int(pid) for file in files for pid in file.read_text().split()]
