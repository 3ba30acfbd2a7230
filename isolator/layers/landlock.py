"""Landlock: a second wall behind the mount view, by the kernel's ABI; best effort, and recorded.

Everything in the cage may be read and executed; writing only where the view is writable. From ABI 6 signals and
abstract sockets do not leave the cage either (the pid and network namespaces are the first wall there).
"""

from __future__ import annotations

import contextlib
import os
from typing import TYPE_CHECKING, Any, NamedTuple

from isolator.layers.base import CageSpec, Control, Layer, Process
from isolator.linux import landlock

if TYPE_CHECKING:
    from isolator.layers.plan import Plan
    from isolator.policy.model import EffectivePolicy

_WRITABLE = ("/tmp", "/dev/shm")
_WRITABLE_LATER = ("/state", "/run/isolator/plugin")
"""What the plan mounts; each is a mount of its own, so that what is allowed on its mount point means nothing."""


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
    def enter_ahead(order: dict[str, Any]) -> None:
        global _ahead
        with contextlib.suppress(OSError):  # no Landlock: then the plan has no section for it
            version = landlock.abi()
            _ahead = _Ahead(_ruleset(version), os.stat("/"))

    @staticmethod
    def enter(section: dict[str, Any], fds: dict[str, int]) -> None:
        version = section["abi"]
        if _ahead is not None and os.path.samestat(_ahead.root, os.stat("/")):
            ruleset = _ahead.ruleset
        else:
            ruleset = _ruleset(version)
        for path in _WRITABLE_LATER:
            if os.path.isdir(path):  # the child avoids importing pathlib
                landlock.allow(ruleset, version, path, landlock.READ | landlock.WRITE)
        landlock.restrict_self(ruleset)

    def confirm(self, process: Process) -> None:
        """The kernel shows a process's Landlock domain nowhere; ``restrict_self`` succeeding is its word."""


class _Ahead(NamedTuple):
    ruleset: int
    root: os.stat_result
    """Of which the ruleset speaks: a policy that names more paths to read gives the cage another one."""


_ahead: _Ahead | None = None
"""Of the process that was parked, and of the cage that it becomes."""


def _ruleset(version: int) -> int:
    """A ruleset with what every cage may do."""
    ruleset = landlock.new_ruleset(version, scoped=landlock.SCOPE_ABSTRACT_UNIX_SOCKET | landlock.SCOPE_SIGNAL)
    landlock.allow(ruleset, version, "/", landlock.READ)
    for path in _WRITABLE:
        landlock.allow(ruleset, version, path, landlock.READ | landlock.WRITE)
    device = landlock.READ_FILE | landlock.WRITE_FILE | landlock.TRUNCATE | landlock.IOCTL_DEV
    for name in ("null", "zero", "full", "random", "urandom"):
        if os.path.exists(f"/dev/{name}"):
            landlock.allow(ruleset, version, f"/dev/{name}", device)
    return ruleset
