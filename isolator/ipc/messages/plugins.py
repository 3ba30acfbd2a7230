"""Plugins as the host and the command line see them."""

from __future__ import annotations

from enum import StrEnum
from typing import Self, cast

from isolator.ipc.body import Body, Json, omitted


class PluginState(StrEnum):
    """State of a plugin. ``pending``: found, not approved yet; ``rejected``: its manifest or policy is of no use."""

    PENDING = "pending"
    REJECTED = "rejected"
    DISABLED = "disabled"
    STOPPED = "stopped"
    STARTING = "starting"
    RUNNING = "running"
    STOPPING = "stopping"
    BACKOFF = "backoff"
    FAILED = "failed"


OUT_OF_MEMORY = "out of memory"
"""Cause of the end of a run whose cage was out of memory."""


class Origin(StrEnum):
    """Whose doing the end of a run was. Only the plugin's own counts against it and against its events."""

    PLUGIN = "plugin"
    OPERATOR = "operator"
    DAEMON = "daemon"


class PluginEntry(Body):
    """A plugin as the host and the command line see it: ``RegisteredEntry`` or ``FoundEntry``."""

    name: str
    version: str
    digest: str
    state: PluginState
    error: str = ""
    run: str | None = None
    pid: int | None = None
    uid: int | None = None
    started_at: str | None = None
    restarts: int = 0
    effective: Json | None = None
    """JSON of `EffectivePolicy`"""
    effective_digest: str | None = None
    manifest: Json | None = None
    """the parsed JSON object, at most 64 KiB; a larger one comes with `plugin.stage` only"""

    @classmethod
    def from_json(cls, data: object, where: str) -> Self:
        """Read an entry of either kind."""
        if cls is not PluginEntry:
            return super().from_json(data, where)
        kind = FoundEntry if isinstance(data, dict) and "found" in data else RegisteredEntry
        return cast(Self, kind.from_json(data, where))


class PendingVersion(Body):
    """A version that waits for approval."""

    version: str
    digest: str
    differences: tuple[str, ...]
    """what it asks for beyond the version in use"""


class RegisteredEntry(PluginEntry):
    """A registered plugin."""

    binary: str | None = None
    """path of a binary that is registered where it is"""
    previous: tuple[str, ...] = ()
    """digests of earlier versions, the latest first"""
    pending: PendingVersion | None = None
    ready: bool = False
    """the socket of its run has been there"""
    on_trial: bool = False
    """the version in use is new and being watched"""
    source: str = ""
    source_files: str = omitted(default="")
    """the folder that was registered beside a binary"""
    source_packaged: bool = omitted(default=False)
    """whether the source is a package"""
    signer: str = omitted(default="")
    """the publisher who has signed the version in use"""
    lease: str = omitted(default="")
    """why it may not act, if it may not: its cages are frozen, or none is started"""


class FoundEntry(PluginEntry):
    """A plugin in a folder of `plugin_dirs`: no run, uid or effective policy; state `pending` or `rejected`."""

    found: str
    """its folder"""
