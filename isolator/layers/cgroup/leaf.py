"""The groups of one run: made, limited, entered, killed, removed.

One leaf per run, ``BASE/NAME.RUN``: a v2 leaf that has once seen ``cgroup.kill`` kills every later CLONE_INTO_CGROUP
child at once. On hybrid hosts a leaf has one more group for each controller that is bound to a v1 hierarchy.
"""

from __future__ import annotations

import contextlib
import errno
import os
import select
import time
from pathlib import Path
from typing import TYPE_CHECKING

from isolator.base.structs import field, struct_class
from isolator.errors import ConfinementError
from isolator.layers.base import mismatch
from isolator.linux.descriptors import owning
from isolator.linux.files import write_file
from isolator.policy.units import NO_CAP

if TYPE_CHECKING:
    from collections.abc import Iterable

    from isolator.layers.cgroup.subtree import Subtree
    from isolator.linux.descriptors import FdSet
    from isolator.policy.model import ResourcePolicy

PERIOD_US = 10_000
"""A short period: under the usual 100 ms a throttled plugin freezes for up to 75 ms at a time."""


OOM_SCORE_ADJ = "500"
"""Of every process in a cage: a plugin goes before anything of the host's."""


SERVICE_WEIGHT = 1_000
"""``cpu.weight`` of a service's leaf; a cage's is the kernel's 100. Beside any number of cages that use all that they
are granted, a service that has little to do waits for one of them at most, not for its turn among all."""

IDLE = "cpu.idle"
"""File, in v1 as in v2, by which the other groups of a level go first (Linux 5.15, isolator.supervisor.background)."""

_MIN_QUOTA_US = 1_000  # the kernel refuses less


@struct_class(frozen=True)
class Events:
    """The kernel's own counters of one leaf."""

    oom_kills: int = 0
    task_denials: int = 0


@struct_class()
class Leaf:
    """The groups of one run: the v2 one, and on hybrid hosts one for each v1 controller."""

    unified: Path
    v1: dict[str, Path] = field(default_factory=dict)
    on_v2: frozenset[str] = frozenset()
    blkio: Path | None = None
    """One more v1 group, where the limits ask for it: it is entered just before the exec."""
    cpuset: Path | None = None
    """An empty v1 group that the cage is shown, the same for all."""

    @classmethod
    def under(cls, subtree: Subtree, name: str, limits: ResourcePolicy | None = None) -> Leaf:
        """The leaf ``name`` of a subtree (not made yet), with what its limits need."""
        v1 = {controller: path / name for controller, path in subtree.v1.items()}
        blkio = subtree.blkio / name if subtree.blkio is not None and has_disk_caps(limits) else None
        return cls(subtree.unified / name, v1, subtree.on_v2, blkio, subtree.cpuset)

    def folders(self) -> list[Path]:
        """Every folder that ``create`` makes."""
        return [self.unified, *dict.fromkeys(self.v1.values()), *([self.blkio] if self.blkio else [])]

    def by_controller(self) -> list[tuple[str, str]]:
        """The groups to show to the cage: the place of each below /sys/fs/cgroup, and its path on the host."""
        if not self.v1 or "memory" in self.on_v2:
            return [("", str(self.unified))]
        shown = {**self.v1, **({"cpuset": self.cpuset} if self.cpuset is not None else {})}
        return [(place, str(path)) for place, path in shown.items()]

    def create(self) -> None:
        """Make the v2 group."""
        with contextlib.suppress(FileExistsError):
            os.mkdir(self.unified)

    def limit(self, limits: ResourcePolicy) -> dict[str, str]:
        """Write the limits but the processor's of the groups, which are there already; returns each file's value."""
        if self.blkio is not None:
            self.blkio.mkdir(exist_ok=True)
        values = self.values(limits)
        _write_all(values)
        return values

    def cap_processor(self, limits: ResourcePolicy) -> dict[str, str]:
        """Write the limits of the processor; returns the value of each file."""
        values = self.cpu_values(limits)
        _write_all(values)
        return values

    def prefer(self) -> None:
        """Give the leaf of a service a greater share of a contended processor.

        In v1 services are in no group here; their nice value is what counts (``linux/priority.py``).
        """
        if "cpu" in self.on_v2:
            write_file(f"{self.unified}/cpu.weight", str(SERVICE_WEIGHT))

    def put_behind(self) -> None:
        """Let the other cages go first where the processor is short; the kernel has a file for that."""
        write_file(f"{self.v1.get('cpu', self.unified)}/{IDLE}", "1")

    def create_v1(self) -> None:
        """Make the groups in the v1 hierarchies alone; those that are there stay."""
        for folder in dict.fromkeys(self.v1.values()):
            with contextlib.suppress(FileExistsError):
                os.mkdir(folder)

    def rename_v1(self, other: Leaf) -> None:
        """Rename the v1 groups, with the processes in them, to those of ``other`` (v2 cannot)."""
        for mine, its in dict(zip(self.v1.values(), other.v1.values(), strict=True)).items():
            os.rename(mine, its)

    def values(self, limits: ResourcePolicy) -> dict[str, str]:
        """The value of each file, in the order of writing; nothing for a controller that this host lacks.

        The processor's cap is apart, in ``cpu_values``.
        """
        values: dict[str, str] = {}
        if "memory" in self.on_v2:
            values[f"{self.unified}/memory.max"] = str(limits.memory)
            # Without swap there is nothing to reclaim above memory.high from a plugin that allocates without end:
            # the kernel only puts it to sleep, up to 2 s for every 128 KiB, and it hangs instead of being ended.
            values[f"{self.unified}/memory.high"] = str(limits.memory_high) if limits.swap else "max"
            values[f"{self.unified}/memory.swap.max"] = str(limits.swap)
            values[f"{self.unified}/memory.zswap.max"] = "0"
            values[f"{self.unified}/memory.oom.group"] = "1"
        if "pids" in self.on_v2:
            values[f"{self.unified}/pids.max"] = _tasks(limits)
        if "memory" in self.v1:
            memory = self.v1["memory"]
            values[f"{memory}/memory.limit_in_bytes"] = str(limits.memory)
            values[f"{memory}/memory.memsw.limit_in_bytes"] = str(limits.memory + limits.swap)
            values[f"{memory}/memory.swappiness"] = "0" if limits.swap == 0 else "60"
            # Socket buffers are counted apart in v1: without this, as much again slips past the cap.
            values[f"{memory}/memory.kmem.tcp.limit_in_bytes"] = str(limits.memory // 8)
        if "pids" in self.v1:
            values[f"{self.v1['pids']}/pids.max"] = _tasks(limits)
        return values

    def cpu_values(self, limits: ResourcePolicy) -> dict[str, str]:
        """The value of each file that caps the processor, in the order of writing."""
        quota, period = cpu_quota(limits.cpu)
        if "cpu" in self.on_v2:
            return {f"{self.unified}/cpu.max": f"{quota} {period}"}
        if "cpu" in self.v1:
            cpu = self.v1["cpu"]
            return {f"{cpu}/cpu.cfs_period_us": str(period), f"{cpu}/cpu.cfs_quota_us": str(quota)}
        return {}

    def open_v1(self, owner: FdSet) -> list[int]:
        """Descriptors of the v1 groups, for a process that puts itself into them; ``owner`` has to close them.

        They are of ``tasks``, to which a single-threaded process writes 0: it is moved at once. For a write to
        ``cgroup.procs`` the kernel first stops every fork and exit of the host, an RCU grace period of 6 to 16 ms
        (cgroup_procs_write_start in kernel/cgroup/cgroup.c, from Linux 5.4).
        """
        folders = dict.fromkeys(self.v1.values())
        return [owner.add(os.open(f"{folder}/tasks", os.O_WRONLY | os.O_CLOEXEC)) for folder in folders]

    def confirm_in(self, pid: int) -> None:
        """Read back that a process is in each of the v1 groups; raises ConfinementError."""
        for folder in dict.fromkeys(self.v1.values()):
            if str(pid) not in read_file(f"{folder}/cgroup.procs").split():
                raise mismatch("cgroup", str(folder), f"the group of {pid}", "not")

    def processes(self) -> list[int]:
        """The pids in the leaf, as seen from our pid namespace."""
        found = b""
        with (
            contextlib.suppress(FileNotFoundError),
            owning(os.open(f"{self.unified}/cgroup.procs", os.O_RDONLY | os.O_CLOEXEC)) as fd,
        ):
            while some := os.read(fd, 4096):
                found += some
        return [*map(int, found.split())]

    def kill(self) -> None:
        """Kill every process of the leaf at once; no error when it is empty, removed, or a v1 group."""
        with contextlib.suppress(FileNotFoundError):
            write_file(f"{self.unified}/cgroup.kill", "1")

    def freeze(self) -> None:
        """Stop every process of the leaf where it is, until ``thaw``; the kernel lets nothing but a kill through."""
        os.setxattr(self.unified, _FROZEN, b"1")
        write_file(f"{self.unified}/cgroup.freeze", "1")

    def thaw(self) -> None:
        """Let them go on; no error when it is not frozen, or removed."""
        with contextlib.suppress(OSError):
            os.removexattr(self.unified, _FROZEN)
        with contextlib.suppress(FileNotFoundError):
            write_file(f"{self.unified}/cgroup.freeze", "0")

    def populated(self) -> bool:
        """Whether any process, a zombie included, is left in the leaf."""
        try:
            return "populated 1" in read_file(f"{self.unified}/cgroup.events")
        except FileNotFoundError:
            return False

    def wait_empty(self, timeout: float) -> bool:
        """Block until the leaf is empty (cgroup.events wakes poll); False when it is not in ``timeout`` seconds."""
        try:
            fd = os.open(f"{self.unified}/cgroup.events", os.O_RDONLY | os.O_CLOEXEC)
        except FileNotFoundError:
            return True
        try:
            poll = select.poll()
            poll.register(fd, select.POLLPRI)
            deadline = time.monotonic() + timeout
            while b"populated 1" in os.pread(fd, 4096, 0):
                left = deadline - time.monotonic()
                if left <= 0:
                    return False
                poll.poll(left * 1000)
            return True
        except OSError:
            return True  # removed meanwhile
        finally:
            os.close(fd)

    def remove(self) -> None:
        """Remove the groups; they must be empty. A v1 group may stay busy for a moment after its last process."""
        _remove(self.folders())

    def remove_v1(self) -> None:
        """Remove the groups in the v1 hierarchies alone; as ``remove``."""
        _remove(dict.fromkeys(self.v1.values()))

    def events(self) -> Events:
        """Deaths by memory and forks refused so far, from the kernel's counters."""
        oom = 0
        if "memory" in self.on_v2:
            oom = _counter(f"{self.unified}/memory.events", "oom_kill")
        elif "memory" in self.v1:
            oom = _counter(f"{self.v1['memory']}/memory.oom_control", "oom_kill")
        pids = self._pids()
        return Events(oom, _counter(f"{pids}/pids.events", "max") if pids is not None else 0)

    def _pids(self) -> Path | None:
        return self.unified if "pids" in self.on_v2 else self.v1.get("pids")

    def open_folder(self) -> int:
        """A descriptor of the v2 leaf, for CLONE_INTO_CGROUP."""
        return os.open(self.unified, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)


def _remove(folders: Iterable[Path]) -> None:
    for folder in folders:
        for _ in range(50):
            try:
                os.rmdir(folder)
                break
            except FileNotFoundError:
                break
            except OSError as error:
                if error.errno != errno.EBUSY:
                    raise
                time.sleep(0.002)  # no event tells when a v1 group has become idle


_FROZEN = "trusted.isolator.frozen"
"""Attribute of a leaf that is to stay frozen, for whoever freezes it for a while beside the daemon."""


def keep_frozen(folder: str | os.PathLike[str]) -> bool:
    """Whether the daemon has frozen the leaf with this v2 folder."""
    try:
        return bool(os.getxattr(folder, _FROZEN))
    except OSError:
        return False


OPTIONAL = frozenset(
    {"memory.memsw.limit_in_bytes", "memory.kmem.tcp.limit_in_bytes", "memory.swappiness",
     "memory.swap.max", "memory.zswap.max"}
)  # fmt: skip
"""Absent on kernels without swap accounting, without swap, or without that controller file; reported by ``check``."""


def _tasks(limits: ResourcePolicy) -> str:
    return str(limits.tasks + 1)  # pid 1 of the cage is ours


def cpu_quota(permille: int) -> tuple[int, int]:
    """(quota, period) in µs for thousandths of a core; a tiny share gets a longer period, not a refusal."""
    period = PERIOD_US
    while permille * period // 1000 < _MIN_QUOTA_US and period < 1_000_000:
        period *= 2
    return max(permille * period // 1000, _MIN_QUOTA_US), min(period, 1_000_000)


def kill_first(pid: int) -> None:
    """Have the kernel kill a process that will clone a cage first when the whole host is out of memory.

    Its child inherits that instead of the daemon's own protection (OOMScoreAdjust= of the unit). Without
    CAP_SYS_RESOURCE a cage cannot set this back.
    """
    write_file(f"/proc/{pid}/oom_score_adj", OOM_SCORE_ADJ)


def _counter(path: str, key: str) -> int:
    with contextlib.suppress(OSError):
        for line in read_file(path).splitlines():
            name, _, value = line.partition(" ")
            if name == key:
                return int(value)
    return 0


def has_disk_caps(limits: ResourcePolicy | None) -> bool:
    """Whether a policy caps disk bandwidth."""
    return limits is not None and min(limits.io_read, limits.io_write) < NO_CAP


def _write_all(values: dict[str, str]) -> None:
    for path, value in values.items():
        try:
            write_file(path, value)
        except OSError as error:
            if os.path.basename(path) in OPTIONAL:
                continue
            raise ConfinementError(f"control group {path}", f"{value}: {error.strerror}") from None


def used_by(subtree: Subtree, leaf: str) -> float | None:
    """Seconds of processor time that a leaf has used, or with no name the whole subtree; None once it is gone."""
    counts = subtree.v1.get("cpuacct")
    file, word, unit = ("cpuacct.usage", 0, 1e-9) if counts else ("cpu.stat", 1, 1e-6)
    try:
        return int(read_file(f"{counts or subtree.unified}/{leaf}/{file}").split(None, 2)[word]) * unit
    except OSError:
        return None


def read_file(path: str) -> str:
    """Read a file of a control group: at most 16 KiB, in one call."""
    return read_raw(path).decode()


def read_raw(path: str) -> bytes:
    """Read a file of a control group as it is; as ``read_file``."""
    with owning(os.open(path, os.O_RDONLY | os.O_CLOEXEC)) as fd:
        return os.read(fd, 1 << 14)
