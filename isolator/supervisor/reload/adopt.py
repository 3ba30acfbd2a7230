"""The first steps of the new image: it takes over what the state names, and ends what it does not name."""

from __future__ import annotations

import contextlib
import logging
import os
import socket
import subprocess
import time
from collections.abc import Iterable
from pathlib import Path

from isolator.errors import IsolatorError
from isolator.ipc.handover import DaemonState, SubtreeState, descriptors
from isolator.launcher.client import Launcher
from isolator.layers.cgroup.subtree import Subtree
from isolator.linux.child import Child
from isolator.supervisor.reload import formats

logger = logging.getLogger(__name__)

_END_SECONDS = 0.5


def take_over(fd: int) -> tuple[DaemonState, str | None]:
    """Read the state, own its descriptors and close every other one; returns it as ``formats.read``.

    Raises IsolatorError.
    """
    state, host_toml = formats.read(fd)
    named = {*range(3), *descriptors(state)}
    for name in os.listdir("/proc/self/fd"):
        number = int(name)
        if number in named:
            os.set_inheritable(number, number < 3)
            continue
        with contextlib.suppress(OSError):  # the folder's own is closed by now
            shown = os.readlink(f"/proc/self/fd/{number}")
            os.close(number)
            if number != fd:
                logger.warning("closed descriptor %d, which the version before had not named: %s", number, shown)
    return state, host_toml


def end_unnamed_children(state: DaemonState) -> list[Child]:
    """Kill and reap every child that the state does not name, as one that ended meanwhile; returns as ``end``."""
    named = {state.launcher_pid, *(service.pid for service in state.services)}
    named |= {plugin.run.cage.pid for plugin in state.plugins if plugin.run is not None}
    named |= {invocation.run.cage.pid for plugin in state.plugins for invocation in plugin.invocations}
    named |= {run.cage.pid for run in state.runners.runs} if state.runners is not None else set()
    found = [int(word) for path in Path("/proc/self/task").glob("*/children") for word in path.read_text().split()]
    return end(pid for pid in found if pid not in named)


def end(pids: Iterable[int]) -> list[Child]:
    """Kill children, and reap them; returns those that have not ended soon: what waits in a file system may not.

    Nobody waits for such a one: the daemon would be away for as long as a stranger likes.
    """
    killed = [Child(pid) for pid in pids]
    for child in killed:
        child.kill()
    left, until = [], time.monotonic() + _END_SECONDS
    for child in killed:
        try:
            child.wait(max(0.0, until - time.monotonic()))
            logger.warning("ended process %d, which the version before had not named", child.pid)
        except subprocess.TimeoutExpired:
            left.append(child)
            logger.warning("process %d, which the version before had not named, was killed and hangs", child.pid)
    return left


def launcher(before: DaemonState) -> Launcher | None:
    """The launcher of before, which keeps the cages until a new one does; None: there was none, and no plugin."""
    if before.launcher < 0:
        return None
    return Launcher((Child(before.launcher_pid), socket.socket(fileno=before.launcher)), adopted=True)


def subtree(before: SubtreeState, optional: frozenset[str]) -> Subtree:
    """The daemon's own control groups, as found at its first start; raises IsolatorError for other folders."""
    optional_ones = [folder for folder in (before.blkio, before.cpuset) if folder is not None]
    for folder in (before.unified, *before.v1.values(), *optional_ones):
        if not folder.startswith("/") or not os.path.isdir(folder):
            raise IsolatorError("state of the daemon before", f"{folder!r} is no control group", "start it again")
    return Subtree(
        Path(before.unified),
        {name: Path(path) for name, path in before.v1.items()},
        frozenset(before.on_v2),
        Path(before.blkio) if before.blkio is not None else None,
        optional,
        Path(before.cpuset) if before.cpuset is not None else None,
    )
