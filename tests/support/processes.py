"""Processes as /proc shows them."""

from __future__ import annotations

import contextlib
from pathlib import Path


def children(pid: int, word: str = "") -> list[int]:
    """The children of a process, whichever of its threads has them, whose command lines have this word."""
    found = []
    for threads in Path(f"/proc/{pid}/task").glob("*/children"):
        with contextlib.suppress(OSError):  # the thread has ended
            found += [int(child) for child in threads.read_text().split()]
    return sorted(child for child in found if word.encode() in _command(child))


def _command(pid: int) -> bytes:
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    return b""


def stat(pid: int) -> list[str]:
    """The fields of proc_pid_stat(5) from the third, the state, on; raises OSError if it is gone."""
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()


def state(pid: int) -> str:
    """Its state, a letter; empty if it is gone."""
    with contextlib.suppress(OSError):
        return stat(pid)[0]
    return ""


def start_time(pid: int) -> str:
    """The time at which a process was started, in the kernel's ticks, which with its pid is unique."""
    return stat(pid)[19]


def family(pid: int) -> list[int]:
    """A process and all that it has started, and these."""
    parents: dict[int, list[int]] = {}
    for entry in Path("/proc").iterdir():
        with contextlib.suppress(OSError, ValueError):
            parents.setdefault(int(stat(int(entry.name))[1]), []).append(int(entry.name))
    found = [pid]
    for one in found:
        found += parents.get(one, [])
    return found
