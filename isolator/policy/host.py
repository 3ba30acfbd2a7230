"""What ``host.toml`` settles: the ceiling that nobody exceeds, the defaults, and the daemon's own settings.

The models alone; reading the file is ``load.py``. The values here are the default posture: a host without a
``host.toml`` behaves as if it held exactly these. Sizes are bytes, cpu thousandths of a core, durations seconds.
"""

from __future__ import annotations

import hashlib
from typing import Literal

from pydantic import Field

from isolator.policy.model import GIB, KIB, MIB, AddressException, EgressRule, Frozen, RestartPolicy
from isolator.policy.units import NO_CAP

Role = Literal["viewer", "emitter", "operator"]
Profile = Literal["default", "strict"]


class Limits(Frozen):
    """Every number that has a default and a ceiling."""

    memory: int = 256 * MIB
    cpu: int = 250
    tasks: int = 64
    nofile: int = 1024
    io_read: int = NO_CAP
    """Bytes per second of each device."""
    io_write: int = NO_CAP
    state: int = 64 * MIB
    tmp: int = 32 * MIB
    shm: int = 8 * MIB
    state_inodes: int = 16384
    tmp_inodes: int = 4096
    connects_per_second: int = 20
    connect_burst: int = 40
    connects_open: int = 64
    delivery_timeout: float = 10.0
    delivery_attempts: int = 12
    stop_grace: float = 5.0


CEILING = Limits(
    memory=2 * GIB,
    cpu=4000,
    tasks=512,
    nofile=4096,
    io_read=NO_CAP,
    io_write=NO_CAP,
    state=10 * GIB,
    tmp=256 * MIB,
    shm=64 * MIB,
    state_inodes=1 << 20,
    tmp_inodes=1 << 16,
    connects_per_second=200,
    connect_burst=400,
    connects_open=512,
    delivery_timeout=900.0,
    delivery_attempts=100,
    stop_grace=60.0,
)


class Ceiling(Frozen):
    """What nobody exceeds, whatever a policy grants."""

    limits: Limits = CEILING
    hooks: tuple[str, ...] = ("*",)
    permissions: tuple[str, ...] = ("*",)
    egress: tuple[EgressRule, ...] | None = None
    """None: any destination that is not on the always-blocked list."""
    egress_public: bool = True
    """May a policy grant "public", that is, any public address?"""
    read: tuple[str, ...] = ("/",)
    syscalls: Profile = "default"
    allow_no_sni: bool = True


class Inbound(Frozen):
    """Host addresses and port ranges (first, last) that a policy may have forwarded into a cage; none by default."""

    addresses: tuple[str, ...] = ("127.0.0.1", "::1")
    ports: tuple[tuple[int, int], ...] = ()

    def allows(self, address: str, port: int) -> bool:
        """May a policy listen there?"""
        return address in self.addresses and any(first <= port <= last for first, last in self.ports)


MAY_DEGRADE = ("cgroup.memory", "cgroup.cpu", "cgroup.pids", "cgroup.io", "landlock")
"""Keys of the ledger that ``may_degrade`` of host.toml can list: controls without which a cage is still a cage.

Each layer declares its own in ``Layer.may_degrade``; a test compares the two.
"""


class Roles(Frozen):
    """Uids of the control socket's callers by role; root is always an operator."""

    viewer: tuple[int, ...] = ()
    emitter: tuple[int, ...] = ()
    operator: tuple[int, ...] = (0,)


def without_trail(disk_full: str) -> str:
    """What ``[audit] disk_full`` means for as long as the trail cannot be written, for an alarm."""
    if disk_full == "stop":
        return "nothing is started or dispatched until it can be"
    return 'the daemon goes on without it (disk_full = "continue")'


class AuditSettings(Frozen):
    """``disk_full``: ``stop`` starts and dispatches nothing while no record can be written; ``continue`` goes on."""

    disk_full: Literal["stop", "continue"] = "stop"
    rotate_size: int = 64 * MIB
    rotate_age: float = 86400.0
    keep_files: int = 90
    """Rotated files kept; 0 keeps all of them."""
    seal_records: int = 1000
    seal_interval: float = 60.0
    snapshot_interval: float = 30.0


class Metrics(Frozen):
    """Where Prometheus may scrape; None serves nothing. Loopback addresses only."""

    address: str = "127.0.0.1"
    port: int | None = None


class HostConfig(Frozen):
    """Everything of ``host.toml``. Crosses process borders as JSON."""

    uid_range: tuple[int, int] = (70000, 74999)
    plugin_dirs: tuple[str, ...] = ()
    may_degrade: tuple[str, ...] = ()
    """Keys of the ledger's controls (``MAY_DEGRADE``) that this host may lack."""
    ceiling: Ceiling = Ceiling()
    defaults: Limits = Limits()
    default_syscalls: Profile = "default"
    restart: RestartPolicy = RestartPolicy()
    roles: Roles = Roles()
    exceptions: tuple[AddressException, ...] = ()
    resolvers: tuple[str, ...] = ()
    inbound: Inbound = Inbound()
    audit: AuditSettings = AuditSettings()
    metrics: Metrics = Metrics()
    source: str | None = None
    """The file it was read from; None when there is none."""
    where: dict[str, str] = Field(default_factory=dict)
    """``FILE:LINE`` of every value that the file sets, by its dotted key (``ceiling.memory``)."""

    def role_of(self, uid: int) -> Role | None:
        """The highest role of a caller of the control socket, or None."""
        if uid == 0 or uid in self.roles.operator:
            return "operator"
        if uid in self.roles.emitter:
            return "emitter"
        return "viewer" if uid in self.roles.viewer else None

    def digest(self) -> str:
        """SHA-256 of the settings, wherever they were read from."""
        return hashlib.sha256(self.model_dump_json(exclude={"source", "where"}).encode()).hexdigest()


SMALLEST: dict[str, float] = {
    "memory": 4 * MIB,
    "cpu": 10,
    "tasks": 1,
    "nofile": 16,
    "io_read": 64 * KIB,
    "io_write": 64 * KIB,
    # A tmpfs of size 0 or with 0 inodes is one without a limit (tmpfs(5)), so zero must never get there.
    "tmp": 64 * KIB,
    "shm": 64 * KIB,
    "tmp_inodes": 16,
    "state": 0,
    "state_inodes": 16,
    "connects_per_second": 1,
    "connect_burst": 1,
    "connects_open": 1,
    "delivery_timeout": 0.1,
    "delivery_attempts": 1,
    "stop_grace": 0,
}
"""The least that makes sense; less is taken for a typing error (``memory = 256`` is 256 bytes)."""

SMALLEST_STATE = MIB
"""The least that a state folder can be when there is one: it is a file system of its own."""
