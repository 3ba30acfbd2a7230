"""Every path of a daemon. ``--root DIR`` (or ``ISOLATOR_ROOT``) puts every path below DIR.

Several daemons live side by side: names that are global to the machine (users, cgroups) carry an
instance id derived from the root, empty for the default root.
"""

from __future__ import annotations

import os
from pathlib import Path

from isolator.base.structs import struct_class


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

    @property
    def etc(self) -> Path:
        return self.root / "etc/isolator"

    @property
    def host_toml(self) -> Path:
        return self.etc / "host.toml"

    @property
    def policies(self) -> Path:
        """One TOML file per plugin, root-owned."""
        return self.etc / "policies"

    @property
    def certificates(self) -> Path:
        """``DIGEST.json`` for each version of a plugin whose certificate counts here; root-owned."""
        return self.etc / "certificates"

    @property
    def lib(self) -> Path:
        return self.root / "var/lib/isolator"

    @property
    def plugins(self) -> Path:
        """The root-owned store: ``NAME/DIGEST/`` and ``NAME/plugin.state``."""
        return self.lib / "plugins"

    @property
    def state(self) -> Path:
        """One size-capped image per plugin, and where each is mounted."""
        return self.lib / "state"

    @property
    def cache(self) -> Path:
        return self.lib / "cache"

    @property
    def host_lib(self) -> Path:
        """Owned by the host's user: its database and its key."""
        return self.lib / "host"

    @property
    def host_database(self) -> Path:
        """The queue, the plugins' config and their stored values."""
        return self.host_lib / "host.db"

    @property
    def audit_lib(self) -> Path:
        """Owned by the audit user: the signing key, readable by it alone."""
        return self.lib / "audit"

    @property
    def trail_begun(self) -> Path:
        """There once a trail was begun, away from it and root's: a trail that is gone is noticed."""
        return self.lib / "trail.begun"

    @property
    def database_begun(self) -> Path:
        """The same for the host's database."""
        return self.lib / "database.begun"

    @property
    def run(self) -> Path:
        return self.root / "run/isolator"

    @property
    def control_socket(self) -> Path:
        return self.run / "control.sock"

    @property
    def ticket_socket(self) -> Path:
        """The supervisor's own socket: who asks for a change, and what they hand over."""
        return self.run / "ticket.sock"

    @property
    def run_socket(self) -> Path:
        """The supervisor's own socket for ``isolator run`` of users with the role ``runner``."""
        return self.run / "run.sock"

    @property
    def metrics_socket(self) -> Path:
        """Prometheus figures over HTTP."""
        return self.run / "metrics.sock"

    @property
    def console_socket(self) -> Path:
        """The HTTP API, where ``[console]`` is set."""
        return self.run / "console.sock"

    @property
    def journal(self) -> Path:
        """Record of everything made outside a process; on a tmpfs, so a reboot clears it with what it names."""
        return self.run / "journal"

    @property
    def log(self) -> Path:
        return self.root / "var/log/isolator"

    @property
    def audit_log(self) -> Path:
        """Directory of the trail, owned by the audit user; the live file is ``audit.jsonl``."""
        return self.log / "audit"

    @property
    def audit_file(self) -> Path:
        return self.audit_log / "audit.jsonl"

    @property
    def plugin_log(self) -> Path:
        """Directory of the sidecars' output, owned by the host's user."""
        return self.log / "plugins"
