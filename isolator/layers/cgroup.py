"""Control groups: memory, cpu and task caps, membership, and the kill that nothing survives.

cgroup v2 keeps membership, ``cgroup.kill`` and, where it has the controllers, the limits. On hybrid hosts
(controllers bound to v1 hierarchies) each controller is found where it is mounted and enforced there; nothing above
this module knows. One leaf per run, ``BASE/NAME.RUN``: a v2 leaf that has once seen ``cgroup.kill`` kills
every later CLONE_INTO_CGROUP child at once. A cage is born in all of its groups: in the v2 leaf by CLONE_INTO_CGROUP,
in the v1 ones because the process that clones it was put there ahead, when they did not have the cage's name yet.

Everything is made below the daemon's own groups. On a systemd host they must be delegated (the unit has
``Delegate=yes``; from a shell a transient scope is taken), and what runs in them moves into a leaf first, since v2
allows no processes in a group that distributes controllers.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
import select
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from isolator.errors import ConfinementError
from isolator.layers import cgroup_io
from isolator.layers.base import CageSpec, Control, Layer, Process, mismatch

if TYPE_CHECKING:
    from isolator.launch.plan import Plan
    from isolator.policy.model import EffectivePolicy, ResourcePolicy

LIMITING = ("memory", "cpu", "pids")
"""The controllers without which nothing starts."""

PERIOD_US = 10_000
"""A short period: under the usual 100 ms a throttled plugin freezes for up to 75 ms at a time."""

OOM_SCORE_ADJ = "500"
"""Of every process in a cage: a plugin goes before anything of the host's."""

_MIN_QUOTA_US = 1_000  # the kernel refuses less


@dataclass(frozen=True)
class Hierarchies:
    """Where this process is in each hierarchy, as absolute folders."""

    unified: Path | None
    v2: frozenset[str]
    """Limiting controllers that the unified hierarchy offers to us."""
    v1: dict[str, Path]
    """Our own group in the v1 hierarchy of each controller that has one."""


def find_hierarchies() -> Hierarchies:
    """Read /proc/self/cgroup and /proc/self/mountinfo; a group that is not mounted is not offered."""
    own: dict[str, str] = {}
    for line in Path("/proc/self/cgroup").read_text().splitlines():
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


@dataclass
class Subtree:
    """Our own groups: the one that holds the leaves of cages and services, in every hierarchy."""

    unified: Path
    v1: dict[str, Path]
    on_v2: frozenset[str]
    blkio: Path | None = None
    """In v1's blkio hierarchy, on hosts where v2 has no io controller; only cages with a cap on disks have a leaf."""
    optional: frozenset[str] = frozenset()
    """Controllers that may be done without."""

    def folders(self) -> list[Path]:
        """Every folder of the subtree's top, one a hierarchy."""
        return list(dict.fromkeys([self.unified, *self.v1.values(), *([self.blkio] if self.blkio else [])]))

    def remove(self) -> None:
        """Remove the subtree's tops; leaves must be gone."""
        for folder in self.folders():
            with contextlib.suppress(OSError):
                folder.rmdir()


def open_subtree(name: str, *, optional: frozenset[str] = frozenset()) -> Subtree:
    """Make (or find) the subtree ``name`` below our own groups, with the limiting controllers enabled.

    Without a controller that is not ``optional`` it raises ConfinementError.
    """
    found = find_hierarchies()
    if found.unified is None:
        raise ConfinementError(
            "control groups", "no cgroup v2 hierarchy is mounted",
            "mount one: 'mount -t cgroup2 none /sys/fs/cgroup/unified', or boot with systemd",
        )  # fmt: skip
    missing = [c for c in LIMITING if c not in found.v2 and c not in found.v1 and c not in optional]
    if missing:
        raise ConfinementError(
            "control groups", f"no {', '.join(missing)} controller in cgroup v2 or v1",
            "enable it on the kernel command line (cgroup_enable=memory) or ask the container's operator for it",
        )  # fmt: skip
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
    return Subtree(unified, v1, on_v2, blkio, optional)


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
    """Move what runs in a group into a leaf of it: no processes may be in a group that distributes controllers (EBUSY).

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
        raise ConfinementError(
            "control groups", f"systemd gave no delegated scope ({result.stderr.strip()})",
            "run it as a unit with Delegate=yes, or through 'systemd-run --scope -p Delegate=yes'",
        )  # fmt: skip
    # The job runs after the reply. A move into another group wakes nobody, so this looks again until it happened.
    deadline = time.monotonic() + 10
    while Path("/proc/self/cgroup").read_text() == before:
        if time.monotonic() > deadline:
            raise ConfinementError(
                "control groups", "systemd did not move us into our scope in 10 s", "see its journal"
            )
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
            raise ConfinementError(
                f"control group {group}", f"cannot enable {controller}: {why}",
                "start the daemon as its systemd unit (isolator install), or from a group of its own",
            ) from None  # fmt: skip


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

    def create(self, limits: ResourcePolicy | None) -> None:
        """Make the groups and write the limits but the processor's, before anything of a cage is in them."""
        self.create_v1()
        with contextlib.suppress(FileExistsError):
            os.mkdir(self.unified)  # this and the next few are a quarter of a start's preparation
        if self.blkio is not None:
            self.blkio.mkdir(exist_ok=True)
        if limits is None:
            return
        _write_all(self.values(limits))

    def cap_processor(self, limits: ResourcePolicy) -> None:
        """Write the limits of the processor."""
        _write_all(self.cpu_values(limits))

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
            return "populated 1" in (self.unified / "cgroup.events").read_text()
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
    try:
        text = path.read_text()
    except OSError:
        return 0
    found = re.search(rf"^{key} (\d+)$", text, re.MULTILINE)
    return int(found[1]) if found else 0


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
        self.leaf.create(self._limits)
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
        self._confirm_all(self.leaf.values(self._limits))

    def cap_processor(self) -> None:
        """Put the processor's cap in force and read it back: after the child has entered its layers, before its exec.

        Before, it would be our own work that is throttled: under the usual 25 % a start takes twice as long.
        """
        assert self.leaf is not None
        self.leaf.cap_processor(self._limits)
        self._confirm_all(self.leaf.cpu_values(self._limits))

    def confirm_again(self, process: Process) -> None:
        """All of it, of a cage that runs."""
        assert self.leaf is not None
        self.confirm(process)
        self._confirm_all(self.leaf.cpu_values(self._limits))

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


def _write_all(values: dict[Path, str]) -> None:
    for path, value in values.items():
        try:
            _write(path, value)
        except OSError as error:
            if path.name in _OPTIONAL:
                continue
            raise ConfinementError(f"control group {path}", f"{value}: {error.strerror}") from None


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
