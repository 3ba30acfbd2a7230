"""Capabilities: none, in any of the five sets, for every number up to the kernel's last one.

Three steps, the first two while there still is CAP_SETPCAP: the bounding set, which counts at an exec alone, is emptied
in the launcher, which makes none; the securebits are locked in the process that is parked to become a cage; the other
sets are emptied in the child after the uid has changed. The locked bits
(NOROOT, NO_SETUID_FIXUP, KEEP_CAPS off, NO_CAP_AMBIENT_RAISE) mean that even uid 0 inside would gain nothing.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from isolator.layers.base import CageSpec, Control, Kept, Layer, Process, mismatch
from isolator.layers.plan import ParkOrder, Plan, Section
from isolator.linux import capability

if TYPE_CHECKING:
    from isolator.policy.model import EffectivePolicy

SETS = ("CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb")

# NOROOT, NO_SETUID_FIXUP, KEEP_CAPS and NO_CAP_AMBIENT_RAISE each have a value bit and a lock bit (capabilities(7)).
_NOROOT, _NO_SETUID_FIXUP, _NO_CAP_AMBIENT_RAISE = 1 << 0, 1 << 2, 1 << 6
_LOCKS = (1 << 1) | (1 << 3) | (1 << 5) | (1 << 7)
_SECUREBITS = _NOROOT | _NO_CAP_AMBIENT_RAISE | _LOCKS | _NO_SETUID_FIXUP


class CapabilitiesSection(Section, kind="capabilities"):
    """No values: every cage has no capability."""

    @staticmethod
    def enter_launcher(order: ParkOrder) -> None:
        capability.drop_bounding_set(order.last_capability)

    @staticmethod
    def enter_ahead(order: ParkOrder) -> None:
        capability.set_securebits(_SECUREBITS)

    def enter(self, fds: dict[str, int]) -> None:
        capability.clear_sets()


class Capabilities(Layer):
    """No capability, and no way to gain one."""

    name = "capabilities"

    @classmethod
    def check(cls) -> list[Control]:
        return [Control("no capabilities", cls.name, "enforced", f"0 to {capability.last_capability()}")]

    @classmethod
    def describe(cls, policy: EffectivePolicy) -> str:
        return "Holds no capability and can never gain one, by no file and no program it runs."

    def prepare(self, spec: CageSpec, plan: Plan) -> None:
        plan.add(CapabilitiesSection())

    def adopt(self, spec: CageSpec, kept: Kept) -> None:
        """Take over nothing: ``confirm`` compares with no value of its own."""

    def confirm(self, process: Process) -> None:
        status = process.status
        for name in SETS:
            if int(status[name], 16):
                raise mismatch(self.name, name, 0, status[name])
