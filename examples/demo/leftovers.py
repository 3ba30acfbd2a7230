"""What a daemon and its cages could leave on the host; after the demo every list must be empty.

Everything machine-wide that a daemon makes carries its instance id (derived from its root) or lies below its
root, so what belongs to this run can be told from everything else on the machine.
"""

from __future__ import annotations

import contextlib
import grp
import os
import pwd
from collections.abc import Iterator
from pathlib import Path

from isolator.paths import Paths


def find(root: Path, pids: set[int], *, own_network: bool = False) -> list[str]:
    """One line per thing of the daemon below ``root`` that is still there.

    ``pids`` are processes it started. ``own_network``: the caller sits in a network namespace made for it alone, so
    that any other process in there is one that was left.
    """
    instance = Paths.of(root).instance
    found = [f"user {entry.pw_name}" for entry in pwd.getpwall() if instance in entry.pw_name]
    found += [f"group {entry.gr_name}" for entry in grp.getgrall() if instance in entry.gr_name]
    found += [f"cgroup {path}" for path in cgroups(instance)]
    found += [f"mount {place}" for place in mounts(root)]
    found += [f"loop device {name}" for name in loops(root)]
    found += [f"file {path}" for path in named_files(instance)]
    found += [f"process {text}" for text in processes(root, pids, own_network=own_network)]
    if root.exists():
        found.append(f"file {root}")
    return found


def cgroups(instance: str) -> Iterator[str]:
    """Groups of this instance in every hierarchy."""
    for line in Path("/proc/self/mountinfo").read_text().splitlines():
        place, kind = line.split()[4], line.split(" - ")[1].split()[0]
        if kind in {"cgroup", "cgroup2"}:
            for directory, children, _ in os.walk(place):
                yield from (f"{directory}/{child}" for child in children if instance in child)


def named_files(instance: str) -> Iterator[Path]:
    """Files outside the root that carry the instance id: locks, units, sockets, mail of its users."""
    for place in ("/run", "/run/lock", "/run/netns", "/tmp", "/var/tmp", "/etc", "/var/lib", "/var/log", "/var/mail"):
        with contextlib.suppress(OSError):
            yield from (path for path in Path(place).iterdir() if instance in path.name)


def mounts(root: Path) -> Iterator[str]:
    for line in Path("/proc/self/mountinfo").read_text().splitlines():
        if str(root) in line:
            yield line.split()[4]


def loops(root: Path) -> Iterator[str]:
    for path in Path("/sys/block").glob("loop*/loop/backing_file"):
        with contextlib.suppress(OSError):
            if path.read_text().startswith(str(root)):
                yield path.parts[3]


def processes(root: Path, pids: set[int], *, own_network: bool = False) -> Iterator[str]:
    """Processes that name the root, are of ``pids``, or share our network namespace."""
    namespace = network_namespace("self")
    for entry in Path("/proc").iterdir():
        if not entry.name.isdecimal() or int(entry.name) == os.getpid():
            continue
        with contextlib.suppress(OSError):
            words = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace").strip()
            state = (entry / "stat").read_text().rsplit(")", 1)[1].split()[0]
            here = own_network and network_namespace(entry.name) == namespace
            if state != "Z" and (str(root) in words or here or int(entry.name) in pids):
                yield f"{entry.name} ({words[:60]})"


def network_namespace(pid: str) -> int:
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/ns/net").stat().st_ino
    return -1
