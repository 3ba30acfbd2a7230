"""The first steps of the new image: it takes over what the state names, and ends what it does not name."""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import socket
from pathlib import Path

from isolator.ipc.handover import DaemonState, SubtreeState, descriptors
from isolator.launcher.client import Launcher
from isolator.layers.cgroup.subtree import Subtree
from isolator.linux.child import Child
from isolator.supervisor.reload import formats

logger = logging.getLogger(__name__)



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


def end_unnamed_children(state: DaemonState) -> None:
    """Kill and reap every child that the state does not name, as one that ended meanwhile."""
    named = {state.launcher_pid, *(service.pid for service in state.services)}
    named |= {plugin.run.cage.pid for plugin in state.plugins if plugin.run is not None}
    named |= {invocation.run.cage.pid for plugin in state.plugins for invocation in plugin.invocations}
    named |= {run.cage.pid for run in state.runners.runs} if state.runners is not None else set()
    for path in Path("/proc/self/task").glob("*/children"):
        for pid in {int(word) for word in path.read_text().split()} - named:
            with contextlib.suppress(ProcessLookupError, ChildProcessError):
                os.kill(pid, signal.SIGKILL)
                os.waitpid(pid, 0)
                logger.warning("ended process %d, which the version before had not named", pid)


def launcher(before: DaemonState) -> Launcher:
    """The launcher of before, which keeps the cages until a new one does."""
    return Launcher((Child(before.launcher_pid), socket.socket(fileno=before.launcher)), adopted=True)


def subtree(before: SubtreeState, optional: frozenset[str]) -> Subtree:
    """The daemon's own control groups, as they were found at its first start."""
    return Subtree(
        Path(before.unified),
        {name: Path(path) for name, path in before.v1.items()},
        frozenset(before.on_v2),
        Path(before.blkio) if before.blkio is not None else None,
        optional,
        Path(before.cpuset) if before.cpuset is not None else None,
    )
