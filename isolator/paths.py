"""Every path of a daemon. ``--root DIR`` (or ``ISOLATOR_ROOT``) puts every path below DIR.

Several daemons live side by side: names that are global to the machine (users, cgroups) carry an
instance id derived from the root, empty for the default root.
"""

from __future__ import annotations

import os
from pathlib import Path

from isolator.base.structs import struct_class


class _Below:
    """A path below the root of a daemon."""

    def __init__(self, path: str) -> None:
        self._path = path

    def __truediv__(self, name: str) -> _Below:
        return _Below(f"{self._path}/{name}")

    def __get__(self, paths: Paths, _: type[Paths]) -> Path:
        return paths.root / self._path


@struct_class(frozen=True)
class Paths:
    """Every path and machine-wide name of one daemon."""

    root: Path

    @classmethod
    def of(cls, root: str | os.PathLike[str] | None = None) -> Paths:
        """Paths below ``root``, else below ``$ISOLATOR_ROOT``, else below ``/``."""
        return cls(Path(os.path.realpath(root or os.environ.get("ISOLATOR_ROOT") or "/")))

    @property
    def instance(self) -> str:
        """Six hex digits that tell this daemon's users and cgroups from another's; empty for ``/``."""
        if self.root == Path("/"):
            return ""
        import hashlib  # the library under it takes longer to load than most commands need

        return hashlib.sha256(os.fsencode(self.root)).hexdigest()[:6]

    def named(self, base: str) -> str:
        """``base`` for the default root, ``base-INSTANCE`` for any other."""
        return f"{base}-{self.instance}" if self.instance else base

    etc = _Below("etc/isolator")
    host_toml = etc / "host.toml"
    policies = etc / "policies"
    """One TOML file per plugin, root-owned."""
    certificates = etc / "certificates"
    """``DIGEST.json`` for each version of a plugin whose certificate counts here; root-owned."""
    lib = _Below("var/lib/isolator")
    plugins = lib / "plugins"
    """The root-owned store: ``NAME/DIGEST/`` and ``NAME/plugin.state``."""
    state = lib / "state"
    """One size-capped image per plugin, and where each is mounted."""
    cache = lib / "cache"
    host_lib = lib / "host"
    """Owned by the host's user: its database and its key."""
    host_database = host_lib / "host.db"
    """The queue, the plugins' config and their stored values."""
    audit_lib = lib / "audit"
    """Owned by the audit user: the signing key, readable by it alone."""
    trail_begun = lib / "trail.begun"
    """There once a trail was begun, away from it and root's: a trail that is gone is noticed."""
    database_begun = lib / "database.begun"
    """The same for the host's database."""
    run = _Below("run/isolator")
    control_socket = run / "control.sock"
    ticket_socket = run / "ticket.sock"
    """The supervisor's own socket: who asks for a change, and what they hand over."""
    run_socket = run / "run.sock"
    """The supervisor's own socket for ``isolator run`` of users with the role ``runner``."""
    metrics_socket = run / "metrics.sock"
    """Prometheus figures over HTTP."""
    console_socket = run / "console.sock"
    """The HTTP API, where ``[console]`` is set."""
    journal = run / "journal"
    """Record of everything made outside a process; on a tmpfs, so a reboot clears it with what it names."""
    log = _Below("var/log/isolator")
    audit_log = log / "audit"
    """Directory of the trail, owned by the audit user; the live file is ``audit.jsonl``."""
    audit_file = audit_log / "audit.jsonl"
    plugin_log = log / "plugins"
    """Directory of the sidecars' output, owned by the host's user."""
