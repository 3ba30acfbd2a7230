"""Control groups: memory, cpu and task caps, membership, and the kill that nothing survives. No section: the child is
born in its groups.

cgroup v2 keeps membership, ``cgroup.kill`` and, where it has the controllers, the limits. On hybrid hosts
(controllers bound to v1 hierarchies) each controller is found where it is mounted and enforced there; nothing above
this module knows. One leaf per run, ``BASE/NAME.RUN``: a v2 leaf that has once seen ``cgroup.kill`` kills
every later CLONE_INTO_CGROUP child at once. A cage is born in all of its groups: in the v2 leaf by CLONE_INTO_CGROUP,
in the v1 ones because the process that clones it was put there ahead, often before they had the cage's name.

Everything is made below the daemon's own groups (isolator.layers.cgroup.subtree).
"""

from __future__ import annotations

import contextlib
import os
from typing import TYPE_CHECKING

from isolator.errors import ConfinementError
from isolator.layers.base import CageSpec, Control, Kept, Layer, Process, mismatch
from isolator.layers.cgroup import disk
from isolator.layers.cgroup.leaf import OOM_SCORE_ADJ, OPTIONAL, Leaf, has_disk_caps, read_raw, used_by
from isolator.layers.cgroup.subtree import LIMITING, Subtree, find_hierarchies
from isolator.layers.phrases import count, listing

if TYPE_CHECKING:
    from isolator.layers.plan import Birth, Plan
    from isolator.policy.model import EffectivePolicy


class Cgroup(Layer):
    """Caps on memory, cpu and tasks."""

    name = "cgroup"
    may_degrade = tuple(f"cgroup.{controller}" for controller in (*LIMITING, "io"))

    in_force_from = "birth"

    def __init__(self, subtree: Subtree) -> None:
        self._subtree = subtree
        self.leaf: Leaf | None = None
        self.ahead: Leaf | None = None
        """The v1 groups that the parked process is in; they become the leaf's."""
        self._disks: list[str] = []
        self._caps: dict[str, str] = {}
        """The value of each file of the leaf, of the processor's from ``cap_processor`` on."""
        self._confirmed: dict[str, bytes] = {}
        """The content of each file as of the last ``confirm`` that found all in order."""
        self._plugin = ""

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
        return [*controls, disk.check(found)]

    @classmethod
    def describe(cls, policy: EffectivePolicy) -> str:
        from isolator.policy.units import NO_CAP, format_cpu, format_size

        limits = policy.resources
        slowed = f" (slowed down above {format_size(limits.memory_high)} on cgroup v2)" if limits.swap else ""
        swap = f"{format_size(limits.swap)} of swap" if limits.swap else "no swap"
        rates = [
            f"{verb} at most {format_size(rate)} a second"
            for verb, rate in (("reads", limits.io_read), ("writes", limits.io_write))
            if rate < NO_CAP
        ]
        disks = f" It {listing(rates)} of each disk." if rates else ""
        return (
            f"May use {format_size(limits.memory)} of memory{slowed}, {swap}, {format_cpu(limits.cpu)} of one core and "
            f"{count(limits.tasks, 'task')}; beyond its memory every process of the plugin is ended.{disks}"
        )

    def prepare_birth(self, spec: CageSpec, birth: Birth) -> None:
        self._plugin, self._limits = spec.name, spec.policy.resources
        self.leaf = Leaf.under(self._subtree, spec.leaf, self._limits)
        self.leaf.create()
        birth.cgroup = self.leaf.open_folder()

    def prepare(self, spec: CageSpec, plan: Plan) -> None:
        assert self.leaf is not None
        if self.caps_disks:
            disks = disk.devices([*(bind.fd for bind in spec.binds if bind.tree is None), "/usr"])
            disks += disk.disks_of(bind.tree.device for bind in spec.binds if bind.tree is not None)
            self._disks = list(dict.fromkeys(disks))
        if self.ahead is not None and self.ahead.unified != self.leaf.unified:
            self.ahead.rename_v1(self.leaf)
        self._caps = self.leaf.limit(self._limits)

    def hand_over(self) -> Kept:
        return Kept({"disks": self._disks})

    def adopt(self, spec: CageSpec, kept: Kept) -> None:
        self._limits = spec.policy.resources
        self.leaf = Leaf.under(self._subtree, spec.leaf, self._limits)
        self._disks = list(map(str, kept.values["disks"]))
        self._caps = self.leaf.values(self._limits) | self.leaf.cpu_values(self._limits)

    def confirm(self, process: Process) -> None:
        assert self.leaf is not None
        # "N:controllers:path" a line; the leaf's name carries the run, so there is only one group of that name.
        place = f"/{self._subtree.unified.name}/{self.leaf.unified.name}"
        self._confirmed, read = {}, dict[str, bytes]()
        lines = _read(f"/proc/{process.pid}/cgroup", read).splitlines()
        inside = {
            controller
            for controllers, path in (line.split(":", 2)[1:] for line in lines)
            if path.endswith(place)
            for controller in controllers.split(",")
        }
        for controller in ("", *self.leaf.v1):
            if controller not in inside:
                raise mismatch(self.name, f"{controller or 'v2'} group", place, "another")
        if (found := _read(f"/proc/{process.pid}/oom_score_adj", read).strip()) != OOM_SCORE_ADJ:
            raise mismatch(self.name, "oom_score_adj", OOM_SCORE_ADJ, found)
        self._confirm_all(self._caps, read)
        self._confirmed = read

    def cap_processor(self) -> None:
        """Put the processor's cap in force and read it back: after the child has entered its layers, before its exec.

        Before, it would be our own work that is throttled: under the usual 25 % a start takes twice as long.
        """
        assert self.leaf is not None
        if self._plugin in self._subtree.behind:
            self.leaf.put_behind()
        of_processor = self.leaf.cap_processor(self._limits)
        self._confirm_all(of_processor, {})
        self._caps, self._confirmed = self._caps | of_processor, {}

    def confirm_again(self, process: Process) -> None:
        """Confirm the groups of a running cage; every file of them is read."""
        with contextlib.suppress(OSError):
            if self._confirmed and all(read_raw(path) == found for path, found in self._confirmed.items()):
                return
        self.confirm(process)

    @property
    def caps_disks(self) -> bool:
        """Whether the policy asks for ``cap_disks``."""
        return has_disk_caps(self._limits)

    def cap_disks(self, pid: int) -> None:
        """Put the caps on disks in force for the cage of pid 1 ``pid``, and read them back; blocks, just before exec.

        Entering one more v1 group waits for an RCU grace period: only a cage with such a cap pays for it.
        """
        assert self.leaf is not None
        try:
            disk.apply(self.leaf, self._limits, self._disks, pid)
        except ConfinementError:
            if "io" not in self._subtree.optional:
                raise
            return
        disk.confirm(self.leaf, self._limits, self._disks, pid)

    def _confirm_all(self, values: dict[str, str], read: dict[str, bytes]) -> None:
        """Compare files with their values; what each has is put into ``read``."""
        for path, wanted in values.items():
            try:
                found = _read(path, read).strip()
            except FileNotFoundError:
                if os.path.basename(path) in OPTIONAL:
                    continue
                raise mismatch(self.name, path, wanted, "missing") from None
            name = os.path.basename(path)
            is_size = name.startswith("memory.")
            if found != wanted and not (is_size and _same_pages(found, wanted)) and name not in OPTIONAL:
                raise mismatch(self.name, path, wanted, found)

    def release(self) -> None:
        """Remove the groups, which the cage has emptied."""
        if self.leaf is not None:
            name = self.leaf.unified.name
            if (used := used_by(self._subtree, name)) is not None:
                self._subtree.ended.append((name, used))
            self.leaf.remove()
            self.leaf = None


def _read(path: str, read: dict[str, bytes]) -> str:
    read[path] = read_raw(path)
    return read[path].decode()


def _same_pages(found: str, wanted: str) -> bool:
    """Whether two sizes are equal in whole pages, to which the kernel rounds down; less than a page is none."""
    page = os.sysconf("SC_PAGE_SIZE")
    return found.isdigit() and wanted.isdigit() and int(found) == int(wanted) // page * page > 0
