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
    from isolator.policy.model import EffectivePolicy


class Network(Layer):
    """Nothing but loopback; every connection goes to the broker or is refused."""

    name = "network"

    def __init__(self, network: CageNetwork) -> None:
        self.network = network

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
        plan.fds["netns"] = self.network.netns_fd
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

        network.release(self.network)
