"""Namespaces: mount, ipc and uts are those of the process that was parked, pid and time come with the clone of pid 1.

The cgroup namespace is unshared by the child itself, which is in its groups: made any earlier it would be rooted at
the launcher's, and the leaf's name would be visible. The network one is made by the layer network.

In the time namespace (time_namespaces(7)) the clocks that count from the host's start, CLOCK_MONOTONIC and
CLOCK_BOOTTIME, count from the cage's: neither they nor process start times nor /proc/uptime tell how long the host has
run. The wall clock is the host's. A kernel without it, or a daemon without CAP_SYS_TIME, which the offsets take, shows
the host's uptime; the ledger says so.
"""

from __future__ import annotations

import contextlib
import functools
import os
import time
from typing import TYPE_CHECKING

from isolator.layers.base import CageSpec, Control, ControlState, Kept, Layer, Process, mismatch
from isolator.layers.plan import Birth, ParkOrder, Plan, Section
from isolator.linux import namespaces as ns
from isolator.linux.capability import has_capability
from isolator.linux.descriptors import owning

if TYPE_CHECKING:
    from isolator.policy.model import EffectivePolicy

_CAP_SYS_TIME = 25
_CLOCKS = {"monotonic": time.CLOCK_MONOTONIC, "boottime": time.CLOCK_BOOTTIME}

BEFORE_THE_PLAN = ("mnt", "ipc", "uts")
"""The namespaces of a process that is parked to become a cage."""
AT_BIRTH = ("pid",)
"""The namespaces that come with the clone of pid 1, besides the time namespace."""


class NamespacesSection(Section, kind="namespaces"):
    """The cage's host name."""

    hostname: str

    @staticmethod
    def enter_ahead(order: ParkOrder) -> None:
        ns.setdomainname("(none)")  # the host's would be inherited
        with contextlib.suppress(OSError):  # its control in the ledger says why
            ns.unshare(ns.CLONE_NEWTIME)  # of the children: their offsets can still be written

    def enter(self, fds: dict[str, int]) -> None:
        ns.unshare(ns.CLONE_NEWCGROUP)
        with contextlib.suppress(PermissionError):  # already a leader
            os.setsid()
        ns.sethostname(self.hostname)


class Namespaces(Layer):
    """Namespaces of the cage's own, a session of its own, a host name of its own, clocks that begin with it."""

    name = "namespaces"

    def __init__(self) -> None:
        self.parked = 0
        """The pid of the process that will clone the cage."""
        self._offsets: dict[str, int] = {}
        """Seconds by clock."""

    @classmethod
    def check(cls) -> list[Control]:
        missing = [kind for kind in ns.NAMESPACE_FILES if not os.path.exists(f"/proc/self/ns/{kind}")]
        if missing:
            return [
                Control(
                    "namespaces", cls.name, "unavailable", f"this kernel has no {', '.join(missing)} namespace",
                    "use a kernel with CONFIG_NAMESPACES and all of its kinds",
                )
            ]  # fmt: skip
        return [Control("namespaces", cls.name, "enforced", "mount, pid, ipc, uts, cgroup, net"), _check_time()]

    @classmethod
    def describe(cls, policy: EffectivePolicy) -> str:
        own = "processes, mounts, host name, uptime, IPC objects, control groups and network interfaces"
        return f"Sees only its own {own}."

    def prepare_clocks(self, birth: Birth) -> None:
        """Begin the clocks of the cage to come, if this host can set any."""
        if _check_time().state == "enforced":
            self._offsets = {name: -int(time.clock_gettime(clock)) for name, clock in _CLOCKS.items()}
            birth.offsets = "".join(f"{name} {seconds} 0\n" for name, seconds in self._offsets.items())
            with contextlib.suppress(FileNotFoundError):  # it has died, as the end of its link will show
                birth.folder = os.open(f"/proc/{self.parked}", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)

    def prepare(self, spec: CageSpec, plan: Plan) -> None:
        plan.add(NamespacesSection(spec.hostname))

    @property
    def boot_offset(self) -> int:
        """Seconds that the cage's CLOCK_BOOTTIME is ahead of the host's, once it is prepared."""
        return self._offsets.get("boottime", 0)

    def hand_over(self) -> Kept:
        return Kept({"offsets": self._offsets})

    def adopt(self, spec: CageSpec, kept: Kept) -> None:
        self._offsets = {str(name): int(offset) for name, offset in kept.values["offsets"].items()}

    def confirm(self, process: Process) -> None:
        for kind, host in _of_this_process().items():
            if process.namespace(kind) == host:
                raise mismatch(self.name, f"{kind} namespace", "one of its own", "the host's")
        if self._offsets:
            lines = (line.split() for line in process.read("timens_offsets").splitlines())
            if (found := {name: int(seconds) for name, seconds, _ in lines}) != self._offsets:
                raise mismatch(self.name, "offset of the clocks", self._offsets, found)


def enter_clocks(folder: int, offsets: bytes) -> None:
    """Enter the time namespace of the calling process's children: what it becomes shares its memory, clocks included.

    ``folder``: that of the process in /proc, which the template does not have; ``offsets``: for ``timens_offsets``.
    Raises OSError.
    """
    with owning(os.open("timens_offsets", os.O_WRONLY | os.O_CLOEXEC, dir_fd=folder)) as clocks:
        os.write(clocks, offsets)
    with owning(os.open("ns/time_for_children", os.O_RDONLY | os.O_CLOEXEC, dir_fd=folder)) as own:
        ns.setns(own, ns.CLONE_NEWTIME)


@functools.cache
def _of_this_process() -> dict[str, str]:
    return {kind: os.readlink(f"/proc/self/ns/{kind}") for kind in ns.NAMESPACE_FILES if kind != "net"}


@functools.cache
def _check_time() -> Control:
    def control(state: ControlState, reason: str, remedy: str = "") -> Control:
        return Control("uptime of its own", Namespaces.name, state, reason, remedy, mandatory=False, part="time")

    if not os.path.exists("/proc/self/ns/time"):
        return control("unavailable", "this kernel has no time namespace", "use a kernel with CONFIG_TIME_NS")
    if not has_capability(_CAP_SYS_TIME):
        remedy = "'isolator install' writes a unit that has it; a container needs --cap-add SYS_TIME"
        return control("unavailable", "without CAP_SYS_TIME no clock can be set back", remedy)
    return control("enforced", "time namespace")
