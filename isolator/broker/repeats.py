"""Count records that repeat, instead of writing each of them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

from isolator.audit.schema import NetConnect, NetDenied, NetQuery, RecordData


class Write(Protocol):
    """Writes one record; ``since_ns`` and ``happened_ns`` as in ``AuditClient.record``."""

    def __call__(self, record: RecordData, *, since_ns: int | None = None, happened_ns: int | None = None) -> None: ...


Repeatable = NetQuery | NetConnect | NetDenied
"""The records of which many alike may come."""


@dataclass
class _Repeat:
    """A record, and how often it was repeated."""

    since: float
    record: Repeatable
    count: int = 0
    first: float = 0.0
    last: float = 0.0


class RepeatCounter:
    """Writes the first record of a kind and counts those like it for ``window`` seconds, then writes the count.

    Beyond ``keys`` different records at once (a scan) they are counted together, by record type and rule, so that
    neither memory nor the trail grows with the number of different things that a plugin tries. A count is written with
    the times of the first and the last that it stands for, so that the trail can name the events that caused them.
    ``clock`` is CLOCK_MONOTONIC in seconds, as the event loop's. ``busy`` is called with the first record of several.
    """

    def __init__(
        self,
        write: Write,
        clock: Callable[[], float],
        *,
        window: float = 1.0,
        keys: int = 64,
        busy: Callable[[], None] = lambda: None,
    ) -> None:
        self._write, self._clock, self._window, self._limit = write, clock, window, keys
        self._busy = busy
        self._open: dict[tuple[Any, ...], _Repeat] = {}

    def __bool__(self) -> bool:
        """Whether the window of any record has not ended."""
        return bool(self._open)

    def add(self, record: Repeatable, *, count: int = 1, late: float = 0.0) -> None:
        """Write one record now, or count it with those like it; ``count`` is how many it stands for.

        ``late``: it may have happened up to this many seconds ago.
        """
        if not self._open:
            self._busy()
        now = self._clock()
        kind, data = type(record), record.data
        key: tuple[Any, ...] = (kind, *sorted((name, str(value)) for name, value in data.items()))
        entry = self._open.get(key)
        if entry is None and len(self._open) >= self._limit:
            key = (kind, record.rule)
            entry = self._open.get(key)
            if entry is None:
                self._open[key] = _Repeat(now, kind(rule=record.rule, various=True), count, now - late, now)
                return
        if entry is None:
            self._open[key] = _Repeat(now, record)
            since = _nanoseconds(now - late) if late else None
            self._write(record if count == 1 else kind(**data, count=count), since_ns=since)
        else:
            if not entry.count:
                entry.first = now - late
            entry.last = now
            entry.count += count

    def flush(self, *, everything: bool = False) -> None:
        """Write the counts of windows that ended (or of all); to be called about once a window."""
        if not self._open:
            return
        ended = self._clock() - self._window
        for key, entry in list(self._open.items()):
            if everything or entry.since <= ended:
                del self._open[key]
                if entry.count:
                    record = type(entry.record)(**entry.record.data, count=entry.count)
                    first, last = _nanoseconds(entry.first), _nanoseconds(entry.last)
                    self._write(record, since_ns=first, happened_ns=last)


def _nanoseconds(seconds: float) -> int:
    return int(seconds * 1e9)
