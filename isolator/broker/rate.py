"""How often something may happen, and how denials are counted rather than repeated."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol


class TokenBucket:
    """``rate`` per second on average, ``burst`` at once. ``clock`` is monotonic, in seconds."""

    def __init__(self, rate: float, burst: float, clock: Callable[[], float]) -> None:
        self._rate, self._burst, self._clock = rate, burst, clock
        self._tokens, self._at = burst, clock()

    def take(self) -> bool:
        """Use one token; False when there is none."""
        now = self._clock()
        self._tokens = min(self._burst, self._tokens + (now - self._at) * self._rate)
        self._at = now
        if self._tokens < 1:
            return False
        self._tokens -= 1
        return True


class Write(Protocol):
    """Writes one record; ``since_ns`` and ``happened_ns`` as in ``AuditClient.record``."""

    def __call__(
        self, type: str, data: dict[str, Any], *, since_ns: int | None = None, happened_ns: int | None = None
    ) -> None: ...


@dataclass
class _Repeat:
    since: float
    data: dict[str, Any] = field(default_factory=dict)
    count: int = 0
    first: float = 0.0
    last: float = 0.0


class RepeatCounter:
    """Lets the first record of a kind through and counts its like for ``window`` seconds, then tells the count.

    What differs in too many ways at once (a scan) is counted together, by record type and rule, so that neither
    memory nor the trail grows with the number of different things that a plugin tries. A count is written with the
    times of the first and the last that it stands for, so that the trail can name the events that caused them.
    """

    def __init__(
        self,
        write: Write,
        clock: Callable[[], float],
        *,
        window: float = 1.0,
        keys: int = 64,
    ) -> None:
        self._write, self._clock, self._window, self._limit = write, clock, window, keys
        self._open: dict[tuple[Any, ...], _Repeat] = {}

    def add(self, type: str, data: dict[str, Any], *, count: int = 1, late: float = 0.0) -> None:
        """Write one record now, or count it with those like it; ``count`` is how many it stands for.

        ``late``: it may have happened up to this many seconds ago.
        """
        now = self._clock()
        key: tuple[Any, ...] = (type, *sorted((name, str(value)) for name, value in data.items()))
        entry = self._open.get(key)
        if entry is None and len(self._open) >= self._limit:
            data = {"rule": data.get("rule"), "various": True}
            key = (type, data["rule"])
            entry = self._open.get(key)
            if entry is None:
                self._open[key] = _Repeat(now, data, count, now - late, now)
                return
        if entry is None:
            self._open[key] = _Repeat(now, data)
            since = _nanoseconds(now - late) if late else None
            self._write(type, data if count == 1 else {**data, "count": count}, since_ns=since)
        else:
            if not entry.count:
                entry.first = now - late
            entry.last = now
            entry.count += count

    def flush(self, *, everything: bool = False) -> None:
        """Write the counts of windows that ended (or of all); to be called about once a window."""
        ended = self._clock() - self._window
        for key, entry in list(self._open.items()):
            if everything or entry.since <= ended:
                del self._open[key]
                if entry.count:
                    data = {**entry.data, "count": entry.count}
                    first, last = _nanoseconds(entry.first), _nanoseconds(entry.last)
                    self._write(str(key[0]), data, since_ns=first, happened_ns=last)


def _nanoseconds(seconds: float) -> int:
    return int(seconds * 1e9)
