"""Namespaces: mount, ipc and uts are those of the process that was parked, pid comes with the clone of pid 1.

The cgroup namespace is unshared by the child itself, which is in its groups: made any earlier it would be rooted at
the launcher's, and the leaf's name would be visible. The network one is made by the layer network.
"""

from __future__ import annotations

import contextlib
import functools
import os
from typing import TYPE_CHECKING

from isolator.layers.base import CageSpec, Control, Layer, Process, mismatch
from isolator.layers.plan import ParkOrder, Plan, Section
from isolator.linux import namespaces as ns

if TYPE_CHECKING:
    from isolator.policy.model import EffectivePolicy

BEFORE_THE_PLAN = ("mnt", "ipc", "uts")
"""The namespaces of a process that is parked to become a cage."""


class NamespacesSection(Section, kind="namespaces"):
    """The cage's host name."""

    hostname: str

    @staticmethod
    def enter_ahead(order: ParkOrder) -> None:
        ns.setdomainname("(none)")  # the host's would be inherited

    def enter(self, fds: dict[str, int]) -> None:
        ns.unshare(ns.CLONE_NEWCGROUP)
        with contextlib.suppress(PermissionError):  # already a leader
            os.setsid()
        ns.sethostname(self.hostname)


class Namespaces(Layer):
    """Six namespaces of the cage's own, a session of its own, a host name of its own."""

    name = "namespaces"

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
        return [Control("namespaces", cls.name, "enforced", "mount, pid, ipc, uts, cgroup, net")]

    @classmethod
    def describe(cls, policy: EffectivePolicy) -> str:
        return "Sees only its own processes, mounts, host name, IPC objects, control groups and network interfaces."

    def prepare(self, spec: CageSpec, plan: Plan) -> None:
        plan.clone_flags |= ns.CLONE_NEWPID
        plan.add(NamespacesSection(spec.hostname))

    def confirm(self, process: Process) -> None:
        for kind, host in _of_this_process().items():
            if process.namespace(kind) == host:
                raise mismatch(self.name, f"{kind} namespace", "one of its own", "the host's")


@functools.cache
def _of_this_process() -> dict[str, str]:
    return {kind: os.readlink(f"/proc/self/ns/{kind}") for kind in ns.NAMESPACE_FILES if kind != "net"}
