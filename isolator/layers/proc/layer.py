"""/proc, and what little there is of /sys: programs learn the cage's limits, not the host's.

A cage has a whole /proc of its own pid namespace; its processes are shown with ``hidepid=invisible``. Of the entries
that are no process, it shows what ``SHOWN`` allows and links; every other one is covered: by the cage's own figures
(isolator.layers.proc.figures), by what the template has in its place (isolator.layers.proc.template), or by an empty
file or folder. What is to be covered is read from the mounted /proc itself, so an entry that only another kernel has is
covered as well. An entry that appears later, as a module is loaded, is not: isolator.layers.proc.drift finds it, and
the cage is started anew.

The covers are mounts of the cage's own mount namespace, in which nobody may mount or unmount; ``self/root/proc`` leads
to them too. /sys/fs/cgroup has the cage's own groups, by binds of the leaf's folders: there is no way up from them, and
a controller in which the cage has no group of its own is not there.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from isolator.layers.base import CageSpec, Control, Kept, Layer, Process, mismatch
from isolator.layers.phrases import count
from isolator.layers.plan import ParkOrder, Part, Plan, Section
from isolator.layers.proc.template import CAGE, FILE, FILES, FOLDER, VIEW
from isolator.linux import mount

if TYPE_CHECKING:
    from isolator.layers.cgroup.leaf import Leaf
    from isolator.layers.namespaces import Namespaces
    from isolator.layers.proc.drift import ProcDrift, ProcWatch
    from isolator.layers.proc.figures import Figures
    from isolator.policy.model import EffectivePolicy

SHOWN = frozenset({"sysvipc", "uptime", "version"})
"""The kernel's own entries that a cage sees: objects of its own IPC namespace, the time since its start, uname(2)."""

_MS_NOSUID, _MS_NODEV, _MS_NOEXEC = 2, 4, 8
_MS_PROC = _MS_NOSUID | _MS_NODEV | _MS_NOEXEC
_OPTIONS = "hidepid=invisible"
_READ_ONLY = mount.RDONLY | mount.NOSUID | mount.NODEV | mount.NOEXEC
_FIGURES = "figures"
_CPU = "/sys/devices/system/cpu"


class GroupFolder(Part, kind="group_folder"):
    """A control group of the cage's: the plan's descriptor of it, and its place below /sys/fs/cgroup."""

    place: str
    fd: str


class ProcSection(Section, kind="proc"):
    """The cage's own /proc, the groups that it is shown, and the processors that it runs on: numbers with commas."""

    groups: tuple[GroupFolder, ...]
    processors: str

    @staticmethod
    def enter_ahead(order: ParkOrder) -> None:
        os.chdir("/proc")  # the template's
        mount.attach(order.figures, CAGE)
        os.close(order.figures)
        mount.bind(CAGE, VIEW)
        view = mount.open_mount(VIEW)
        mount.set_attributes(view, _READ_ONLY, recursive=False)
        os.close(view)
        mount.unmount(CAGE, lazy=True)  # what can be written there is written through the descriptor alone
        mount.bind(f"{VIEW}/cpu", _CPU)
        os.chdir("/")

    @staticmethod
    def enter_born(order: ParkOrder) -> None:
        os.chdir("/proc")  # the template's, and from the next mount on the folder below it
        mount.mount("proc", "/proc", _MS_PROC, _OPTIONS)
        _cover()
        os.chdir("/")

    def enter(self, fds: dict[str, int]) -> None:
        # Here, where only the cage waits if the kernel has to move it to another processor.
        os.sched_setaffinity(0, list(map(int, self.processors.split(","))))
        for group in self.groups:
            mount.attach(fds[group.fd], f"/sys/fs/cgroup/{group.place}")
            os.close(fds[group.fd])  # there may be more descriptors than the cage may have open files


def _cover() -> None:
    """Cover the entries of /proc; the working directory has what covers them."""
    for name, is_folder in entries("/proc"):
        mount.bind_again(_cover_of(name, is_folder))


@functools.cache
def _cover_of(name: str, is_folder: bool) -> mount.Bind:
    """The cover of an entry, found out in the working directory: the template of /proc, or what is mounted over it."""
    if f"proc/{name}" in FILES:
        cover = f"{VIEW}/proc/{name}"
    elif os.path.lexists(name):
        cover = name
    else:
        cover = FOLDER if is_folder else FILE
    return mount.new_bind(cover, f"/proc/{name}", recursive=is_folder)


def learn_covers(found: Iterable[tuple[str, bool]]) -> None:
    """Find out in the template what covers the host's ``entries``: a launcher does it once, for all its cages."""
    os.chdir("/proc")
    for name, is_folder in found:
        _cover_of(name, is_folder)
    os.chdir("/")


def entries(folder: str | int) -> list[tuple[str, bool]]:
    """The entries of a /proc that are to be covered, and whether each is a folder.

    A link shows a path, and leads to what is covered or shown.
    """
    with os.scandir(folder) as found:
        return [
            (entry.name, entry.is_dir())
            for entry in found
            if not entry.name.isdigit() and entry.name not in SHOWN and not entry.is_symlink()
        ]


class Proc(Layer):
    """Its own limits, and nothing of the host's, in /proc and /sys."""

    name = "proc"
    in_force_from = "view"

    def __init__(self, namespaces: Namespaces) -> None:
        self._namespaces = namespaces
        self.folder = -1
        """A file system in memory for the cage's figures (``new_figures``), which its parked process has mounted; the
        caller's."""
        self.leaf: Leaf | None = None
        """The cage's groups, once they are made."""
        self._figures: Figures | None = None
        self._made: tuple[frozenset[str], int] = frozenset(), 0
        """The names of what is covered in the cage's /proc, and a sign of by what (``covers``)."""
        self._drift: ProcDrift | None = None
        """From the first look at it on."""

    @classmethod
    def check(cls) -> list[Control]:
        try:
            os.close(mount.new_filesystem("proc", {"hidepid": "invisible"}))
        except OSError as error:
            remedy = "use kernel 5.8 or newer, and run as root outside a container that forbids mounts"
            return [Control("own /proc", cls.name, "unavailable", f"{error.strerror}", remedy)]
        return [Control("own /proc", cls.name, "enforced", "covered but for the cage's own")]

    @classmethod
    def describe(cls, policy: EffectivePolicy) -> str:
        from isolator.policy.units import format_size

        limits = policy.resources
        processors = count(-(-limits.cpu // 1000), "processor")
        return (
            f"Learns its own limits in /proc and /sys, not this host's: at most {processors}, "
            f"{format_size(limits.memory)} of memory, its own load and control groups; of /proc's other entries sees "
            "none of the host's."
        )

    def prepare(self, spec: CageSpec, plan: Plan) -> None:
        from isolator.layers.proc.figures import Figures, choose_processors

        self._processors = choose_processors(spec.policy.resources.cpu)
        limits = spec.policy.resources
        self._figures = Figures.of(self.folder, limits, self._processors, self._namespaces.boot_offset)
        self._figures.write()
        groups = []
        for place, path in self.leaf.by_controller() if self.leaf is not None else ():
            tree = mount.clone_tree(path, recursive=False)
            plan.own(f"group {place}", tree)
            mount.set_attributes(tree, _READ_ONLY, recursive=False)
            groups.append(GroupFolder(place, f"group {place}"))
        plan.add(ProcSection(tuple(groups), ",".join(map(str, self._processors))))

    def hand_over(self) -> Kept:
        figures = self._figures
        return Kept(
            {"processors": self._processors, "figures": figures.hand_over() if figures is not None else None},
            {_FIGURES: self.folder},
        )

    def adopt(self, spec: CageSpec, kept: Kept) -> None:
        from isolator.layers.proc.figures import Figures

        self._processors = tuple(map(int, kept.values["processors"]))
        self.folder = kept.fds[_FIGURES]
        if (figures := kept.values["figures"]) is not None:
            self._figures = Figures.adopt(self.folder, self._processors, figures)

    def confirm(self, process: Process) -> None:
        if (found := os.sched_getaffinity(process.pid)) != set(self._processors):
            raise mismatch(self.name, "its processors", set(self._processors), found)
        mounts = process.mounts
        if " - proc " not in (own := mounts.get("/proc", "")) or _OPTIONS not in own:
            raise mismatch(self.name, "/proc", f"its own processes, {_OPTIONS}", "another")
        names = names_in(process)
        if bare := uncovered(names, mounts):
            raise mismatch(self.name, "/proc", "covered", f"open at {', '.join(bare)}")
        self._made = names, covers(names, mounts)
        device = os.fstat(self.folder).st_dev
        number = f"{os.major(device)}:{os.minor(device)}"
        for place in (*(f"/proc/{name}" for name in ("cpuinfo", "loadavg", "meminfo", "stat")), _CPU):
            line = mounts.get(place, "").split()
            if not line or line[2] != number or "ro" not in line[5].split(","):
                raise mismatch(self.name, place, "the cage's figures, read-only", " ".join(line) or "the host's")

    def detect_drift(self, process: Process, watch: ProcWatch) -> str:
        """Return which entry of the cage's /proc somebody has changed; empty: none. Raises OSError."""
        if self._drift is None:
            from isolator.layers.proc.drift import ProcDrift

            self._drift = ProcDrift(watch, *self._made)
        return self._drift.detect(process)

    def unwatch(self) -> None:
        """Let go of the cage's mounts, which would outlast it otherwise; idempotent."""
        if self._drift is not None:
            self._drift.end()

    def refresh(self, usage: Mapping[str, Any], uptime: float) -> None:
        """Write the figures anew: ``usage`` as in a ``resources`` record."""
        if self._figures is not None:
            self._figures.refresh(usage, uptime)


def names_in(process: Process) -> frozenset[str]:
    """The names that are to be covered in the /proc that a process sees; raises OSError."""
    return frozenset(name for name, _ in entries(f"/proc/{process.pid}/root/proc"))


def uncovered(names: frozenset[str], mounts: Mapping[str, str]) -> list[str]:
    """List those names in /proc on which nothing is mounted; ``mounts``: `Process.mounts`."""
    return sorted(name for name in names if f"/proc/{name}" not in mounts)


def covers(names: frozenset[str], mounts: Mapping[str, str]) -> int:
    """A sign of what is mounted as /proc and on these names in it: another one once anything of that is another."""
    return hash(tuple(line for place, line in mounts.items() if place == "/proc" or _top(place) in names))


def _top(place: str) -> str:
    return place.split("/", 3)[2] if place.startswith("/proc/") else ""


def new_figures() -> int:
    """A descriptor of a detached file system in memory for the figures of one cage, whose files are empty yet."""
    attributes = mount.NOSUID | mount.NODEV | mount.NOEXEC
    folder = mount.new_filesystem("tmpfs", {"size": "4m", "nr_inodes": "32", "mode": "0755"}, attributes=attributes)
    for name in ("proc", "cpu"):
        os.mkdir(name, 0o755, dir_fd=folder)
    for name in ("possible", "present"):
        os.symlink("online", f"cpu/{name}", dir_fd=folder)
    for name in FILES:
        os.close(os.open(name, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o444, dir_fd=folder))
    return folder
