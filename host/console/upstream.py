"""The daemon as the console sees it: answers to requests, and the trail as it is written."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import math
import struct
from collections import Counter, deque
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

from host.cli import invocations
from host.cli.denials import TYPES, refused
from host.client.terms import our_errors
from host.console.charts import USED, by_invocation, seconds_of
from isolator.audit.record import Record, parse
from isolator.audit.schema import AuditSeal, ExecEnded, Resources
from isolator.errors import IsolatorError, UnavailableError
from isolator_client.aio import AsyncClient
from isolator_client.trail import Recorded

RECENT = 10_000
"""Records from which the console begins (``MAX_RECORDS``)."""
DENIALS, POINTS, PLUGINS = 1000, 120, 4096
"""Denials that are kept, points of a chart, and plugins with one."""
LONGEST = 8192
"""Bytes of a record that is kept."""
BEAT, URGENT_BEAT = 0.5, 0.1
"""Seconds between two notices to a page, and with one that is urgent."""
URGENT = frozenset({"denials"})
LISTENERS, LISTENERS_OF_ONE = 64, 8
"""Pages that follow, and those of one session or uid."""
ANSWER_SECONDS = 20.0
"""A daemon that takes longer to answer hangs; nobody's requests pile up before it."""
_RETRY = 1.0
_POINT = struct.Struct(f"{1 + len(USED)}d")
"""A point of the charts: of 200 plugins there are 24 000."""


class Upstream:
    """A connection to the control socket, shared by every request."""

    def __init__(self, path: Path) -> None:
        self._client = AsyncClient(path)

    async def open(self) -> None:
        """Connect; raises IsolatorError."""
        with our_errors():
            await self._client.open()

    async def close(self) -> None:
        await self._client.close()

    @property
    def connected(self) -> bool:
        """Whether the daemon is there at the moment."""
        return self._client.connected

    async def call(self, verb: str, /, **params: Any) -> dict[str, Any]:
        """Ask, and wait for the answer; raises the error that the daemon answered, UnavailableError for none."""
        try:
            async with asyncio.timeout(ANSWER_SECONDS):
                with our_errors():
                    return await self._client.call(verb, **params)
        except TimeoutError:
            raise UnavailableError("daemon", f"does not answer within {ANSWER_SECONDS:g} s", "try again") from None

    async def records(self, lines: int) -> AsyncIterator[Recorded]:
        """The records from the last ``lines`` on, for ever."""
        async for record in self._client.audit(lines=lines):
            yield record


class Live:
    """The newest part of the trail, held in memory, and notices of what changes."""

    def __init__(self, upstream: Upstream) -> None:
        self._upstream = upstream
        self.first, self.last, self.head = 0, 0, ""
        """The records that were seen, each of which continued the one before, and the hash of the last."""
        self.problem = ""
        """Why the trail cannot be followed, or does not fit together."""
        self.seal: Recorded | None = None
        self.invocations = invocations.Invocations()
        self._denials: deque[tuple[str | None, bytes]] = deque(maxlen=DENIALS)
        """Plugin and line of each."""
        self._usage: dict[str, deque[bytes]] = {}
        self._listeners: dict[Listener, str | int] = {}
        """Listeners, with the caller of each."""

    async def run(self) -> None:
        """Follow the trail until it is cancelled."""
        lines = RECENT
        while True:
            try:
                with our_errors():
                    async for record in self._upstream.records(lines):
                        self._take(record)
            except IsolatorError as error:
                self.problem = str(error)
                self.notify("trail")
            lines, self.first = 0, 0  # what is behind the fault is followed as another trail
            await asyncio.sleep(_RETRY)

    def _take(self, record: Recorded) -> None:
        self.first = self.first or record.seq
        self.last, self.head = record.seq, record.hash
        kind = record.type
        if kind == AuditSeal.TYPE:
            self.seal = record
            self.notify("trail")
        elif kind in (Resources.TYPE, ExecEnded.TYPE) and record.plugin is not None:
            if record.plugin not in self._usage and len(self._usage) >= PLUGINS:
                del self._usage[next(iter(self._usage))]
            points, data = self._usage.setdefault(record.plugin, deque(maxlen=POINTS)), record.data
            if kind == ExecEnded.TYPE:
                data = by_invocation(data, _POINT.unpack(points[-1])[1] if points else 0.0)
            points.append(_POINT.pack(seconds_of(record.time), *(_number(data.get(key)) for key in USED)))
            self.notify("usage")
        elif kind in TYPES:
            line = record.line.encode()
            found = parse(line) if len(line) <= LONGEST else None
            if found is not None and refused(found):
                self._denials.append((found.plugin, line))
                self.notify("denials")
        if kind in invocations.TYPES:
            self.invocations.take(kind, record.plugin, record.run, record.data)
        self.notify(kind.partition(".")[0])

    def denials(self, plugin: str | None = None) -> Iterator[Record]:
        """The denials of a plugin, or of all, oldest first."""
        return self._parsed([line for name, line in self._denials if plugin in (None, name)])

    def newest_denials(self, count: int) -> list[Record]:
        """The last denials, the newest first."""
        return list(self._parsed([line for _, line in itertools.islice(reversed(self._denials), count)]))

    @staticmethod
    def _parsed(lines: list[bytes]) -> Iterator[Record]:
        return (record for line in lines if (record := parse(line)) is not None)

    def denied(self) -> Counter[str]:
        """How many denials are kept of each plugin."""
        return Counter(name for name, _ in self._denials if name is not None)

    def usage(self, plugin: str) -> list[tuple[float, dict[str, float]]]:
        """Points of the charts of a plugin: Unix time and figures."""
        points = (_POINT.unpack(packed) for packed in self._usage.get(plugin, ()))
        return [
            (at, {key: value for key, value in zip(USED, figures, strict=True) if not math.isnan(value)})
            for at, *figures in points
        ]

    def listen(self, owner: str | int) -> Listener:
        """A listener of this owner, who learns which topics have changed until ``forget``.

        Raises UnavailableError for one too many.
        """
        of_one = sum(one == owner for one in self._listeners.values())
        if of_one >= LISTENERS_OF_ONE or len(self._listeners) >= LISTENERS:
            why = f"{max(of_one, len(self._listeners))} pages follow"
            raise UnavailableError("live view", why, "close one of them")
        listener = Listener()
        self._listeners[listener] = owner
        return listener

    def forget(self, listener: Listener) -> None:
        """Tell a listener no more."""
        self._listeners.pop(listener, None)

    def notify(self, topic: str) -> None:
        """Tell every listener that a topic has changed."""
        for listener in self._listeners:
            listener.add(topic)


def _number(value: object) -> float:
    return float(value) if isinstance(value, (int, float)) else math.nan


class Listener:
    """Topics that have changed since they were taken; at most a set of a dozen words waits for a slow page."""

    def __init__(self) -> None:
        self._topics: set[str] = set()
        self._changed, self._urgent = asyncio.Event(), asyncio.Event()

    def add(self, topic: str) -> None:
        self._topics.add(topic)
        self._changed.set()
        if topic in URGENT:
            self._urgent.set()

    async def rest(self) -> None:
        """Wait until the next notice may be sent."""
        await asyncio.sleep(URGENT_BEAT)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(BEAT - URGENT_BEAT):
                await self._urgent.wait()

    async def take(self, patience: float) -> list[str]:
        """Wait for changes, no longer than ``patience`` seconds; returns the topics, none after a quiet time."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(patience):
                await self._changed.wait()
        self._changed.clear()
        self._urgent.clear()
        topics, self._topics = sorted(self._topics), set()
        return topics
