"""The effective policy of one plugin: request ∩ grant ∩ ceiling, frozen, canonical, hashed.

Sizes are bytes, cpu is thousandths of one core (``25%`` = 250), durations are seconds. This is what
the layers enforce and what crosses process borders; the meet that makes it is in ``effective.py``.
"""

from __future__ import annotations

import hashlib
import json
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict

from isolator.policy.units import NO_CAP

KIB, MIB, GIB = 1 << 10, 1 << 20, 1 << 30


class Frozen(BaseModel):
    """Base of every policy model: strict about unknown keys, immutable."""

    model_config = ConfigDict(frozen=True, extra="forbid")


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


class NetworkPolicy(Frozen):
    """``none``: no network; ``listed``: those rules only; ``public``: any public address, TCP 443 and 80."""

    mode: Literal["none", "listed", "public"] = "public"
    egress: tuple[EgressRule, ...] = ()
    exceptions: tuple[AddressException, ...] = ()
    listen: tuple[ListenRule, ...] = ()
    resolvers: tuple[str, ...] = ()
    """Upstream DNS as ``ADDRESS`` or ``ADDRESS:PORT``; empty means the host's /etc/resolv.conf."""
    allow_no_sni: bool = False
    """Let TLS without a readable server name (or with an encrypted ClientHello) through to a name grant."""
    connects_per_second: int = 20
    connect_burst: int = 40
    connects_open: int = 64


class ResourcePolicy(Frozen):
    """Caps kept by the cgroup and rlimits layers."""

    memory: int = 256 * MIB
    memory_high: int = 224 * MIB
    swap: int = 0
    cpu: int = 250
    tasks: int = 64
    nofile: int = 1024
    io_read: int = NO_CAP
    """Bytes per second that it may read of each block device."""
    io_write: int = NO_CAP


class FilesystemPolicy(Frozen):
    """What the cage sees and may fill."""

    read: tuple[str, ...] = ()
    """Absolute host paths bound read-only at the same place."""
    state: int = 64 * MIB
    """Size of the persistent, writable /state in bytes; 0 means none."""
    state_inodes: int = 16384
    tmp: int = 32 * MIB
    tmp_inodes: int = 4096
    shm: int = 8 * MIB


class RestartPolicy(Frozen):
    """Back-off between crashes, and when to give up."""

    backoff_min: float = 0.5
    backoff_max: float = 60.0
    crashes: int = 5
    window: float = 600.0
    stop_grace: float = 5.0


class EffectivePolicy(Frozen):
    """Everything a plugin may do. Two equal policies have equal digests."""

    plugin: str
    hooks: tuple[str, ...] = ()
    permissions: tuple[str, ...] = ()
    network: NetworkPolicy = NetworkPolicy()
    resources: ResourcePolicy = ResourcePolicy()
    filesystem: FilesystemPolicy = FilesystemPolicy()
    syscalls: Literal["default", "strict"] = "default"
    restart: RestartPolicy = RestartPolicy()
    delivery_timeout: float = 10.0
    delivery_attempts: int = 12

    def canonical(self) -> str:
        """Canonical JSON: sorted keys, no spaces, ASCII."""
        return canonical_json(self.model_dump(mode="json"))

    def digest(self) -> str:
        """SHA-256 of the canonical JSON, hex; in every ``plugin.started`` record."""
        return hashlib.sha256(self.canonical().encode()).hexdigest()


def canonical_json(value: Any) -> str:
    """JSON with sorted keys, no spaces and only ASCII: one spelling for one value."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False)
