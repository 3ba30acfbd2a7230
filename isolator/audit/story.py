"""Everything one event caused, as a timeline a person reads in a terminal of 80 columns."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import datetime
from pathlib import Path
from typing import Any

from isolator.audit.reader import Query, query
from isolator.audit.record import Record
from isolator.audit.text import printable, value_text

WIDTH = 80
_LEAD = 10
_STARTS = ("plugin.started", "plugin.crashed", "plugin.failed", "plugin.stopped")
# Which fields tell the story, in this order; everything else is for ``query``.
_TELLING: dict[str, tuple[str, ...]] = {
    "event.accepted": ("event", "subject", "bytes", "plugins", "by"),
    "event.dispatched": ("attempt", "queued_us", "request_bytes"),
    "event.response": ("outcome", "status", "latency_us", "detail", "response_bytes", "response"),
    "event.dead": ("reason", "attempts"),
    "plugin.started": ("reason", "pid", "uid"),
    "plugin.crashed": ("cause", "exit_code", "signal", "reason", "uptime"),
    "plugin.stopped": ("cause", "exit_code", "signal", "uptime"),
    "net.query": ("name", "type", "verdict", "rule", "count"),
    "net.connect": ("name", "address", "port", "verdict", "rule"),
    "net.denied": ("name", "address", "port", "rule", "count"),
    "net.closed": ("name", "address", "port", "sent", "received", "duration_ms", "reason"),
    "syscall.denied": ("call", "count"),
    "fs.denied": ("path", "call", "count"),
    "api.called": ("method", "permission", "verdict", "latency_us"),
}


def collect(directory: Path, event_id: str) -> list[tuple[bytes, Record]]:
    """The records of an event, and the starts and ends of its plugins while it was on its way."""
    found = list(query(directory, Query(event=event_id)))
    if not found:
        return []
    plugins = {record.plugin for _, record in found if record.plugin}
    first, last = found[0][1], found[-1][1]
    around = Query(types=_STARTS, since=first.time, until=last.time)
    for line, record in query(directory, around):
        if record.plugin in plugins and first.seq < record.seq < last.seq and event_id not in record.events:
            found.append((line, record))
    return sorted(found, key=lambda pair: pair[1].seq)


def tell(event_id: str, records: list[Record], width: int = WIDTH) -> Iterator[str]:
    """The lines of the story, ``width`` columns at most; times are milliseconds since the first record."""
    begin = _moment(records[0])
    plugins = sorted({r.plugin for r in records if r.plugin})
    yield _fit(f"{printable(event_id)}  {records[0].time[:19].replace('T', ' ')}Z  {_summary(records)}", width)
    several = len(plugins) > 1
    if plugins and not several:
        yield _fit(f"plugin {printable(plugins[0])}", width)
    for record in records:
        elapsed = (_moment(record) - begin) * 1000
        what = record.type.replace("event.", "", 1)
        who = f"{printable(record.plugin or '')}: " if several and record.plugin else ""
        shared = "  (one of several events in flight)" if record.event_id is None and event_id in record.events else ""
        text = f"{who}{printable(what):<{0 if who else 15}}{_details(record)}{shared}"
        yield from _wrap(f"{elapsed:+9.1f}", text, width)


def _moment(record: Record) -> float:
    return datetime.fromisoformat(record.time).timestamp()


def _summary(records: list[Record]) -> str:
    outcomes = [str(r.data.get("outcome")) for r in records if r.type == "event.response"]
    denied = sum(r.type.endswith(".denied") for r in records)
    text = f"{len(outcomes)} attempts, last {value_text(outcomes[-1], 20)}" if outcomes else "no response yet"
    if len(outcomes) == 1:
        text = f"1 attempt, {value_text(outcomes[0], 20)}"
    return f"{text}, {denied} denied" if denied else text


def _details(record: Record) -> str:
    data: dict[str, Any] = record.data
    fields = _TELLING.get(record.type) or tuple(k for k in data if k not in ("event_ids", "delivery_ids"))
    parts = []
    for name in fields:
        value = data.get(name)
        if value is None:
            continue
        if name.endswith("_us") and isinstance(value, (int, float)):
            parts.append(f"{name[:-3]}={value / 1000:.1f}ms")
        else:
            parts.append(f"{printable(str(name))}={value_text(value, 120)}")
    return "".join(f" {part}" for part in parts)


def _wrap(lead: str, text: str, columns: int) -> Iterator[str]:
    width, words = columns - _LEAD, text.split(" ")
    line = words[0]
    for word in words[1:]:
        if len(line) + 1 + len(word) > width:
            yield _fit(f"{lead} {line}", columns)
            lead, line = " " * len(lead), f"  {word}"
        else:
            line += f" {word}"
    yield _fit(f"{lead} {line}", columns)


def _fit(line: str, width: int) -> str:
    line = line.rstrip()
    return line if len(line) <= width else f"{line[: width - 3]}..."
