"""What every layer is: one kernel mechanism, one kind of promise, the same seven verbs.

A layer object belongs to one cage. Its life, in order: ``enter_ahead`` (the process that is parked to become a cage;
before there is a plan, it applies what is the same for all of them), ``prepare`` (supervisor; makes what exists outside
the child and writes the child's part into the plan), ``enter`` (child, before exec; applies it to itself),
``confirm`` (supervisor; reads back from the kernel that it is in force), ``release`` (supervisor; undoes
``prepare``; idempotent, also when half-made). ``check`` and ``describe`` need no cage.

``enter_ahead`` and ``enter`` run in processes cloned from the launcher, so layer modules import only the standard
library and ``isolator.linux`` at the top; anything heavier is imported inside the verb that needs it.
"""

from __future__ import annotations

import functools
import os
from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Literal

if TYPE_CHECKING:
    from pathlib import Path

    from isolator.layers.plan import Plan
    from isolator.paths import Paths
    from isolator.policy.model import EffectivePolicy

State = Literal["enforced", "degraded", "unavailable"]


@dataclass(frozen=True)
class Control:
    """One line of the ledger: can this host keep this promise, and if not, why and what helps."""

    name: str
    layer: str
    state: State
    reason: str = ""
    remedy: str = ""
    mandatory: bool = True
    part: str = ""
    """Which of a layer's controls, when a host may lack one of them alone."""

    @property
    def key(self) -> str:
        """Its stable name: LAYER or LAYER.PART, as ``may_degrade`` of host.toml and ``plugin.started`` spell it."""
        return f"{self.layer}.{self.part}" if self.part else self.layer

    def to_json(self) -> dict[str, Any]:
        return {**self.__dict__, "key": self.key}


@dataclass(frozen=True)
class Bind:
    """Something of the host that the cage sees: ``fd`` is an O_PATH descriptor of it, owned by the cage."""

    target: str
    fd: int
    writable: bool = False
    executable: bool = True


@dataclass
class CageSpec:
    """Everything that is decided about one cage before it is built."""

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

    @property
    def leaf(self) -> str:
        """The name of this run's cgroup leaf and of everything else that is made for it."""
        return f"{self.name}.{self.run}"

    @property
    def cache(self) -> Path:
        return self.paths.cache


class Layer(ABC):
    """One mechanism; see the module's text for the verbs."""

    name: ClassVar[str]
    mandatory: ClassVar[bool] = True
    from_birth: ClassVar[bool] = False
    """The process is born under it: ``confirm`` need not wait until the child has entered its layers."""
    may_degrade: ClassVar[tuple[str, ...]] = ()
    """The keys of its controls without which ``host.toml`` may let plugins run; everything above the layer copes."""

    @classmethod
    @abstractmethod
    def check(cls) -> list[Control]:
        """Whether this mechanism is usable on this host."""

    @classmethod
    @abstractmethod
    def describe(cls, policy: EffectivePolicy) -> str:
        """The promise in one plain sentence."""

    @staticmethod  # noqa: B027  # on purpose: most layers begin with the plan
    def enter_ahead(order: dict[str, Any]) -> None:
        """Apply to the parked process what no plan changes, for the cage to inherit; ``order`` as for ``park``."""

    @abstractmethod
    def prepare(self, spec: CageSpec, plan: Plan) -> None:
        """Make what must exist outside the child, and write ``plan.sections[self.name]``."""

    @staticmethod
    @abstractmethod
    def enter(section: dict[str, Any], fds: dict[str, int]) -> None:
        """Apply the layer to the calling process; any OSError aborts the start."""

    @abstractmethod
    def confirm(self, process: Process) -> None:
        """Raise ConfinementError unless the kernel says that the layer is in force for ``process``."""

    def release(self) -> None:  # noqa: B027  # on purpose: most layers have nothing to undo
        """Undo ``prepare``. Most layers end with their process and have nothing to undo."""


def mismatch(layer: str, what: str, wanted: object, found: object) -> Exception:
    """The error for a read-back that differs."""
    from isolator.errors import ConfinementError

    return ConfinementError(f"layer {layer}", f"{what} is {found}, not {wanted}", "the cage was destroyed")


class Process:
    """What the kernel says of one process; each of its files is read once, when it is first asked for."""

    def __init__(self, pid: int) -> None:
        self.pid = pid

    @functools.cached_property
    def status(self) -> dict[str, str]:
        """/proc/PID/status."""
        lines = self.read("status").splitlines()
        return {key: value.strip() for key, _, value in (line.partition(":") for line in lines)}

    def read(self, name: str) -> str:
        """The text of /proc/PID/``name``."""
        with open(f"/proc/{self.pid}/{name}") as file:  # noqa: PTH123  # half the time of Path.read_text
            return file.read()

    def namespace(self, kind: str) -> str:
        """What /proc/PID/ns/``kind`` names."""
        return os.readlink(f"/proc/{self.pid}/ns/{kind}")
