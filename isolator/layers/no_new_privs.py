"""no_new_privs: no exec gains privileges, whatever the set-id bits or file capabilities of the program say."""

from __future__ import annotations

from typing import TYPE_CHECKING

from isolator.layers.base import CageSpec, Control, Kept, Layer, Process, mismatch
from isolator.layers.plan import Plan, Section
from isolator.linux.capability import gain_no_privileges

if TYPE_CHECKING:
    from isolator.policy.model import EffectivePolicy


class NoNewPrivsSection(Section, kind="no_new_privs"):
    """No values: the bit is set in every cage."""

    def enter(self, fds: dict[str, int]) -> None:
        gain_no_privileges()


class NoNewPrivs(Layer):
    """PR_SET_NO_NEW_PRIVS, which no process can take back (prctl(2))."""

    name = "no_new_privs"

    @classmethod
    def check(cls) -> list[Control]:
        return [Control("no_new_privs", cls.name, "enforced", "prctl")]

    @classmethod
    def describe(cls, policy: EffectivePolicy) -> str:
        return "Set-user-ID programs and file capabilities give it nothing."

    def prepare(self, spec: CageSpec, plan: Plan) -> None:
        plan.add(NoNewPrivsSection())

    def adopt(self, spec: CageSpec, kept: Kept) -> None:
        """Take over nothing: ``confirm`` compares with no value of its own."""

    def confirm(self, process: Process) -> None:
        found = process.status.get("NoNewPrivs")
        if found != "1":
            raise mismatch(self.name, "NoNewPrivs", 1, found)
