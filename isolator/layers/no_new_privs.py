"""no_new_privs: nothing that is exec'd gains privileges, whatever its set-id bits or file capabilities say."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from isolator.layers.base import CageSpec, Control, Layer, Process, mismatch

if TYPE_CHECKING:
    from isolator.layers.plan import Plan
    from isolator.policy.model import EffectivePolicy


class NoNewPrivs(Layer):
    """PR_SET_NO_NEW_PRIVS, which no process can take back (prctl(2))."""

    name = "no_new_privs"

    @classmethod
    def check(cls) -> list[Control]:
        return [Control("no_new_privs", cls.name, "enforced", "prctl")]

    @classmethod
    def describe(cls, policy: EffectivePolicy) -> str:
        return "Set-user-ID programs give it nothing."

    def prepare(self, spec: CageSpec, plan: Plan) -> None:
        plan.sections[self.name] = {}

    @staticmethod
    def enter(section: dict[str, Any], fds: dict[str, int]) -> None:
        import prctl

        prctl.set_no_new_privs(1)

    def confirm(self, process: Process) -> None:
        found = process.status.get("NoNewPrivs")
        if found != "1":
            raise mismatch(self.name, "NoNewPrivs", 1, found)
