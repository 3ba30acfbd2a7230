"""Control groups: memory, cpu and task caps, membership, and the kill that nothing survives.

cgroup v2 keeps membership, ``cgroup.kill`` and, where it has the controllers, the limits. On hybrid hosts
(controllers bound to v1 hierarchies) each controller is found where it is mounted and enforced there; nothing above
this module knows. One leaf per run, ``BASE/NAME.RUN``: a v2 leaf that has once seen ``cgroup.kill`` kills
every later CLONE_INTO_CGROUP child at once. A cage is born in all of its groups: in the v2 leaf by CLONE_INTO_CGROUP,
in the v1 ones because the process that clones it was put there ahead, when they did not have the cage's name yet.

Everything is made below the daemon's own groups (isolator.layers.cgroup_subtree).
"""

from __future__ import annotations

import contextlib
import errno
import os
import select
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from isolator.errors import ConfinementError
from isolator.layers import cgroup_io
from isolator.layers.base import CageSpec, Control, Layer, Process, mismatch
from isolator.layers.cgroup_subtree import LIMITING, Subtree, find_hierarchies

if TYPE_CHECKING:
    from isolator.launch.plan import Plan
    from isolator.policy.model import EffectivePolicy, ResourcePolicy

PERIOD_US = 10_000
"""A short period: under the usual 100 ms a throttled plugin freezes for up to 75 ms at a time."""

OOM_SCORE_ADJ = "500"
"""Of every process in a cage: a plugin goes before anything of the host's."""

_MIN_QUOTA_US = 1_000  # the kernel refuses less


@dataclass(frozen=True)
class Events:
    """The kernel's own counters of one leaf."""

    oom_kills: int = 0
    task_denials: int = 0


@dataclass
class Leaf:
    """The groups of one run: the v2 one, and on hybrid hosts one for each v1 controller."""

    unified: Path
    v1: dict[str, Path] = field(default_factory=dict)
    on_v2: frozenset[str] = frozenset()
    blkio: Path | None = None
    """One more v1 group, where the limits ask for it: it is entered just before the exec."""

    @classmethod
    def under(cls, subtree: Subtree, name: str, limits: ResourcePolicy | None = None) -> Leaf:
        """The leaf ``name`` of a subtree (not made yet), with what its limits need."""
        v1 = {controller: path / name for controller, path in subtree.v1.items()}
        blkio = subtree.blkio / name if subtree.blkio is not None and cgroup_io.wanted(limits) else None
        return cls(subtree.unified / name, v1, subtree.on_v2, blkio)

    def folders(self) -> list[Path]:
        """Every folder that ``create`` makes."""
        return [self.unified, *dict.fromkeys(self.v1.values()), *([self.blkio] if self.blkio else [])]

    def create(self, limits: ResourcePolicy | None) -> dict[Path, str]:
        """Make the groups and write the limits but the processor's, before anything of a cage is in them.

        Returns what was written, by file.
        """
        self.create_v1()
        with contextlib.suppress(FileExistsError):
            os.mkdir(self.unified)  # this and the next few are a quarter of a start's preparation
        if self.blkio is not None:
            self.blkio.mkdir(exist_ok=True)
        return _write_all(self.values(limits)) if limits is not None else {}

    def cap_processor(self, limits: ResourcePolicy) -> dict[Path, str]:
        """Write the limits of the processor; returns what was written, by file."""
        return _write_all(self.cpu_values(limits))

    def create_v1(self) -> None:
        """Make the groups in the v1 hierarchies alone; those that are there stay."""
        for folder in dict.fromkeys(self.v1.values()):
            with contextlib.suppress(FileExistsError):
                os.mkdir(folder)

    def rename_v1(self, other: Leaf) -> None:
        """Give the v1 groups, with what is in them, the names that those of ``other`` are to have (v2 cannot)."""
        for mine, its in dict(zip(self.v1.values(), other.v1.values(), strict=True)).items():
            os.rename(mine, its)

    def values(self, limits: ResourcePolicy) -> dict[Path, str]:
        """Each file and what is written to it, in order; nothing for a controller that this host lacks.

        What caps the processor is apart, in ``cpu_values``.
        """
        tasks = str(limits.tasks + 1)  # pid 1 of the cage is ours
        values: dict[Path, str] = {}
        if "memory" in self.on_v2:
            values[self.unified / "memory.max"] = str(limits.memory)
            # Without swap there is nothing to reclaim above memory.high from a plugin that allocates without end:
            # the kernel only puts it to sleep, up to 2 s for every 128 KiB, and it hangs instead of being ended.
            values[self.unified / "memory.high"] = str(limits.memory_high) if limits.swap else "max"
            values[self.unified / "memory.swap.max"] = str(limits.swap)
            values[self.unified / "memory.zswap.max"] = "0"
            values[self.unified / "memory.oom.group"] = "1"
        elif "memory" in self.v1:
            memory = self.v1["memory"]
            values[memory / "memory.limit_in_bytes"] = str(limits.memory)
            values[memory / "memory.memsw.limit_in_bytes"] = str(limits.memory + limits.swap)
            values[memory / "memory.swappiness"] = "0" if limits.swap == 0 else "60"
            # Socket buffers are counted apart in v1: without this, as much again slips past the cap.
            values[memory / "memory.kmem.tcp.limit_in_bytes"] = str(limits.memory // 8)
        pids = self._pids()
        if pids is not None:
            values[pids / "pids.max"] = tasks
        return values

    def cpu_values(self, limits: ResourcePolicy) -> dict[Path, str]:
        """As ``values``, for the processor."""
        quota, period = cpu_quota(limits.cpu)
        if "cpu" in self.on_v2:
            return {self.unified / "cpu.max": f"{quota} {period}"}
        if "cpu" in self.v1:
            cpu = self.v1["cpu"]
            return {cpu / "cpu.cfs_period_us": str(period), cpu / "cpu.cfs_quota_us": str(quota)}
        return {}

    def attach_v1(self, pid: int) -> None:
        """Put the process that will clone a cage into the v1 groups; blocks for an RCU grace period or two.

        It also becomes what the kernel kills first when the whole host is out of memory: its child would inherit the
        daemon's own protection from that (OOMScoreAdjust= of the unit). Without CAP_SYS_RESOURCE a cage cannot set
        this back.
        """
        self._join(pid)
        _write(f"/proc/{pid}/oom_score_adj", OOM_SCORE_ADJ)

    def _join(self, pid: int) -> None:
        folders = list(dict.fromkeys(self.v1.values()))
        for folder in folders:
            (folder / "cgroup.procs").write_text(str(pid))
        for folder in folders:
            if str(pid) not in (folder / "cgroup.procs").read_text().split():
                raise mismatch("cgroup", str(folder), f"the group of {pid}", "not")

    def enter(self, pid: int) -> None:
        """Put a running process into every group of the leaf."""
        (self.unified / "cgroup.procs").write_text(str(pid))
        self._join(pid)

    def processes(self) -> list[int]:
        """The pids in the leaf, as seen from our pid namespace."""
        try:
            return [int(pid) for pid in (self.unified / "cgroup.procs").read_text().split()]
        except FileNotFoundError:
            return []

    def kill(self) -> None:
        """Kill every process of the leaf at once; no error when it is empty or gone (or a v1 group, which cannot)."""
        with contextlib.suppress(FileNotFoundError):
            fd = os.open(self.unified / "cgroup.kill", os.O_WRONLY | os.O_CLOEXEC)
            try:
                os.write(fd, b"1")
            finally:
                os.close(fd)

    def populated(self) -> bool:
        """Whether any process, a zombie included, is left in the leaf."""
        try:
            return "populated 1" in _read(self.unified / "cgroup.events")
        except FileNotFoundError:
            return False

    def wait_empty(self, timeout: float) -> bool:
        """Block until the leaf is empty (cgroup.events wakes poll); False when it is not in ``timeout`` seconds."""
        try:
            fd = os.open(self.unified / "cgroup.events", os.O_RDONLY | os.O_CLOEXEC)
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
        for folder in self.folders():
            for _ in range(50):
                try:
                    folder.rmdir()
                    break
                except FileNotFoundError:
                    break
                except OSError as error:
                    if error.errno != errno.EBUSY:
                        raise
                    time.sleep(0.002)  # no event tells when a v1 group has become idle

    def events(self) -> Events:
        """Deaths by memory and forks refused so far, from the kernel's counters."""
        oom = 0
        if "memory" in self.on_v2:
            oom = _counter(self.unified / "memory.events", "oom_kill")
        elif "memory" in self.v1:
            oom = _counter(self.v1["memory"] / "memory.oom_control", "oom_kill")
        pids = self._pids()
        return Events(oom, _counter(pids / "pids.events", "max") if pids is not None else 0)

    def _pids(self) -> Path | None:
        return self.unified if "pids" in self.on_v2 else self.v1.get("pids")

    def open_folder(self) -> int:
        """A descriptor of the v2 leaf, for CLONE_INTO_CGROUP."""
        return os.open(self.unified, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)


_OPTIONAL = frozenset(
    {"memory.memsw.limit_in_bytes", "memory.kmem.tcp.limit_in_bytes", "memory.swappiness",
     "memory.swap.max", "memory.zswap.max"}
)  # fmt: skip
"""Absent on kernels without swap accounting, without swap, or without that controller file; reported by ``check``."""


def cpu_quota(permille: int) -> tuple[int, int]:
    """(quota, period) in µs for thousandths of a core; a tiny share gets a longer period, not a refusal."""
    period = PERIOD_US
    while permille * period // 1000 < _MIN_QUOTA_US and period < 1_000_000:
        period *= 2
    return max(permille * period // 1000, _MIN_QUOTA_US), min(period, 1_000_000)


def _counter(path: Path, key: str) -> int:
    with contextlib.suppress(OSError):
        for line in _read(path).splitlines():
            name, _, value = line.partition(" ")
            if name == key:
                return int(value)
    return 0


class Cgroup(Layer):
    """Caps on memory, cpu and tasks."""

    name = "cgroup"
    may_degrade = tuple(f"cgroup.{controller}" for controller in (*LIMITING, "io"))

    from_birth = True

    def __init__(self, subtree: Subtree) -> None:
        self._subtree = subtree
        self.leaf: Leaf | None = None
        self.ahead: Leaf | None = None
        """The v1 groups that the parked process is in; they become the leaf's."""
        self._disks: list[str] = []
        self._caps: dict[Path, str] = {}
        """What each file of the leaf must say."""
        self._processor_caps: dict[Path, str] = {}

    @classmethod
    def check(cls) -> list[Control]:
        found = find_hierarchies()
        if found.unified is None:
            remedy = "mount -t cgroup2 none /sys/fs/cgroup/unified, or boot with systemd"
            return [Control("control groups", cls.name, "unavailable", "no cgroup v2 hierarchy is mounted", remedy)]
        controls = []
        if not (found.unified / "cgroup.kill").exists() and (found.unified / "cgroup.type").exists():
            controls.append(
                Control("kill of a whole cage", cls.name, "unavailable", "no cgroup.kill", "kernel 5.14", part="kill")
            )
        names = {"memory": "memory cap", "cpu": "cpu cap", "pids": "task cap"}
        for controller, label in names.items():
            if controller in found.v2:
                controls.append(Control(label, cls.name, "enforced", "cgroup v2", part=controller))
            elif controller in found.v1:
                controls.append(Control(label, cls.name, "enforced", "cgroup v1 (hybrid host)", part=controller))
            else:
                remedy = "boot with cgroup_enable=memory, or ask the container's operator for it"
                why = f"no {controller} controller"
                controls.append(Control(label, cls.name, "unavailable", why, remedy, part=controller))
        return [*controls, cgroup_io.check(found)]

    @classmethod
    def describe(cls, policy: EffectivePolicy) -> str:
        r = policy.resources
        return f"It can use {r.memory >> 20} MiB of memory, {r.cpu / 10:g} % of one core and {r.tasks} tasks at once."

    def prepare(self, spec: CageSpec, plan: Plan) -> None:
        self._limits = spec.policy.resources
        self.leaf = Leaf.under(self._subtree, spec.leaf, self._limits)
        if self.caps_disks:
            self._disks = cgroup_io.devices([*(bind.fd for bind in spec.binds), "/usr"])
        if self.ahead is not None:
            self.ahead.rename_v1(self.leaf)
        self._caps = self.leaf.create(self._limits)
        plan.give("cgroup", self.leaf.open_folder())

    @staticmethod
    def enter(section: dict[str, Any], fds: dict[str, int]) -> None:
        """Nothing: the child is born in its groups."""

    def confirm(self, process: Process) -> None:
        assert self.leaf is not None
        # "N:controllers:path" a line; the leaf's name carries the run, so there is only one group of that name.
        place = f"/{self._subtree.unified.name}/{self.leaf.unified.name}"
        inside = {
            controller
            for controllers, path in (line.split(":", 2)[1:] for line in process.read("cgroup").splitlines())
            if path.endswith(place)
            for controller in controllers.split(",")
        }
        for controller in ("", *self.leaf.v1):
            if controller not in inside:
                raise mismatch(self.name, f"{controller or 'v2'} group", place, "another")
        if (found := process.read("oom_score_adj").strip()) != OOM_SCORE_ADJ:
            raise mismatch(self.name, "oom_score_adj", OOM_SCORE_ADJ, found)
        self._confirm_all(self._caps)

    def cap_processor(self) -> None:
        """Put the processor's cap in force and read it back: after the child has entered its layers, before its exec.

        Before, it would be our own work that is throttled: under the usual 25 % a start takes twice as long.
        """
        assert self.leaf is not None
        self._processor_caps = self.leaf.cap_processor(self._limits)
        self._confirm_all(self._processor_caps)

    def confirm_again(self, process: Process) -> None:
        """All of it, of a cage that runs."""
        self.confirm(process)
        self._confirm_all(self._processor_caps)

    @property
    def caps_disks(self) -> bool:
        """Whether the policy asks for ``cap_disks``."""
        return cgroup_io.wanted(self._limits)

    def cap_disks(self, pid: int) -> None:
        """Put the caps on disks in force for the cage of pid 1 ``pid``, and read them back; blocks, just before exec.

        Entering one more v1 group waits for an RCU grace period: only a cage with such a cap pays for it.
        """
        assert self.leaf is not None
        try:
            cgroup_io.apply(self.leaf, self._limits, self._disks, pid)
        except ConfinementError:
            if "io" not in self._subtree.optional:
                raise
            return
        cgroup_io.confirm(self.leaf, self._limits, self._disks, pid)

    def _confirm_all(self, values: dict[Path, str]) -> None:
        for path, wanted in values.items():
            try:
                found = _read(path).strip()
            except FileNotFoundError:
                if path.name in _OPTIONAL:
                    continue
                raise mismatch(self.name, str(path), wanted, "missing") from None
            if found != wanted and not _same_pages(found, wanted) and path.name not in _OPTIONAL:
                raise mismatch(self.name, str(path), wanted, found)

    def release(self) -> None:
        if self.leaf is not None:
            self.leaf.kill()
            self.leaf.wait_empty(5.0)
            self.leaf.remove()
            self.leaf = None


def _write_all(values: dict[Path, str]) -> dict[Path, str]:
    for path, value in values.items():
        try:
            _write(path, value)
        except OSError as error:
            if path.name in _OPTIONAL:
                continue
            raise ConfinementError(f"control group {path}", f"{value}: {error.strerror}") from None
    return values


def _write(path: Path | str, value: str) -> None:
    fd = os.open(path, os.O_WRONLY | os.O_CLOEXEC)
    try:
        os.write(fd, value.encode())
    finally:
        os.close(fd)


def _read(path: Path) -> str:
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        return os.read(fd, 4096).decode()
    finally:
        os.close(fd)


def _same_pages(found: str, wanted: str) -> bool:
    """The kernel rounds sizes down to whole pages."""
    return found.isdigit() and wanted.isdigit() and 0 <= int(wanted) - int(found) < os.sysconf("SC_PAGE_SIZE")
