"""Budgets: repeatable records beyond a share are counted and summed up, so that noise buys no room in the trail.

Types declare which of their records may be summed up (``RecordData.SUMMED``): refusals, denials, calls and retries,
of which a plugin or a caller can make any number at will. Each cause (a plugin, or the uid of a caller) has a token
bucket for each type. What finds it empty is counted; a summary of the counts is written after each ``WINDOW``. Some
records are still written one by one meanwhile, as tokens come back.

While the trail would not last as long as it should (``tighten``) shares are smaller and windows longer.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from isolator.audit.record import Incoming
from isolator.audit.schema import RECORDS, AuditSummary, Summed
from isolator.base.pacing import TokenBucket

RATE, BURST, WINDOW = 10.0, 3000.0, 1.0
"""Records a second and at once of one type and cause; seconds between the summaries of those beyond."""
TIGHT_RATE, TIGHT_BURST, TIGHT_WINDOW = 0.1, 100.0, 60.0
CALLERS, CALLERS_SHARE = 64, 4.0
"""Uids with a share of their own (the others have one together), and the multiple of one share that all of them have:
one user can have thousands of uids."""
PLUGINS = 4096
"""Plugins with a share of their own."""
LABELS = 16
"""Different values of ``by`` that are counted apart; the rest is counted under ``OTHER``."""
OTHER = "other"

_SUMMED: dict[str, Summed] = {type: kind.SUMMED for type, kind in RECORDS.items() if kind.SUMMED is not None}

_Key = tuple[str, int | str | None]
"""Record type and cause; None for all causes beyond those with a share of their own."""


@dataclass
class _Share:
    """The budget of one cause for one type, and what is beyond it and in no summary yet."""

    bucket: TokenBucket
    count: int = 0
    total: int = 0
    source: str = ""
    plugin: str | None = None
    first: str = ""
    last: str = ""
    since: float = 0.0
    by: Counter[str] = field(default_factory=Counter)


class Budgets:
    """Shares of all causes. ``clock``: monotonic, in seconds."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self.tight = False
        self.counting = False
        """Whether some records are in no summary yet."""
        self._clock = clock
        self._shares: dict[_Key, _Share] = {}
        self._callers: dict[str, TokenBucket] = {}
        """Bucket of all callers together, by type."""

    @property
    def window(self) -> float:
        """Seconds between two summaries of one cause."""
        return TIGHT_WINDOW if self.tight else WINDOW

    def admit(self, record: Incoming, source: str) -> bool:
        """Whether a record is written; else it has been counted."""
        summed = _SUMMED.get(record.type)
        if summed is None or not summed.covers(record.data):
            return True
        share = self._share(record, summed, source)
        if share.bucket.try_take() and (not summed.by_caller or self._callers[record.type].try_take()):
            return True
        self.counting = True
        if not share.count:
            share.first, share.since = record.time, self._clock()
            share.source, share.plugin = source, record.plugin
        elif share.plugin != record.plugin:
            share.plugin = None
        share.last = record.time
        share.count += 1
        repeated = record.data.get("count")
        share.total += repeated if isinstance(repeated, int) else 1
        if summed.by:
            label = str(record.data.get(summed.by))[:80]
            share.by[label if label in share.by or len(share.by) < LABELS else OTHER] += 1
        return False

    def due(self, *, everything: bool = False) -> list[Incoming]:
        """Take the summaries whose window has ended, or all; shares that are full again are dropped."""
        now, found = self._clock(), []
        for key, share in list(self._shares.items()):
            if share.count:
                if everything or now - share.since >= self.window:
                    found.append(_summary(key, share))
                    self._shares[key] = _Share(share.bucket)
            elif share.bucket.tokens >= share.bucket.burst:
                del self._shares[key]
        self.counting = any(share.count for share in self._shares.values())
        return found

    def tighten(self, tight: bool) -> None:
        """Make every share small, or usual again; counts stay."""
        if tight != self.tight:
            self.tight = tight
            self._callers.clear()
            for share in self._shares.values():
                share.bucket = self._bucket()

    def _share(self, record: Incoming, summed: Summed, source: str) -> _Share:
        cause: int | str | None
        if summed.by_caller:
            uid = record.data.get("uid")
            cause, most = (uid if isinstance(uid, int) else None), CALLERS
            if record.type not in self._callers:
                self._callers[record.type] = self._bucket(CALLERS_SHARE)
        else:
            cause, most = record.plugin or source, PLUGINS
        share = self._shares.get((record.type, cause))
        if share is None:
            if cause is not None and sum(type == record.type for type, _ in self._shares) >= most:
                return self._shares.setdefault((record.type, None), _Share(self._bucket()))
            share = self._shares[record.type, cause] = _Share(self._bucket())
        return share

    def _bucket(self, times: float = 1.0) -> TokenBucket:
        rate, burst = (TIGHT_RATE, TIGHT_BURST) if self.tight else (RATE, BURST)
        return TokenBucket(rate * times, burst * times, self._clock)


def _summary(key: _Key, share: _Share) -> Incoming:
    type, cause = key
    data: dict[str, Any] = {"type": type, "source": share.source, "count": share.count}
    if share.total != share.count:
        data["total"] = share.total
    data |= {"first": share.first, "last": share.last}
    if isinstance(cause, int):
        data["uid"] = cause
    if share.by:
        data["by"] = dict(share.by)
    return Incoming(share.last, AuditSummary.TYPE, share.plugin, data=AuditSummary(**data).data)
