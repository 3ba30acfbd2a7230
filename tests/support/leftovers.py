"""Removes what a test run within this one leaves on the host, for one that cannot do it: its code has a fault.

Only what belongs to that run beyond doubt: its processes, and whatever bears the name of one of its roots, or of the
instance of one. What else is new may be another run's, or a daemon's that has nothing to do with tests; the check
at the end of this run names it.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import tempfile
import time
import uuid
from collections.abc import Iterator
from pathlib import Path

import psutil

from isolator.paths import Paths
from tests.support.leaks import MARKER, HostState, is_own
from tests.support.timeouts import seconds

ROOTS = "ISOLATOR_TEST_ROOTS"
"""Environment variable: the file in which a run within another notes its roots. It looks for no leaks itself."""


def new_root(name: str) -> Path:
    """Make a root-owned 0755 folder ``/tmp/isolator-NAME-...``; unlike ``tmp_path`` other users can reach it."""
    path = Path(tempfile.mkdtemp(prefix=f"isolator-{name}-", dir="/tmp"))
    path.chmod(0o755)
    if file := os.environ.get(ROOTS):
        with Path(file).open("a") as noted:
            noted.write(f"{path}\n")
    return path


@contextlib.contextmanager
def nothing_left(programs: Path | None = None) -> Iterator[dict[str, str]]:
    """Remove at the end what the run that has these variables in its environment, and no process any more, left.

    ``programs``: the folder of its own interpreter, by which its services are known, whose environment is empty. Raises
    AssertionError if something cannot be removed.
    """
    marker = os.environ[MARKER] + uuid.uuid4().hex
    before = HostState.read(marker)
    with tempfile.NamedTemporaryFile("r", prefix="roots-") as noted:
        try:
            yield {MARKER: marker, ROOTS: noted.name}
        finally:
            roots = noted.read().split()
            names = [*roots, *(f"-{Paths.of(root).instance}" for root in roots)]
            deadline = time.monotonic() + seconds(60)
            while found := left_by(before, marker, names, programs):
                assert time.monotonic() < deadline, f"cannot be removed: {found}"
                _remove(found)
                time.sleep(0.1)  # nothing tells when the kernel has taken a process out of its group


def left_by(before: HostState, marker: str, names: list[str], programs: Path | None = None) -> dict[str, list[str]]:
    """What is new and belongs to the run of this marker and these names, by kind; kinds without any are absent."""
    new = HostState.read(marker).since(before)
    new.pop("descriptors", None)
    mine = {kind: [one for one in found if is_own(kind, one, names)] for kind, found in new.items()}
    if programs is not None:
        mine.setdefault("processes", []).extend(
            f"{process.pid} {process.info['cmdline'][0]}" for process in psutil.process_iter(["cmdline"])
            if process.info["cmdline"] and process.info["cmdline"][0].startswith(f"{programs}/")
        )  # fmt: skip
    return {kind: found for kind, found in mine.items() if found}


def _remove(found: dict[str, list[str]]) -> None:
    for process in found.get("processes", []):
        _kill(process.split()[0])
    for name in sorted(found.get("cgroups", []), key=len, reverse=True):
        with contextlib.suppress(OSError):
            for pid in Path(name, "cgroup.procs").read_text().split():
                _kill(pid)
            if (freezer := Path(name, "cgroup.freeze")).exists():  # cgroup v2
                freezer.write_text("0")
            Path(name).rmdir()
    for mount in reversed(found.get("mounts", [])):
        _run("umount", "-l", mount.rpartition(" (mount ")[0])
    for loop in found.get("loops", []):
        _run("losetup", "--detach", f"/dev/{loop.split()[0]}")
    for namespace in found.get("namespaces", []):
        _run("ip", "netns", "delete", namespace)
    for user in found.get("users", []):
        _run("userdel", user)
    for group in found.get("groups", []):
        _run("groupdel", group)
    if "mounts" not in found and "loops" not in found:
        for folder in found.get("folders", []):
            shutil.rmtree(folder, ignore_errors=True)


def _kill(pid: str) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(int(pid), signal.SIGKILL)


def _run(*command: str) -> None:
    """What fails is tried again, as long as it is there."""
    subprocess.run(command, capture_output=True, check=False)
