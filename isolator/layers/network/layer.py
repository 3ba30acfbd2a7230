"""The network layer of one cage: a namespace prepared ahead, with only ``lo``, its rules and the broker's listeners.

``isolator.layers.network.namespace``, which needs libnftables, makes and fills the namespace; this module holds the
child's half (entering it), and the verbs around both.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from isolator.layers.base import CageSpec, Control, Kept, Layer, Process, mismatch
from isolator.layers.phrases import listing
from isolator.layers.plan import Plan, Section
from isolator.linux.namespaces import CLONE_NEWNET, setns

if TYPE_CHECKING:
    from isolator.layers.network.namespace import CageNetwork
    from isolator.policy.model import EffectivePolicy


class NetworkSection(Section, kind="network"):
    """No values: the namespace is the plan's descriptor ``netns``."""

    def enter(self, fds: dict[str, int]) -> None:
        setns(fds["netns"], CLONE_NEWNET)


class Network(Layer):
    """Nothing but loopback; every connection goes to the broker or is refused."""

    name = "network"

    def __init__(self) -> None:
        self.network: CageNetwork | None = None
        """The namespace, once the cage has one."""

    @classmethod
    def check(cls) -> list[Control]:
        from isolator.layers.network import namespace

        return namespace.check()

    @classmethod
    def describe(cls, policy: EffectivePolicy) -> str:
        from isolator.policy.destinations import PUBLIC, parse_host
        from isolator.policy.destinations import Network as Net
        from isolator.policy.names import format_listen

        network = policy.network
        inbound = ""
        if network.listen:
            ports = listing(f"{format_listen(r).rpartition(':')[0]} to its port {r.cage_port}" for r in network.listen)
            inbound = f" This host forwards {ports}."
        listed = [f"{rule.host} (TCP {listing(map(str, rule.ports))})" for rule in network.egress]
        if network.mode == "none" or (network.mode == "listed" and not listed):
            return "Has no network but a loopback of its own." + inbound
        never = "never private, local or metadata addresses"
        way = ""
        if network.proxy:
            way = f" All of it goes through the proxy {network.proxy} of this host."
        if network.proxy_resolves and any(not isinstance(parse_host(rule.host), Net) for rule in network.egress):
            way = f"{way[:-1]}, which looks granted names up itself: whether they lead inside is the proxy's to check."
            never = "addresses that it writes itself are never private, local or metadata ones"
        if network.exceptions:
            never += ", but for the exceptions of host.toml"
        sni = " TLS without a server name is let through." if network.allow_no_sni else ""
        if network.allow_ech:
            sni += (
                " TLS may hide a second server name (ECH): behind a server that serves many names, one that is not "
                "granted can be reached."
            )
        if network.mode == "public":
            besides = f", besides {listing(listed)}" if listed else ""
            return f"May connect to {PUBLIC}{besides}; {never}; names it asks for leave this host.{way}{sni}{inbound}"
        return f"May connect to {listing(listed)} and to nothing else; {never}.{way}{sni}{inbound}"

    def is_loaded(self, spec: CageSpec) -> bool:
        """Whether the policy's rules are in force already."""
        from isolator.layers.network import namespace

        assert self.network is not None
        return namespace.is_loaded(self.network, spec.policy.network)

    def load(self, spec: CageSpec) -> None:
        """Put the policy's rules in force: after ``prepare``, before the exec. Blocks; safe in any thread."""
        from isolator.layers.network import namespace

        assert self.network is not None
        namespace.load(self.network, spec.policy.network)

    def prepare(self, spec: CageSpec, plan: Plan) -> None:
        assert self.network is not None
        self._policy = spec.policy.network
        plan.fds["netns"] = self.network.netns_fd
        plan.add(NetworkSection())

    def hand_over(self) -> Kept:
        from isolator.layers.network import namespace

        assert self.network is not None
        return namespace.hand_over(self.network)

    def adopt(self, spec: CageSpec, kept: Kept) -> None:
        from isolator.layers.network import namespace

        self.network, self._policy = namespace.adopt(kept), spec.policy.network

    def confirm(self, process: Process) -> None:
        from isolator.layers.network import namespace

        assert self.network is not None
        wanted, found = f"net:[{self.network.inode}]", process.namespace("net")
        if found != wanted:
            raise mismatch(self.name, "network namespace", wanted, found)
        namespace.confirm(self.network, self._policy)

    def release(self) -> None:
        from isolator.layers.network import namespace

        if self.network is not None:
            namespace.release(self.network)
