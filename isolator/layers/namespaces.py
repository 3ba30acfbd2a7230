"""Namespaces: mount, pid, ipc, uts and cgroup are new with the clone; the network one is made ahead (layer network).

The cgroup namespace is unshared by the child itself after it has been put into its groups: made with the
clone it would be rooted at the launcher's v1 groups, and the leaf's name would be visible.
"""

from __future__ import annotations

import contextlib
import os
from typing import TYPE_CHECKING, Any

from isolator.layers.base import CageSpec, Control, Layer, mismatch
from isolator.linux import namespaces as ns

if TYPE_CHECKING:
    from isolator.launch.plan import Plan
    from isolator.policy.model import EffectivePolicy

WITH_CLONE = ("mnt", "pid", "ipc", "uts")


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
        return "It sees only its own processes, mounts, host name, IPC objects, control groups and network."

    def prepare(self, spec: CageSpec, plan: Plan) -> None:
        self._host = {kind: os.readlink(f"/proc/self/ns/{kind}") for kind in (*WITH_CLONE, "cgroup")}
        for kind in WITH_CLONE:
            plan.clone_flags |= ns.NAMESPACE_FILES[kind]
        plan.sections[self.name] = {"hostname": spec.hostname}

    @staticmethod
    def enter(section: dict[str, Any], fds: dict[str, int]) -> None:
        ns.unshare(ns.CLONE_NEWCGROUP)
        with contextlib.suppress(PermissionError):  # already a leader
            os.setsid()
        ns.sethostname(section["hostname"])
        ns.setdomainname("(none)")

    def confirm(self, pid: int) -> None:
        for kind, host in self._host.items():
            found = os.readlink(f"/proc/{pid}/ns/{kind}")
            if found == host:
                raise mismatch(self.name, f"{kind} namespace", "one of its own", "the host's")
