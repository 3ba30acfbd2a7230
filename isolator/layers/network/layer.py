"""The network layer of one cage: a namespace prepared ahead, with only ``lo``, its rules and the broker's listeners.

The content of the namespace is the business of ``isolator.layers.network.namespace``, which needs libnftables; this
module holds the child's part (entering it), and the verbs around both.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from isolator.layers.base import CageSpec, Control, Layer, Process, mismatch
from isolator.linux.namespaces import CLONE_NEWNET, setns

if TYPE_CHECKING:
    from isolator.layers.network.namespace import CageNetwork
    from isolator.layers.plan import Plan
    from isolator.policy.model import EffectivePolicy


class Network(Layer):
    """Nothing but loopback; every connection goes to the broker or is refused."""

    name = "network"

    def __init__(self) -> None:
        self.network: CageNetwork | None = None
        """The namespace, once the cage has one."""

    @classmethod
    def check(cls) -> list[Control]:
        from isolator.layers.network import namespace as network

        return [
            Control(name, cls.name, state, reason, remedy)  # type: ignore[arg-type]  # the states are the ledger's
            for name, state, reason, remedy in network.check()
        ]

    @classmethod
    def describe(cls, policy: EffectivePolicy) -> str:
        from isolator.layers.network import namespace as network

        return network.describe(policy.network)

    def load(self, spec: CageSpec) -> None:
        """Put the policy's rules in force; blocks, safe in any thread. Before the process may run, not before it is."""
        from isolator.layers.network import namespace as network

        assert self.network is not None
        network.load(self.network, spec.policy.network, prefix=spec.name)

    def prepare(self, spec: CageSpec, plan: Plan) -> None:
        assert self.network is not None
        self._policy = spec.policy.network
        plan.fds["netns"] = self.network.netns_fd
        plan.sections[self.name] = {}

    @staticmethod
    def enter(section: dict[str, Any], fds: dict[str, int]) -> None:
        setns(fds["netns"], CLONE_NEWNET)

    def confirm(self, process: Process) -> None:
        from isolator.layers.network import namespace as network

        assert self.network is not None
        wanted, found = f"net:[{self.network.inode}]", process.namespace("net")
        if found != wanted:
            raise mismatch(self.name, "network namespace", wanted, found)
        network.confirm(self.network, self._policy)

    def release(self) -> None:
        from isolator.layers.network import namespace as network

        if self.network is not None:
            network.release(self.network)
