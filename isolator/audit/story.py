"""Everything one event caused, as a timeline a person reads in a terminal of 80 columns."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from datetime import datetime
from pathlib import Path
from typing import Any

from isolator.audit.reader import Query, query
from isolator.audit.record import Record
from isolator.audit.text import printable, value_text

WIDTH = 80
_STARTS = ("plugin.started", "plugin.crashed", "plugin.failed", "plugin.stopped")
_WHAT = 15


def _endpoint(data: dict[str, Any]) -> str:
    """``name (address:port)``, as far as known."""
    address, port = data.get("address"), data.get("port")
    place = value_text(str(address)) if address else ""
    if ":" in place:
        place = f"[{place}]"
    if port is not None:
        place += f":{value_text(port)}"
    name = data.get("name")
    return f"{value_text(name, 120)} ({place})" if name and place else value_text(name, 120) if name else place


def _times(data: dict[str, Any]) -> str:
    count = data.get("count")
    return f", {count} times" if isinstance(count, int) and count > 1 else ""


def _ms(data: dict[str, Any], field: str) -> str:
    value = data.get(field)
    return f"{value / 1000:.1f} ms" if isinstance(value, (int, float)) else ""


def _listed(*parts: str) -> str:
    return ", ".join(part for part in parts if part)


def _given(data: dict[str, Any], field: str, form: str = "{}", limit: int = 120) -> str:
    value = data.get(field)
    return "" if value is None else form.format(value_text(value, limit))


_TELL: dict[str, Callable[[dict[str, Any]], str]] = {
    "event.accepted": lambda d: _listed(
        _given(d, "event"), _given(d, "subject"), _given(d, "bytes", "{} bytes"), _given(d, "by", "by {}")
    ),
    "event.dispatched": lambda d: _listed(
        _given(d, "attempt", "attempt {}"),
        _given(d, "request_bytes", "{} bytes"),
        f"queued {_ms(d, 'queued_us')}" if _ms(d, "queued_us") else "",
    ),
    "event.response": lambda d: _listed(
        _given(d, "outcome"),
        _given(d, "status", "status {}") if d.get("status") != d.get("outcome") else "",
        f"after {_ms(d, 'latency_us')}" if _ms(d, "latency_us") else "",
        _given(d, "detail"),
        _given(d, "response"),
    ),
    "event.dead": lambda d: _listed(_given(d, "reason"), _given(d, "attempts", "{} attempts")),
    "plugin.started": lambda d: _listed(_given(d, "reason"), _given(d, "pid", "pid {}"), _given(d, "uid", "uid {}")),
    "net.query": lambda d: f"{_given(d, 'type')} {_given(d, 'name')} {_given(d, 'verdict')}{_times(d)}",
    "net.connect": lambda d: _endpoint(d) + _given(d, "rule", " by {}"),
    "net.denied": lambda d: _endpoint(d) + _given(d, "rule", " by {}") + _times(d),
    "net.closed": lambda d: _listed(
        _endpoint(d),
        _given(d, "sent", "{} bytes out"),
        _given(d, "received", "{} in"),
        _given(d, "duration_ms", "{} ms"),
        _given(d, "reason"),
    ),
    "syscall.denied": lambda d: _given(d, "call") + _times(d),
    "fs.denied": lambda d: _given(d, "path") + _times(d),
    "api.called": lambda d: f"{_given(d, 'method')} {_given(d, 'verdict')}",
}
# For these, and for types not known here, the fields as they are.
_FIELDS = {
    "plugin.crashed": ("cause", "exit_code", "signal", "reason", "uptime"),
    "plugin.stopped": ("cause", "exit_code", "signal", "uptime"),
    "plugin.failed": ("reason",),
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
    # In the file they are in the order of arrival; by their own times a query comes before the reply that it delayed.
    return sorted(found, key=lambda pair: (pair[1].time, pair[1].seq))


def tell(event_id: str, records: list[Record], width: int = WIDTH) -> Iterator[str]:
    """The lines of the story, ``width`` columns at most; times are milliseconds since the first record."""
    begin = _moment(records[0])
    plugins = list(dict.fromkeys(r.plugin for r in records if r.plugin))
    letters = {name: chr(ord("A") + i) if i < 26 else "?" for i, name in enumerate(plugins)}
    yield _fit(f"{printable(event_id)}  {records[0].time[:23].replace('T', ' ')} UTC", width)
    yield _fit(f"  {_summary(records)}", width)
    for name, letter in letters.items():
        yield _fit(f"  {letter}  {printable(name)}", width)
    shared = False
    for record in records:
        elapsed = (_moment(record) - begin) * 1000
        among = record.event_id is None and event_id in record.data.get("event_ids", ())
        shared |= among
        lead = f"{elapsed:+9.1f} {letters.get(record.plugin or '', ' ')}{'*' if among else ' '}"
        yield from _wrap(lead, f"{printable(record.type.replace('event.', '', 1)):<{_WHAT}} {_details(record)}", width)
    if shared:
        yield "* several events were in flight: this one or another of them"


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
    tell = _TELL.get(record.type)
    if tell is not None:
        return tell(record.data)
    names = _FIELDS.get(record.type) or tuple(k for k in record.data if k not in ("event_ids", "delivery_ids"))
    return " ".join(
        f"{printable(str(name))}={value_text(record.data[name], 120)}"
        for name in names
        if record.data.get(name) is not None
    )


def _wrap(lead: str, text: str, columns: int) -> Iterator[str]:
    """Break at spaces; what follows is indented to the second column."""
    width, words = columns - len(lead) - 1, text.split(" ")
    line = words[0]
    for word in words[1:]:
        if len(line) + 1 + len(word) > width and line.strip():
            yield _fit(f"{lead} {line}", columns)
            lead, line = " " * len(lead), " " * (_WHAT + 1) + word
        else:
            line += f" {word}"
    yield _fit(f"{lead} {line}", columns)


def _fit(line: str, width: int) -> str:
    line = line.rstrip()
    return line if len(line) <= width else f"{line[: width - 3]}..."
