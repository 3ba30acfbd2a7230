"""The network layer of one cage: a namespace prepared ahead, with only ``lo``, its rules and the broker's listeners.

What is in the namespace is the business of ``isolator.layers.network``, which needs libnftables; this module is
what the child needs (entering it), and the six verbs around both.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from isolator.layers.base import CageSpec, Control, Layer
from isolator.linux.namespaces import CLONE_NEWNET, setns

if TYPE_CHECKING:
    from isolator.launch.plan import Plan
    from isolator.layers.network import CageNetwork
    from isolator.policy.model import EffectivePolicy, NetworkPolicy


class Network(Layer):
    """Nothing but loopback; every connection goes to the broker or is refused.

    The namespace is made while the child is cloned, so its descriptor travels with the word to go on, not in the plan.
    """

    name = "network"

    def __init__(self, network: CageNetwork | None = None) -> None:
        self._network = network

    @property
    def unmade(self) -> bool:
        """Whether ``make`` is still to be called."""
        return self._network is None

    @property
    def network(self) -> CageNetwork:
        """What was made."""
        assert self._network is not None
        return self._network

    def make(self, policy: NetworkPolicy, prefix: str) -> None:
        """Make the namespace and all that is in it; ``prefix`` names the cage in what its rules log. Blocks."""
        from isolator.layers import network

        self._network = network.prepare(policy, prefix=prefix)

    @classmethod
    def check(cls) -> list[Control]:
        from isolator.layers import network

        return [
            Control(name, cls.name, state, reason, remedy)  # type: ignore[arg-type]  # the states are the ledger's
            for name, state, reason, remedy in network.check()
        ]

    @classmethod
    def describe(cls, policy: EffectivePolicy) -> str:
        from isolator.layers import network

        return network.describe(policy.network)

    def prepare(self, spec: CageSpec, plan: Plan) -> None:
        self._policy = spec.policy.network
        plan.sections[self.name] = {}

    @staticmethod
    def enter(section: dict[str, Any], fds: dict[str, int]) -> None:
        setns(fds["netns"], CLONE_NEWNET)

    def confirm(self, pid: int) -> None:
        import os

        from isolator.layers import network
        from isolator.layers.base import mismatch

        inode = os.fstat(self.network.netns_fd).st_ino
        found = os.stat(f"/proc/{pid}/ns/net").st_ino  # beside fstat
        if found != inode:
            raise mismatch(self.name, "network namespace", inode, found)
        network.confirm(self.network, self._policy)

    def release(self) -> None:
        from isolator.layers import network

        if self._network is not None:
            network.release(self._network)
