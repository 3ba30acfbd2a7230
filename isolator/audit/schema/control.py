"""Records of denials, the host API, the control socket and config."""

from __future__ import annotations

from typing import Literal

from isolator.audit.schema.base import ABSENT, HOST, SUPERVISOR, ApiVerdict, RecordData, Summed


class SyscallDenied(
    RecordData, type="syscall.denied", sources=(SUPERVISOR,), caused=True, summed=Summed("all", by="call")
):
    """A system call was refused."""

    call: str
    count: int


class FsDenied(RecordData, type="fs.denied", sources=(SUPERVISOR,), caused=True, summed=Summed("all", by="path")):
    """The daemon did not use a file that a plugin offered it."""

    path: str
    count: int
    why: str


class ApiCalled(RecordData, type="api.called", sources=(HOST,), caused=True, summed=Summed("all", by="method")):
    """A plugin called the host API."""

    method: str
    """``connect`` for a refused connection, ``*`` for calls beyond the rate limit."""
    verdict: ApiVerdict
    permission: str | None = ABSENT
    """Permission that the method needs; null when none."""
    latency_us: int = ABSENT
    uid: int = ABSENT
    """User that was refused a connection."""
    count: int = ABSENT
    """Calls that were refused because of the rate limit."""


class ControlCalled(
    RecordData,
    type="control.called",
    sources=(HOST,),
    summed=Summed(
        "`verdict` neither ok nor unknown",
        by="verb",
        by_caller=True,
        covers=lambda data: data.get("verdict") not in ("ok", "unknown"),
    ),
):
    """A verb of the control socket was called that changes something, or was denied."""

    verb: str
    uid: int
    """Of the caller, as the kernel tells it."""
    pid: int
    role: str | None
    verdict: str
    """``ok``, the code of the error, or ``unknown``: its host process ended before the answer."""
    on_behalf_of: str = ABSENT
    """For whom the caller acted, as the caller says: recorded, and trusted by nobody."""


class ControlShut(RecordData, type="control.shut", sources=(SUPERVISOR,)):
    """Users without a role connected to the control socket without end: the kernel refuses them for a while."""

    uid: int
    """Of the one that connected last."""
    seconds: float
    """Until everybody may connect again."""


class ConfigChanged(RecordData, type="config.changed", sources=(HOST, SUPERVISOR)):
    """A plugin's config or policy changed, or the stored config as a whole."""

    names: list[str]
    """Keys, never values; ``policy`` for an edited policy."""
    file: str = ABSENT
    """Path of the policy."""
    old_policy_sha256: str | None = ABSENT
    """Of the effective policy before."""
    policy_sha256: str = ABSENT
    """Of the effective policy now."""
    rotated: int = ABSENT
    """Values that were encrypted with a new key."""
    lost: Literal[True] = ABSENT
    """The database is gone, and every value with it."""
    why: str = ABSENT
    by: str = ABSENT
    """``uid:N`` of the caller."""
    waits: bool = ABSENT
    """Whether the values belong to a version that waits for approval."""


class SecretInjected(RecordData, type="secret.injected", sources=(HOST,)):
    """Secrets were put into the environment of a start."""

    names: list[str]
    """Keys, never values."""
