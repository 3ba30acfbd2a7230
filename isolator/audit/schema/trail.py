"""Records of the trail itself."""

from __future__ import annotations

from typing import Any

from isolator.audit.schema.base import ABSENT, AUDIT, BROKER, HOST, SUPERVISOR, RangeData, RecordData


class AuditSeal(RangeData, type="audit.seal", sources=(AUDIT,)):
    """A signature over all records since the seal before."""

    from_: int
    """First record that it covers."""
    to: int
    """Last record that it covers: the one before."""
    hash: str
    """Of the last record that it covers."""
    key: str
    """First 16 hex digits of the SHA-256 of the public key."""
    signature: str
    """Ed25519, in hex."""
    origins: dict[str, str]
    """By source, session and number of its last record."""
    runs: dict[str, str]
    """By run that has begun and not ended, its plugin."""


RETENTION = "retention"
"""``why`` of the gap that full files leave which are deleted because there are enough."""


class AuditGap(RangeData, type="audit.gap", sources=(AUDIT, BROKER, HOST, SUPERVISOR)):
    """Records were lost, refused, cut off or retired, or the trail's files were touched from outside."""

    count: int | None
    """Records that are missing here; null when nobody knows."""
    why: str
    """``retention`` for full files that were deleted because there were enough."""
    source: str = ABSENT
    """Process whose records are missing."""
    bytes: int = ABSENT
    """Size of what was cut off."""
    sha256: str = ABSENT
    """Of what was cut off, or of the first line that was refused."""
    text: str = ABSENT
    """Beginning of it."""
    kept: str = ABSENT
    """Name of the file, beside the trail, that holds it."""
    found: dict[str, Any] = ABSENT
    """``seq`` and ``hash`` of the last record that was there."""
    written: dict[str, Any] = ABSENT
    """``seq`` and ``hash`` of the last record that had been written."""
    from_: int = ABSENT
    """First record that was retired."""
    to: int = ABSENT
    """Last record that was retired."""
    hash: str | None = ABSENT
    """Of the last record that was retired."""
    files: list[str] = ABSENT
    """Names of the files that were deleted."""


class AuditSummary(RecordData, type="audit.summary", sources=(AUDIT,)):
    """Records beyond the budget of their cause, counted instead of written; ``plugin`` names it if there is one."""

    type: str
    """Type of the records."""
    source: str
    """Process that sent the first of them."""
    count: int
    """Number of the records."""
    total: int = ABSENT
    """Number that they stand for, where some have a ``count`` of their own."""
    first: str
    """Time of the first."""
    last: str
    """Time of the last."""
    uid: int = ABSENT
    """Caller that caused them; missing also where many callers are counted together."""
    by: dict[str, int] = ABSENT
    """Their number by verb, method, rule, call, path or name; of many different ones the rest is ``other``."""
