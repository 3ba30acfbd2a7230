"""State of an audit process on its way to another that takes its place.

Whoever changes the type, or one of those in it, in whatever way, raises ``AUDIT_STATE``: another version's state is not
read, and the process starts as after a crash.
"""

from __future__ import annotations

from isolator.audit.writer import WriterState
from isolator.ipc.body import Body

AUDIT_STATE = 2
READ = (AUDIT_STATE, 1)
"""Versions that are read: that of the version before has no histograms."""


class AuditState(Body):
    """Everything that an audit process knows and the trail does not tell."""

    version: int = AUDIT_STATE
    writer: WriterState
    metrics: tuple[int, ...]
    """listening sockets"""
