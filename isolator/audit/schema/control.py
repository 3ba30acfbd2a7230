"""Records of denials, the host API, the control socket and config."""

from __future__ import annotations

from typing import Literal

from isolator.audit.schema.base import ABSENT, HOST, SUPERVISOR, ApiVerdict, RecordData, Summed


class SyscallDenied(RecordData):
    """A system call was refused."""

    TYPE = "syscall.denied"
    SOURCES = (SUPERVISOR,)
    CAUSED = True
    SUMMED = Summed("all", by="call")

    call: str
    count: int


class FsDenied(RecordData):
    """The daemon did not use a file that a plugin offered it."""

    TYPE = "fs.denied"
    SOURCES = (SUPERVISOR,)
    CAUSED = True
    SUMMED = Summed("all", by="path")

    path: str
    count: int
    why: str


class ApiCalled(RecordData):
    """A plugin called the host API."""

    TYPE = "api.called"
    SOURCES = (HOST,)
    CAUSED = True
    SUMMED = Summed("all", by="method")

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


class ControlCalled(RecordData):
    """A verb of the control socket was called that changes something, or was denied."""

    TYPE = "control.called"
    SOURCES = (HOST,)
    SUMMED = Summed("`verdict` not ok", by="verb", covers=lambda data: data.get("verdict") != "ok", by_caller=True)

    verb: str
    uid: int
    """Of the caller, as the kernel tells it."""
    pid: int
    role: str | None
    verdict: str
    """``ok``, the code of the error, or ``unknown``: its host process ended before the answer."""
    on_behalf_of: str = ABSENT
    """For whom the caller acted, as the caller says: recorded, and trusted by nobody."""


class ControlShut(RecordData):
    """Users without a role connected to the control socket without end: the kernel refuses them for a while."""

    TYPE = "control.shut"
    SOURCES = (SUPERVISOR,)

    uid: int
    """Of the one that connected last."""
    seconds: float
    """Until everybody may connect again."""


class ConfigChanged(RecordData):
    """A plugin's config or policy changed, or the stored config as a whole."""

    TYPE = "config.changed"
    SOURCES = (HOST, SUPERVISOR)

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


class SecretInjected(RecordData):
    """Secrets were put into the environment of a start."""

    TYPE = "secret.injected"
    SOURCES = (HOST,)

    names: list[str]
    """Keys, never values."""
