"""The effective policy of one plugin: request ∩ grant ∩ ceiling, frozen, canonical, hashed.

The layers enforce it and it crosses process borders; the meet that makes it is in ``effective.py``. Numbers and
yes-or-no keys are inherited from where they are declared (``keys.py``, with their units).
"""

import json
from typing import Any, Literal

from isolator.base.structs import field
from isolator.policy import keys
from isolator.policy.frozen import Frozen

VIRTUAL = "198.18.0.0/15"
"""Default of ``NetworkPolicy.virtual``: a range for benchmarks, of which no host is part."""


class EgressRule(Frozen):
    """One destination: a name, ``*.`` plus a name (whole labels), an address or a CIDR; and its TCP ports."""

    host: str
    ports: tuple[int, ...]


class AddressException(Frozen):
    """An exact CIDR and port that ``host.toml`` takes off the always-blocked list."""

    cidr: str
    port: int


class ListenRule(Frozen):
    """A host port that the broker forwards to a port on the cage's loopback."""

    address: str = "127.0.0.1"
    port: int
    cage_port: int


class NetworkPolicy(keys.ConnectionLimits, keys.NetworkSwitches):
    """``none``: no network; ``listed``: those rules only; ``public``: any public address, TCP 443 and 80."""

    mode: Literal["none", "listed", "public"] = "public"
    egress: tuple[EgressRule, ...] = ()
    exceptions: tuple[AddressException, ...] = ()
    listen: tuple[ListenRule, ...] = ()
    resolvers: tuple[str, ...] = ()
    """Upstream DNS as ``ADDRESS`` or ``ADDRESS:PORT``; empty means the host's /etc/resolv.conf."""
    virtual: str = VIRTUAL
    """The IPv4 network whose addresses stand for names inside a cage; none of it is ever dialled."""
    proxy: str = ""
    """``HOST:PORT`` of the proxy through which every connection leaves this host; empty: none."""
    proxy_resolves: bool = False
    """The proxy looks names up that are granted by name; their addresses are not checked here then."""


class ResourcePolicy(keys.ResourceLimits):
    """Caps kept by the cgroup and rlimits layers."""

    memory_high: int = 224 * keys.MIB
    swap: int = 0


class FilesystemPolicy(keys.FileLimits):
    """The parts of the host that the cage sees, and the sizes of its own file systems."""

    read: tuple[str, ...] = ()
    """Absolute host paths bound read-only at the same place."""


class CrashPolicy(Frozen):
    """Times between a crash and the next start, in seconds, and when to give up."""

    backoff_min: float = 0.5
    backoff_max: float = 60.0
    crashes: int = 5
    window: float = 600.0


# ``stop_grace`` comes last, as in ``HostConfig.digest``.
class RestartPolicy(keys.RunLimits, CrashPolicy):
    """Back-off between crashes, when to give up, and the time to stop in."""


_CALLED = ("tools", "callers")


class EffectivePolicy(keys.DeliveryLimits):
    """Everything a plugin may do. Two equal policies have equal digests."""

    __slots__ = ("_digest",)  # no field: neither compared nor shown

    plugin: str
    hooks: tuple[str, ...] = ()
    permissions: tuple[str, ...] = ()
    network: NetworkPolicy = NetworkPolicy()
    resources: ResourcePolicy = ResourcePolicy()
    filesystem: FilesystemPolicy = FilesystemPolicy()
    syscalls: Literal["default", "strict"] = "default"
    restart: RestartPolicy = RestartPolicy()
    env: dict[str, str] = field(default_factory=dict)
    """Variables of its environment that the operator sets; no secrets, they are shown."""
    filters: tuple[str, ...] = ()
    """Of its events it receives those that pass all of these (``filters.py``)."""
    tools: tuple[str, ...] = ()
    """MCP tools that callers may use, as patterns."""
    callers: tuple[int, ...] = ()
    """Uids of the users who may use them, if they have the role."""

    def value(self, key: keys.Key) -> Any:
        """The value of a declared key, in whichever section it stands."""
        sections = (self.network, self.resources, self.filesystem, self.restart, self)
        return next(getattr(section, key.name) for section in sections if key.name in type(section).model_fields)

    def canonical(self) -> str:
        """Canonical JSON: sorted keys, no spaces, ASCII; without callers and tools as before there were any."""
        return canonical_json(self.model_dump(mode="json", exclude=[key for key in _CALLED if not getattr(self, key)]))

    def digest(self) -> str:
        """SHA-256 of the canonical JSON, hex; in every ``plugin.started`` record."""
        digest: str = getattr(self, "_digest", "")
        if not digest:
            import hashlib

            digest = hashlib.sha256(self.canonical().encode()).hexdigest()
            object.__setattr__(self, "_digest", digest)  # asked for four times in a start
        return digest


def canonical_json(value: Any) -> str:
    """JSON with sorted keys, no spaces and only ASCII: one spelling for one value."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False)
