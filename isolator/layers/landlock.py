"""Landlock: a second wall behind the mount view, by the kernel's ABI; best effort, and recorded.

Everything in the cage may be read and executed; writing only where the view is writable. From ABI 6 signals and
abstract sockets do not leave the cage either (the pid and network namespaces are the first wall there).
"""

from __future__ import annotations

import contextlib
import os
from typing import TYPE_CHECKING, Any

from isolator.layers.base import CageSpec, Control, Layer, Process
from isolator.linux import landlock

if TYPE_CHECKING:
    from isolator.launch.plan import Plan
    from isolator.policy.model import EffectivePolicy

WRITABLE = ("/state", "/tmp", "/dev/shm", "/run/isolator/plugin")


class Landlock(Layer):
    """Read and execute below ``/``; write only below the writable folders and the standard devices."""

    name = "landlock"
    mandatory = False
    may_degrade = ("landlock",)

    @classmethod
    def check(cls) -> list[Control]:
        try:
            version = landlock.abi()
        except OSError as error:
            reason = f"the kernel says {error.strerror}"
            remedy = "boot with 'lsm=landlock,...' on a kernel with CONFIG_SECURITY_LANDLOCK"
            return [Control("second wall for files", cls.name, "unavailable", reason, remedy, mandatory=False)]
        if version < 6:
            reason = f"ABI {version}: no scopes for signals and abstract sockets (namespaces still stop them)"
            remedy = "kernel 6.12 or newer has ABI 6"
            return [Control("second wall for files", cls.name, "degraded", reason, remedy, mandatory=False)]
        return [Control("second wall for files", cls.name, "enforced", f"ABI {version}", mandatory=False)]

    @classmethod
    def describe(cls, policy: EffectivePolicy) -> str:
        return "A second wall behind the mount view lets it write only to its state, its temporary folders and /dev."

    def prepare(self, spec: CageSpec, plan: Plan) -> None:
        with contextlib.suppress(OSError):
            plan.sections[self.name] = {"abi": landlock.abi()}

    @staticmethod
    def enter(section: dict[str, Any], fds: dict[str, int]) -> None:
        rules = [("/", landlock.READ)]
        for path in WRITABLE:
            if os.path.isdir(path):  # the child avoids importing pathlib
                rules.append((path, landlock.READ | landlock.WRITE))
        device = landlock.READ_FILE | landlock.WRITE_FILE | landlock.TRUNCATE | landlock.IOCTL_DEV
        for name in ("null", "zero", "full", "random", "urandom"):
            if os.path.exists(f"/dev/{name}"):
                rules.append((f"/dev/{name}", device))
        scoped = landlock.SCOPE_ABSTRACT_UNIX_SOCKET | landlock.SCOPE_SIGNAL
        landlock.restrict(section["abi"], rules, scoped=scoped)

    def confirm(self, process: Process) -> None:
        """The kernel shows a process's Landlock domain nowhere; ``restrict_self`` succeeding is its word."""
