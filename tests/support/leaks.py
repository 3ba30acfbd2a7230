"""What a test run may leave behind on the host: nothing. A snapshot before, one after, and the difference.

Two kinds of finding. *Own* ones are this run's beyond doubt: a process that inherited this run's marker, a mount
or loop device below one of its directories, a namespace or pidfd still open in the test process. *Global* ones
(users, groups, cgroups, named network namespaces, other mounts and loop devices) have machine-wide names, so they
can be told from another test run's only while no other run overlaps with this one.
"""

from __future__ import annotations

import contextlib
import fcntl
import grp
import os
import pwd
import re
import time
import uuid
from dataclasses import dataclass, fields
from pathlib import Path

MARKER = "ISOLATOR_TEST_RUN"
_NAME = re.compile(r"^(plugin-|isolator)")


@dataclass(frozen=True)
class HostState:
    """Every kind of thing that a cage or a daemon makes outside its own process; readable strings throughout."""

    users: frozenset[str]
    groups: frozenset[str]
    cgroups: frozenset[str]
    namespaces: frozenset[str]
    mounts: frozenset[str]
    loops: frozenset[str]
    folders: frozenset[str]
    processes: frozenset[str]
    descriptors: frozenset[str]

    @classmethod
    def read(cls, marker: str) -> HostState:
        """The state now; ``marker``: of this run, what its processes' value of the environment variable begins with."""
        mountinfo = [line.split() for line in _read("/proc/self/mountinfo").splitlines()]
        return cls(
            users=frozenset(entry.pw_name for entry in pwd.getpwall() if _NAME.match(entry.pw_name)),
            groups=frozenset(entry.gr_name for entry in grp.getgrall() if _NAME.match(entry.gr_name)),
            cgroups=frozenset(_cgroups([line[4] for line in mountinfo if line[line.index("-") + 1] in _CGROUP_TYPES])),
            namespaces=frozenset(entry.name for entry in _entries("/run/netns")),
            mounts=frozenset(f"{line[4]} (mount {line[0]})" for line in mountinfo),
            loops=frozenset(
                f"{entry.name} {_read(f'/sys/block/{entry.name}/loop/backing_file').strip()}"
                for entry in _entries("/sys/block")
                if entry.name.startswith("loop") and Path(entry.path, "loop").exists()
            ),
            folders=frozenset(entry.path for entry in _entries("/tmp") if entry.name.startswith("isolator-")),
            processes=frozenset(_processes(marker)),
            descriptors=frozenset(_descriptors()),
        )

    def since(self, before: HostState) -> dict[str, list[str]]:
        """What is here now and was not in ``before``, by kind; kinds without a finding are absent."""
        found = {
            field.name: sorted(getattr(self, field.name) - getattr(before, field.name)) for field in fields(HostState)
        }
        return {kind: names for kind, names in found.items() if names}


_CGROUP_TYPES = ("cgroup", "cgroup2")
_OWN_KINDS = ("processes", "descriptors")


def _read(path: str) -> str:
    with contextlib.suppress(OSError):
        return Path(path).read_text(errors="replace")
    return ""


def _entries(path: str) -> list[os.DirEntry[str]]:
    with contextlib.suppress(OSError), os.scandir(path) as found:
        return list(found)
    return []


def _cgroups(mounts: list[str]) -> set[str]:
    found = {
        folder for mount in mounts for folder, _, _ in os.walk(mount) if "isolator" in folder or "plugin-" in folder
    }
    # A test that builds cages in this very process makes it move into a scope of systemd's, which goes when it ends.
    own = {mount + line.split(":", 2)[2] for mount in mounts for line in _read("/proc/self/cgroup").splitlines()}
    return {folder for folder in found if not any(f"{path}/".startswith(f"{folder}/") for path in own)}


def _processes(marker: str) -> set[str]:
    """Processes other than this one and its ancestors whose environment carries ``marker``, or that of a run within."""
    needle = f"{MARKER}={marker}".encode()
    found = set()
    for entry in _entries("/proc"):
        if not entry.name.isdigit() or int(entry.name) == os.getpid():
            continue
        with contextlib.suppress(OSError):
            environment = Path(entry.path, "environ").read_bytes().split(b"\0")
            if any(variable.startswith(needle) for variable in environment):
                command = Path(entry.path, "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
                found.add(f"{entry.name} {command[:100].strip()}")
    return found


def _descriptors() -> set[str]:
    """Namespaces and pidfds that the test process holds open: each keeps something in the kernel alive."""
    found = set()
    for entry in _entries("/proc/self/fd"):
        with contextlib.suppress(OSError):
            target = os.readlink(entry.path)
            if target.startswith(("net:[", "mnt:[", "pid:[")) or "pidfd" in target:
                found.add(f"{entry.name} -> {target}")
    return found


class RunLock:
    """Tells whether another test run overlapped with this one on the same machine.

    Every run counts itself in a file under a lock and holds a shared lock until it ends. It was alone if nobody
    held a lock when it began and the count has not moved since.
    """

    def __init__(self, path: str = "/run/lock/isolator-tests") -> None:
        self._fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        try:
            fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            self._began_alone = True
        except BlockingIOError:
            self._began_alone = False
        # Concurrent writers only make the value differ from both writers' own, which is what has to be seen.
        self._token = uuid.uuid4().hex.encode()
        os.pwrite(self._fd, self._token, 0)
        fcntl.flock(self._fd, fcntl.LOCK_SH)

    def alone(self) -> bool:
        """True if no other run was there at any moment since this one began."""
        return self._began_alone and os.pread(self._fd, len(self._token), 0) == self._token

    def close(self) -> None:
        os.close(self._fd)


def is_own(kind: str, name: str, folders: list[str]) -> bool:
    """True if a finding belongs to this run whatever else happens on the machine."""
    return kind in _OWN_KINDS or any(folder in name for folder in folders)


def wait_until_clean(
    before: HostState, marker: str, patience: float, *, kinds: frozenset[str] | None = None
) -> dict[str, list[str]]:
    """What is left (of some ``kinds``) after at most ``patience`` seconds; empty as soon as nothing is.

    The kernel removes namespaces, mounts and loop devices a little after the last user has gone, and for a
    passwd entry there is no event to wait for: so this looks again ten times a second.
    """
    deadline = time.monotonic() + patience
    while True:
        found = HostState.read(marker).since(before)
        found = {kind: names for kind, names in found.items() if kinds is None or kind in kinds}
        if not found or time.monotonic() > deadline:
            return found
        time.sleep(0.1)
