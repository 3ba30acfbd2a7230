"""Resource limits of the process itself (setrlimit(2)): open files, core dumps, locked memory, queues."""

from __future__ import annotations

import resource
from typing import TYPE_CHECKING

from isolator.layers.base import CageSpec, Control, Kept, Layer, Process, mismatch
from isolator.layers.phrases import count
from isolator.layers.plan import ParkOrder, Plan, Section
from isolator.linux.coredump import FILTER, start_no_handler

if TYPE_CHECKING:
    from isolator.policy.model import EffectivePolicy

_FIXED = {
    "CORE": 1,
    "MEMLOCK": 64 * 1024,
    "MSGQUEUE": 0,
    "NICE": 0,
    "RTPRIO": 0,
    "SIGPENDING": 1024,
    "STACK": 8 * 1024 * 1024,
}
"""Limits that no policy changes.

No core dumps: they would carry secrets to the host's core handler. Under a limit of 0 the kernel writes no file, but
still starts the handler that a ``core_pattern`` with a pipe names, as root and outside every cap, as often as somebody
crashes on purpose; under a limit of 1 it does neither (fs/coredump.c). The seccomp layer keeps it from being lowered.
Where that does not help, no memory goes to the handler: a container that allows no more than 0, a ``core_pattern`` that
names a socket (from Linux 6.16). The launcher sees to it (``linux/coredump.py``): a cage has no /proc yet when its
limits are set.
"""

_FIXED_BY_NUMBER = {getattr(resource, f"RLIMIT_{name}"): wanted for name, wanted in _FIXED.items()}

_LABELS = {
    "Max core file size": "CORE",
    "Max locked memory": "MEMLOCK",
    "Max msgqueue size": "MSGQUEUE",
    "Max nice priority": "NICE",
    "Max realtime priority": "RTPRIO",
    "Max pending signals": "SIGPENDING",
    "Max stack size": "STACK",
    "Max open files": "NOFILE",
}
"""As /proc/PID/limits calls them."""


class RlimitsSection(Section, kind="rlimits"):
    """The one limit that a policy changes: how many files may be open at once."""

    nofile: int

    @staticmethod
    def enter_ahead(order: ParkOrder) -> None:
        start_no_handler()  # upwards, where sudo has left a limit of 0
        for number, wanted in _FIXED_BY_NUMBER.items():
            _lower(number, wanted)

    def enter(self, fds: dict[str, int]) -> None:
        _lower(resource.RLIMIT_NOFILE, self.nofile)


class Rlimits(Layer):
    """Hard limits that the process cannot raise again (it has no CAP_SYS_RESOURCE)."""

    name = "rlimits"

    @classmethod
    def check(cls) -> list[Control]:
        return [Control("open files, core dumps, locked memory", cls.name, "enforced", "setrlimit", mandatory=False)]

    @classmethod
    def describe(cls, policy: EffectivePolicy) -> str:
        return (
            f"May have {count(policy.resources.nofile, 'open file')} and 64K of locked memory; a crash writes no core"
            " file and gives none of its memory to the host's core handler."
        )

    def prepare(self, spec: CageSpec, plan: Plan) -> None:
        self.adopt(spec, Kept())
        plan.add(RlimitsSection(spec.policy.resources.nofile))

    def adopt(self, spec: CageSpec, kept: Kept) -> None:
        self._wanted = {**_FIXED, "NOFILE": spec.policy.resources.nofile}

    def confirm(self, process: Process) -> None:
        # Not prlimit(2): asking for another user's limits needs CAP_SYS_RESOURCE, which containers often lack.
        found = {}
        for line in process.read("limits").splitlines():
            name = _LABELS.get(line[:26].strip())
            if name is not None:
                found[name] = line[26:].split()[1]
        for name, wanted in self._wanted.items():
            hard = found.get(name, "missing")
            if not hard.isdigit() or int(hard) > wanted:
                raise mismatch(self.name, name, wanted, hard)
        dumped = process.read(FILTER).strip()
        if int(dumped, 16):
            raise mismatch(self.name, FILTER, 0, dumped)


def _lower(number: int, wanted: int) -> None:
    hard = resource.getrlimit(number)[1]
    value = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
    resource.setrlimit(number, (value, value))
