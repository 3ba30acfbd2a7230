"""Calls of tools that a killed host process has left without an end in the trail."""

from __future__ import annotations

import re
from datetime import datetime, timedelta
from pathlib import Path

from host.wire import mcp as protocol
from isolator.audit import reader
from isolator.audit.record import Record, parse
from isolator.audit.schema import HOST, ToolCalled, ToolStarted

_LONGEST = timedelta(seconds=5 * protocol.PATIENCE)
"""A call is under way for less: it has its time to be answered, and at each exchange of the host to be asked for."""
_MOST = 256 << 20
"""Bytes of the trail that are read, from its end."""
_begin = re.compile(rf'\{{"seq":[0-9]+,"time":"([^"]+)","type":"([^"]+)","origin":"{HOST}:([0-9a-f]+):'.encode()).match
_TYPES = frozenset(kind.TYPE.encode() for kind in (ToolStarted, ToolCalled))


def unended(trail: Path, session: str) -> list[Record]:
    """The ``tool.started`` records without a ``tool.called``, oldest first, but for those of this host's ``session``.

    That is in the origin of all records of a host process, and of the processes that take its place.
    """
    ended: set[str | None] = set()
    found: list[Record] = []
    since, left = b"", _MOST
    for line in reader.backwards(trail):
        left -= len(line)
        begin = _begin(line)
        if left < 0 or (begin is not None and begin[1] < since):
            break
        if begin is None or begin[3] == session.encode():
            continue
        if not since:
            newest = datetime.fromisoformat(begin[1].decode())
            since = (newest - _LONGEST).strftime("%Y-%m-%dT%H:%M:%S").encode()
        if begin[2] in _TYPES and (record := parse(line)) is not None:
            if record.type == ToolCalled.TYPE:
                ended.add(record.event_id)
            elif record.event_id not in ended:
                found.append(record)
    return found[::-1]


def end_of(started: Record) -> ToolCalled:
    """The record of the end of such a call: of what it has done nobody knows."""
    since = datetime.now(tz=datetime.fromisoformat(started.time).tzinfo) - datetime.fromisoformat(started.time)
    return ToolCalled(
        **started.data, outcome="unknown", detail="the host process that awaited its answer was killed",
        latency_us=max(0, since // timedelta(microseconds=1)),
    )  # fmt: skip
