"""The parts of a broker that all its cages share."""

from __future__ import annotations

from dataclasses import dataclass, field

from isolator.audit.client import AuditClient
from isolator.broker.host_addresses import HostAddresses
from isolator.broker.nat64 import Nat64
from isolator.broker.relay import Scratch
from isolator.broker.resolver import HostResolvers
from isolator.broker.ticks import Ticks
from isolator.policy.denial import DenialRule

UNACKNOWLEDGED = 15_000
"""Audit records under way beyond which nothing new is let out: nothing happens unrecorded."""


@dataclass(frozen=True)
class Shared:
    """The parts of a broker that all its cages share."""

    audit: AuditClient
    host: HostAddresses
    resolvers: HostResolvers
    nat64: Nat64
    scratch: Scratch
    ticks: Ticks = field(default_factory=Ticks)
    audit_first: bool = True
    """Whether nothing is let out while the trail cannot be written (``host.toml`` ``[audit] disk_full``)."""

    def unrecordable(self) -> DenialRule | None:
        """The rule that refuses everything new while it could not be recorded, or None."""
        if self.audit.blocked is not None:
            return DenialRule.AUDIT_UNAVAILABLE if self.audit_first else None
        return DenialRule.AUDIT_UNAVAILABLE if self.audit.unacknowledged > UNACKNOWLEDGED else None
