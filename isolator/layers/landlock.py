"""Landlock: a second wall behind the mount view, by the kernel's ABI; best effort, and recorded.

Reading and executing are not restricted: the ruleset allows both from ``/`` on, and the view alone decides what is
there. Changes (writing, making, renaming, removing) are refused outside of the folders that the view has writable, and
so are ioctls on devices other than the five standard ones and the cage's own terminals (ABI 5). From ABI 6 signals and
abstract sockets do not leave the cage either (the pid and network namespaces are the first wall there).
"""

from __future__ import annotations

import contextlib
import os
from typing import TYPE_CHECKING

from isolator.layers.base import CageSpec, Control, Kept, Layer, Process
from isolator.layers.phrases import listing
from isolator.layers.plan import ParkOrder, Part, Plan, Section
from isolator.linux import landlock

if TYPE_CHECKING:
    from isolator.policy.model import EffectivePolicy

_WRITABLE = ("/tmp", "/dev/shm")
_DEVICE = landlock.READ_FILE | landlock.WRITE_FILE | landlock.TRUNCATE | landlock.IOCTL_DEV


class WritableFolder(Part, kind="writable_folder"):
    """A folder of the host that the cage may change, as the cage sees it."""

    path: str


_WRITABLE_LATER = (WritableFolder("/state"), WritableFolder("/run/isolator/plugin"))
"""Mounted by the plan: each is a mount of its own, so that a right on its mount point would mean nothing."""


class LandlockSection(Section, kind="landlock"):
    """The kernel's Landlock ABI, and the folders to write in besides those of every cage."""

    abi: int
    folders: tuple[WritableFolder, ...] = ()

    @staticmethod
    def enter_ahead(order: ParkOrder) -> None:
        global _ahead
        with contextlib.suppress(OSError):  # no Landlock: then the plan has no section for it
            version = landlock.abi()
            _ahead = _ruleset(version), _root()

    def enter(self, fds: dict[str, int]) -> None:
        ruleset = _ahead[0] if _ahead and _ahead[1] == _root() else _ruleset(self.abi)
        for folder in (*_WRITABLE_LATER, *self.folders):
            if os.path.isdir(folder.path):  # the child avoids importing pathlib
                landlock.allow(ruleset, self.abi, folder.path, landlock.READ | landlock.WRITE)
        if os.path.isdir("/dev/pts"):
            landlock.allow(ruleset, self.abi, "/dev/pts", _DEVICE | landlock.READ_DIR)
        landlock.restrict_self(ruleset)


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
        places = ["/tmp", "/dev/shm", *(["/state"] if policy.filesystem.state else []), "its socket's folder"]
        return (
            f"A second wall behind the file view: only files in {listing(places)} can be changed, even if others were "
            "writable; reading and executing it does not restrict."
        )

    def prepare(self, spec: CageSpec, plan: Plan) -> None:
        with contextlib.suppress(OSError):
            folders = tuple(WritableFolder(bind.target) for bind in spec.binds if bind.writable)
            plan.add(LandlockSection(landlock.abi(), folders))

    def adopt(self, spec: CageSpec, kept: Kept) -> None:
        """Take over nothing: ``confirm`` compares with no value of its own."""

    def confirm(self, process: Process) -> None:
        """Confirm nothing: the kernel shows a process's Landlock domain nowhere. ``restrict_self`` has succeeded."""


_ahead: tuple[int, tuple[int, int]] | None = None
"""The ruleset of the parked process and of the cage that it becomes, and the root that it is about: a policy that names
more paths to read gives the cage another one."""


def _root() -> tuple[int, int]:
    root = os.stat("/")
    return root.st_dev, root.st_ino


def _ruleset(version: int) -> int:
    """A ruleset with the rights of every cage."""
    ruleset = landlock.new_ruleset(version, scoped=landlock.SCOPE_ABSTRACT_UNIX_SOCKET | landlock.SCOPE_SIGNAL)
    landlock.allow(ruleset, version, "/", landlock.READ)
    for path in _WRITABLE:
        landlock.allow(ruleset, version, path, landlock.READ | landlock.WRITE)
    for name in ("null", "zero", "full", "random", "urandom"):
        try:  # noqa: SIM105  # a start that counts does without contextlib
            landlock.allow(ruleset, version, f"/dev/{name}", _DEVICE)
        except FileNotFoundError:  # a cage without a view of its own, on a host that lacks it
            pass
    return ruleset
