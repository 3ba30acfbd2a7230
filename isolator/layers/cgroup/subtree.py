"""The daemon's own control groups: where it is in each hierarchy, and the subtree below that which holds the leaves.

On a systemd host the group must be delegated (the unit has ``Delegate=yes``; from a shell a transient scope is taken),
and what runs in it moves into a leaf first, since v2 allows no processes in a group that distributes controllers.
"""

from __future__ import annotations

import contextlib
import errno
import os
import time
from collections import deque
from collections.abc import Iterator
from pathlib import Path

from isolator.base.structs import field, struct_class
from isolator.errors import ConfinementError

LIMITING = ("memory", "cpu", "pids")
"""The controllers without which nothing starts."""
_ENDED = 4096
"""Leaves that are remembered; a host that has no background forgets the oldest."""


@struct_class(frozen=True)
class Hierarchies:
    """Groups of a process in each hierarchy, as absolute folders."""

    unified: Path | None
    v2: frozenset[str]
    """Limiting controllers that the unified hierarchy offers to us."""
    v1: dict[str, Path]
    """Its group in the v1 hierarchy of each controller that has one."""


def find_hierarchies(process: int | str = "self") -> Hierarchies:
    """Read /proc/PID/cgroup and /proc/self/mountinfo; a group that is not mounted is not offered. Raises OSError."""
    own: dict[str, str] = {}
    for line in Path(f"/proc/{process}/cgroup").read_text().splitlines():
        _, controllers, path = line.split(":", 2)
        for controller in controllers.split(","):
            own[controller] = path
    unified: Path | None = None
    v1: dict[str, Path] = {}
    for line in Path("/proc/self/mountinfo").read_text().splitlines():
        before, _, after = line.partition(" - ")
        kind, _source, options = after.split(" ", 2)
        if kind not in ("cgroup", "cgroup2"):
            continue
        root, place = before.split()[3:5]
        if kind == "cgroup2":
            if unified is None and "" in own:
                unified = _below(place, root, own[""])
        else:
            for controller in set(options.split(",")) & own.keys():
                v1.setdefault(controller, _below(place, root, own[controller]))
    offered: set[str] = set()
    if unified is not None:
        with contextlib.suppress(OSError):
            offered = set((unified / "cgroup.controllers").read_text().split())
    return Hierarchies(unified, frozenset(offered), v1)


def _below(place: str, root: str, path: str) -> Path:
    # A bind-mounted subtree (containers): the path is shown from the hierarchy's root, the mount from its own.
    relative = path[len(root) :] if root != "/" and path.startswith(root) else path
    return Path(place) / relative.lstrip("/")


@struct_class()
class Subtree:
    """Our own groups: the one that holds the leaves of cages and services, in every hierarchy."""

    unified: Path
    v1: dict[str, Path]
    on_v2: frozenset[str]
    blkio: Path | None = None
    """In v1's blkio hierarchy, on hosts where v2 has no io controller; only cages with a cap on disks have a leaf."""
    optional: frozenset[str] = frozenset()
    """Controllers that may be done without."""
    cpuset: Path | None = None
    """In v1's cpuset hierarchy: an empty group, for a Java runtime to find one; it caps nothing and nobody is in it."""
    behind: set[str] = field(default_factory=set)
    """Plugins whose cages are in the background, new ones from their first program on (supervisor/background.py)."""
    ended: deque[tuple[str, float]] = field(default_factory=lambda: deque(maxlen=_ENDED))
    """Leaves that were removed since the last look at each, and the seconds of processor time that each has used."""

    def folders(self) -> list[Path]:
        """Every folder of the subtree's top, one a hierarchy."""
        further = [folder for folder in (self.blkio, self.cpuset) if folder is not None]
        return list(dict.fromkeys([self.unified, *self.v1.values(), *further]))

    def remove(self) -> None:
        """Remove the subtree's tops; there must be no leaf left."""
        for folder in self.folders():
            with contextlib.suppress(OSError):
                folder.rmdir()


def open_subtree(name: str, *, optional: frozenset[str] = frozenset()) -> Subtree:
    """Make (or find) the subtree ``name`` below our own groups, with the limiting controllers enabled.

    Without a controller that is not ``optional`` it raises ConfinementError.
    """
    found = find_hierarchies()
    if found.unified is None:
        remedy = "mount one: 'mount -t cgroup2 none /sys/fs/cgroup/unified', or boot with systemd"
        raise ConfinementError("control groups", "no cgroup v2 hierarchy is mounted", remedy)
    missing = [c for c in LIMITING if c not in found.v2 and c not in found.v1 and c not in optional]
    if missing:
        remedy = "enable it on the kernel command line (cgroup_enable=memory) or ask the container's operator for it"
        raise ConfinementError("control groups", f"no {', '.join(missing)} controller in cgroup v2 or v1", remedy)
    on_v2 = frozenset(c for c in LIMITING if c in found.v2)
    base = found.unified
    if on_v2:
        base = _delegated(base, on_v2)
    unified = base / name
    unified.mkdir(exist_ok=True)
    if on_v2:
        _enable(unified, on_v2)
    v1: dict[str, Path] = {}
    for controller in (*(c for c in LIMITING if c not in on_v2), "cpuacct"):
        if controller in found.v1 and controller not in found.v2:
            v1[controller] = found.v1[controller] / name
            v1[controller].mkdir(exist_ok=True)
    blkio = found.v1["blkio"] / name if "blkio" in found.v1 and "io" not in found.v2 else None
    if blkio is not None:
        blkio.mkdir(exist_ok=True)
    cpuset = found.v1["cpuset"] / name if v1 and "cpuset" in found.v1 else None
    if cpuset is not None:
        try:
            cpuset.mkdir(exist_ok=True)
        except OSError:
            cpuset = None  # wanted, not needed
    return Subtree(unified, v1, on_v2, blkio, optional, cpuset)


def _delegated(own: Path, controllers: frozenset[str]) -> Path:
    """The group below which we may make groups: our own, vacated, or a scope that systemd gives us for it."""
    is_root = not (own / "cgroup.type").exists()
    if own.name == "supervisor" and _is_delegated(own.parent):
        return own.parent
    if not is_root and Path("/run/systemd/system").exists() and not _is_delegated(own):
        own = _take_scope()
    if not is_root:
        leaf = own / "supervisor"
        leaf.mkdir(exist_ok=True)
        _vacate(own, leaf)
    _enable(own, controllers)
    return own


def _vacate(own: Path, leaf: Path) -> None:
    """Move a group's processes into a leaf of it: no processes may be in a group that distributes controllers (EBUSY).

    In a delegated one these are the unit's own: our launcher, and the shell that called us. In any other only we and
    our launcher are moved; strangers stay, and the controllers cannot be enabled.
    """
    everybody = _is_delegated(own)
    for _ in range(100):  # who forks meanwhile leaves a child behind
        found = set((own / "cgroup.procs").read_text().split()) - {"0"}  # 0: not of our pid namespace
        if not everybody:
            found &= {str(os.getpid()), *_children()}
        if not found:
            return
        for pid in found:
            with contextlib.suppress(ProcessLookupError):
                (leaf / "cgroup.procs").write_text(pid)


def _children() -> Iterator[str]:
    for path in Path("/proc/self/task").glob("*/children"):
        yield from path.read_text().split()


def _is_delegated(group: Path) -> bool:
    for attribute in ("trusted.delegate", "user.delegate"):
        with contextlib.suppress(OSError):
            return os.getxattr(group, attribute) == b"1"
    return False


def _take_scope() -> Path:
    """Ask systemd for a transient scope with Delegate=yes around this process."""
    import subprocess

    name = f"isolator-{os.getpid()}.scope"
    before = Path("/proc/self/cgroup").read_text()
    command = [
        "busctl", "call", "--quiet", "org.freedesktop.systemd1", "/org/freedesktop/systemd1",
        "org.freedesktop.systemd1.Manager", "StartTransientUnit", "ssa(sv)a(sa(sv))", name, "fail",
        "3", "PIDs", "au", "1", str(os.getpid()), "Delegate", "b", "true",
        "CollectMode", "s", "inactive-or-failed", "0",
    ]  # fmt: skip
    result = subprocess.run(command, capture_output=True, text=True, check=False, stdin=subprocess.DEVNULL)
    if result.returncode != 0:
        remedy = "run it as a unit with Delegate=yes, or through 'systemd-run --scope -p Delegate=yes'"
        raise ConfinementError("control groups", f"systemd gave no delegated scope ({result.stderr.strip()})", remedy)
    # The job runs after the reply. A move into another group wakes nobody, so it is polled for.
    deadline = time.monotonic() + 10
    while Path("/proc/self/cgroup").read_text() == before:
        if time.monotonic() > deadline:
            why = "systemd did not move us into our scope in 10 s"
            raise ConfinementError("control groups", why, "see its journal")
        time.sleep(0.005)
    unified = find_hierarchies().unified
    assert unified is not None
    return unified


def _enable(group: Path, controllers: frozenset[str]) -> None:
    control = group / "cgroup.subtree_control"
    enabled = set(control.read_text().split())
    for controller in sorted(controllers | {"io"}):
        if controller in enabled:
            continue
        try:
            control.write_text(f"+{controller}")
        except OSError as error:
            if controller == "io":
                continue  # wanted, not needed
            why = "other processes are in it" if error.errno == errno.EBUSY else error.strerror
            remedy = "start the daemon as its systemd unit (isolator install), or from a group of its own"
            raise ConfinementError(f"control group {group}", f"cannot enable {controller}: {why}", remedy) from None
