"""What an operator grants to one plugin: the model of ``policies/NAME.toml``. Reading it is ``load.py``.

None means that the file does not say, so the default posture holds for that field. Units as in ``hostconfig.py``.
"""

from __future__ import annotations

from pydantic import Field

from isolator.policy.host import Profile
from isolator.policy.model import EgressRule, Frozen, ListenRule


class GrantedLimits(Frozen):
    """The numbers that the file sets; names as in ``Limits``."""

    memory: int | None = None
    cpu: int | None = None
    tasks: int | None = None
    nofile: int | None = None
    io_read: int | None = None
    io_write: int | None = None
    state: int | None = None
    tmp: int | None = None
    shm: int | None = None
    state_inodes: int | None = None
    tmp_inodes: int | None = None
    connects_per_second: int | None = None
    connect_burst: int | None = None
    connects_open: int | None = None
    delivery_timeout: float | None = None
    delivery_attempts: int | None = None
    stop_grace: float | None = None


class GrantedRestart(Frozen):
    """Overrides of ``RestartPolicy``."""

    backoff_min: float | None = None
    backoff_max: float | None = None
    crashes: int | None = None
    window: float | None = None


class PluginPolicy(Frozen):
    """One policy file."""

    source: str
    """The file, as errors and ``explain`` name it."""
    hooks: tuple[str, ...] | None = None
    permissions: tuple[str, ...] | None = None
    egress: tuple[EgressRule, ...] | None = None
    """None: the file does not list destinations, so any public address may be granted."""
    egress_public: bool = False
    """The list holds "public": any public address, TCP 443 and 80, besides the rules."""
    listen: tuple[ListenRule, ...] | None = None
    allow_no_sni: bool | None = None
    limits: GrantedLimits = GrantedLimits()
    restart: GrantedRestart = GrantedRestart()
    read: tuple[str, ...] | None = None
    syscalls: Profile | None = None
    where: dict[str, str] = Field(default_factory=dict)
    """``FILE:LINE`` of every value by its dotted key: ``grant.egress``, ``grant.egress[1]``, ``limits.memory``."""

    def at(self, key: str) -> str:
        """Where a value is set, or the file when it is not."""
        return self.where.get(key, self.source)
