"""Layers: one kernel mechanism each, one kind of promise, the same verbs.

A layer has two halves. The *layer object* belongs to one cage and to the supervisor; its *section* travels in the plan
and is applied by the child. In the order of a cage's life:

    enter_launcher section  in the launcher, at the first order for a cage with the layer: apply the part that is the
                            same for every cage, and changes nothing for the launcher
    enter_ahead   section   in a process that is parked to become a cage, before there is a plan: apply the part that is
                            the same for every cage
    prepare_birth layer     make what must be there before the child is cloned
    enter_born    section   in the child, while the plan is made: apply the part that is the same for every cage, but
                            needs its pid namespace
    prepare       layer     make the parts outside the child, and add the section to the plan
    enter         section   in the child, before exec: apply the layer to the calling process
    adopt         layer     in place of ``prepare``, for a cage that runs and was prepared before this process's exec;
                            ``hand_over`` has returned what that takes
    confirm       layer     read back from the kernel that the layer is in force
    release       layer     undo ``prepare``; idempotent, also when it is half-made

``check`` (can this host do it) and ``describe`` (the promise, in words) need no cage.

Sections run in processes cloned from the launcher, so layer modules import only the standard library and
``isolator.linux`` at the top; anything heavier is imported inside the verb that needs it.
"""

from __future__ import annotations

import functools
import os
from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from isolator.base.structs import field, struct_class

if TYPE_CHECKING:
    from pathlib import Path

    from isolator.errors import ConfinementError
    from isolator.layers.plan import Birth, Plan
    from isolator.paths import Paths
    from isolator.policy.model import EffectivePolicy

ControlState = Literal["enforced", "degraded", "unavailable"]
_EXITING = 4
"""``PF_EXITING`` of linux/sched.h, in the flags of proc_pid_stat(5)."""


@struct_class(frozen=True)
class Control:
    """One line of the ledger: whether this host can keep a promise, the kernel's reason, and the remedy."""

    name: str
    layer: str
    state: ControlState
    reason: str = ""
    remedy: str = ""
    mandatory: bool = True
    part: str = ""
    """One of several controls of a layer, where a host may lack it alone."""

    @property
    def key(self) -> str:
        """The stable name: LAYER or LAYER.PART, as ``may_degrade`` of host.toml and ``plugin.started`` spell it."""
        return f"{self.layer}.{self.part}" if self.part else self.layer

    def to_json(self) -> dict[str, Any]:
        return {**self.__dict__, "key": self.key}


@struct_class(frozen=True)
class Tree:
    """Facts of a detached mount, which who made it has looked up: the file system behind it may hang."""

    is_folder: bool
    device: int
    """Number of the file system's device."""


@struct_class(frozen=True)
class Bind:
    """A file or folder of the host that the cage sees at ``target``; ``fd``: its O_PATH descriptor, the caller's.

    Under the profile ``strict`` nothing below a writable one can be executed.
    """

    target: str
    fd: int
    writable: bool = False
    ids: int = -1
    """The user namespace whose maps its owners are shown with (``mount.map_ids``), the caller's; -1: as they are."""
    tree: Tree | None = None
    """``fd`` is a detached mount, attached as it is; otherwise a descriptor to be cloned."""


@struct_class()
class CageSpec:
    """The decisions about one cage, made before it is built."""

    name: str
    run: str
    uid: int
    gid: int
    user: str
    policy: EffectivePolicy
    paths: Paths
    argv: list[str]
    env: dict[str, str]
    cwd: str = "/"
    hostname: str = "cage"
    binds: list[Bind] = field(default_factory=list)
    mounts: dict[str, int] = field(default_factory=dict)
    """Detached mounts by the place where they go (the socket directory, the state)."""
    files: dict[str, str] = field(default_factory=dict)
    """Secret files by name: 0400, in memory, in /run/isolator/config."""
    terminal: bool = False
    """The sidecar is on a terminal of its own (``Plan.terminal``): ``mounts`` has its /dev/pts."""
    to_group: bool = False
    """Signals go to the sidecar's whole process group (``Plan.to_group``)."""

    @property
    def leaf(self) -> str:
        """The name of this run's cgroup leaf and of everything else that is made for it."""
        return f"{self.name}.{self.run}"

    @property
    def cache(self) -> Path:
        return self.paths.cache


@struct_class()
class Kept:
    """The part of a layer's making that an exec of this process would lose: JSON values, and descriptors by name."""

    values: dict[str, Any] = field(default_factory=dict)
    fds: dict[str, int] = field(default_factory=dict)


class Layer(ABC):
    """The supervisor's half of one layer; see the module's text for the verbs."""

    name: ClassVar[str]
    mandatory: ClassVar[bool] = True
    in_force_from: ClassVar[Literal["birth", "view", "end"]] = "end"
    """The moment from which ``confirm`` holds: the process is born under it, has its view of files, or has entered
    every layer. What is in force early is read back while the child goes on."""
    may_degrade: ClassVar[tuple[str, ...]] = ()
    """The keys of its controls without which ``host.toml`` may let plugins run; everything above the layer copes."""

    @classmethod
    @abstractmethod
    def check(cls) -> list[Control]:
        """The layer's controls on this host: enforced, degraded or unavailable, with the kernel's reason."""

    @classmethod
    @abstractmethod
    def describe(cls, policy: EffectivePolicy) -> str:
        """The promise in one plain sentence, as ``explain`` shows it. tests/escape/test_sentences.py tests it."""

    def prepare_birth(self, spec: CageSpec, birth: Birth) -> None:  # noqa: B027  # on purpose: most begin with prepare
        """Make what must be there before the child is cloned, which is done while ``prepare`` makes the rest."""

    @abstractmethod
    def prepare(self, spec: CageSpec, plan: Plan) -> None:
        """Make the parts outside the child, and add the layer's section to the plan; raises ConfinementError."""

    def hand_over(self) -> Kept:
        """The values and descriptors that ``adopt`` needs besides the specification; most layers need none."""
        return Kept()

    @abstractmethod
    def adopt(self, spec: CageSpec, kept: Kept) -> None:
        """Take over what was prepared before this process's exec, so that ``confirm`` and ``release`` go on from there.

        Nothing outside this process changes.
        """

    @abstractmethod
    def confirm(self, process: Process) -> None:
        """Raise ConfinementError unless the kernel says that the layer is in force for ``process``."""

    def release(self) -> None:  # noqa: B027  # on purpose: most layers have nothing to undo
        """Undo ``prepare``. Most layers end with their process and have nothing to undo."""


def mismatch(layer: str, what: str, wanted: object, found: object) -> ConfinementError:
    """The error of a read-back that differs."""
    from isolator.errors import ConfinementError

    return ConfinementError(f"layer {layer}", f"{what} is {found}, not {wanted}", "the cage was destroyed")


class Process:
    """The kernel's view of one process: /proc/PID. ``status`` and ``mounts`` are read once."""

    def __init__(self, pid: int) -> None:
        self.pid = pid

    @functools.cached_property
    def status(self) -> dict[str, str]:
        """/proc/PID/status."""
        lines = self.read("status").splitlines()
        return {key: value.strip() for key, _, value in (line.partition(":") for line in lines)}

    @functools.cached_property
    def mounts(self) -> dict[str, str]:
        """The lines of /proc/PID/mountinfo by their mount points; of several on one, the topmost."""
        return {line.split(" ", 5)[4]: line for line in self.read("mountinfo").splitlines()}

    @property
    def ending(self) -> bool:
        """Tell whether it ends, or has: the kernel takes its groups and namespaces before it tells (do_exit).

        Raises OSError when that cannot be read.
        """
        try:
            return bool(int(self.read("stat").rpartition(")")[2].split()[6]) & _EXITING)
        except (FileNotFoundError, ProcessLookupError):
            return True

    def read(self, name: str) -> str:
        """The text of /proc/PID/``name``."""
        fd = os.open(
            f"/proc/{self.pid}/{name}", os.O_RDONLY | os.O_CLOEXEC
        )  # each start reads seven: a third of open()
        try:
            found = b""
            while data := os.read(fd, 1 << 16):
                found += data
        finally:
            os.close(fd)
        return found.decode("utf-8", "surrogateescape")

    def namespace(self, kind: str) -> str:
        """The namespace that /proc/PID/ns/``kind`` names, as ``KIND:[INODE]``."""
        return os.readlink(f"/proc/{self.pid}/ns/{kind}")
