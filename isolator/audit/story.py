"""The story of one event for a terminal of 80 columns: first how it ended, then everything that it caused.

    evt-1  deploy.completed of project-7
      accepted 2026-11-23 07:03:32.345 UTC by uid:61999
      A  slack-deploy-notifier: ok at the first attempt, 7.7 ms after; 1 connection denied

Text of plugins is quoted, text of the daemon is not.
"""

from __future__ import annotations

import json
import re
import textwrap
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from isolator.audit import schema
from isolator.audit.failures import failure
from isolator.audit.reader import Query, query
from isolator.audit.record import Record
from isolator.audit.text import value_text
from isolator.base.structs import struct_class
from isolator.errors import printable

WIDTH = 80
_SLACK = 3600.0
"""Seconds: a record of the event may be older than that by the clock, which was set meanwhile."""
_STARTS = (schema.PluginStarted.TYPE, schema.PluginCrashed.TYPE, schema.PluginFailed.TYPE, schema.PluginStopped.TYPE)
_WHAT = 15
_REPLY = 240
_BAD = (".denied", ".crashed", ".failed", ".dead", ".quarantined")
_GIVEN_UP = frozenset({"dead", "expired", "quarantined"})
_GIVING_UP = (
    schema.EventDead.TYPE, schema.EventQuarantined.TYPE, schema.EventSkipped.TYPE, schema.EventCancelled.TYPE,
)  # fmt: skip
Deliveries = Sequence[Mapping[str, Any]]
_SENTENCE = re.compile(r"[\w ,.;:()/'-]*", re.ASCII)


@struct_class(frozen=True)
class Line:
    """One line of a story; ``bad``: of something that went wrong or was denied."""

    text: str
    bad: bool = False
    seq: int | None = None
    """The record that it tells of, if it is one."""


def _endpoint(data: dict[str, Any]) -> str:
    """``name (address:port)``, as far as known."""
    address, port = data.get("address"), data.get("port")
    place = value_text(str(address)) if address else ""
    if ":" in place:
        place = f"[{place}]"
    if port is not None:
        place += f":{value_text(port)}"
    name = data.get("name")
    return f"{value_text(name, 260)} ({place})" if name and place else value_text(name, 260) if name else place


def _times(data: dict[str, Any]) -> str:
    count = data.get("count")
    return f", {count} times" if isinstance(count, int) and count > 1 else ""


def _ms(data: dict[str, Any], field: str, form: str) -> str:
    value = data.get(field)
    return form.format(_span(value / 1e6)) if isinstance(value, (int, float)) and value >= 0 else ""


def _span(seconds: float) -> str:
    if seconds < 10:
        return f"{seconds * 1000:.1f} ms"
    for limit, size, unit in ((120, 1, "s"), (7200, 60, "min"), (172800, 3600, "h")):
        if seconds < limit:
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds / 86400:.1f} d"


def _listed(*parts: str) -> str:
    return ", ".join(part for part in parts if part)


def _field(data: dict[str, Any], field: str, form: str = "{}", limit: int = 120) -> str:
    value = data.get(field)
    return "" if value is None else form.format(value_text(value, limit))


def _sentence(data: dict[str, Any], field: str) -> str:
    """A sentence of the daemon's, quoted only if it holds foreign characters."""
    value = data.get(field)
    plain = isinstance(value, str) and value and _SENTENCE.fullmatch(value)
    return str(value)[:300] if plain else _field(data, field, limit=300)


def _bytes(data: dict[str, Any], field: str, way: str = "") -> str:
    count = data.get(field)
    return f"{count} byte{'' if count == 1 else 's'}{way}" if isinstance(count, int) else ""


def _attempts(count: Any) -> str:
    return f"{count} attempt{'' if count == 1 else 's'}" if isinstance(count, int) else ""


def _reply(data: dict[str, Any]) -> str:
    """The plugin's answer: of a JSON-RPC reply its result or error."""
    text = data.get("response")
    if not isinstance(text, str) or not text:
        return ""
    try:
        reply = json.loads(text)
        body = next(reply[key] for key in ("result", "error") if reply.get(key) is not None)
    except (ValueError, AttributeError, StopIteration, RecursionError):
        shown = printable(text)
    else:
        shown = printable(json.dumps(body, ensure_ascii=True))
    # It goes on to the end of its record, so that it needs no quotes.
    return f"reply {shown if len(shown) <= _REPLY else shown[: _REPLY - 3] + '...'}"


def _ended(data: dict[str, Any]) -> str:
    """The end of a run."""
    if data.get("cause") not in ("exit", "signal", None):
        how = _sentence(data, "cause")
    else:
        how = _field(data, "signal", "killed by signal {}") or _field(data, "exit_code", "exit code {}")
    uptime = data.get("uptime")
    words = data.get("stderr")
    return _listed(
        how,
        f"after {_span(uptime)}" if isinstance(uptime, (int, float)) else "",
        f"{forks} forks refused (tasks)" if isinstance(forks := data.get("task_denials"), int) and forks > 0 else "",
        _sentence(data, "reason"),
        f"last words {value_text(str(words[-1]))}" if isinstance(words, list) and words else "",
    )


_DETAILS: dict[str, Callable[[dict[str, Any]], str]] = {
    schema.EventAccepted.TYPE: lambda d: _listed(
        _field(d, "event"),
        _field(d, "subject"),
        _bytes(d, "bytes"),
        _field(d, "by", "by {}"),
        "recorded later" if "accepted_at" in d else "",
    ),
    schema.EventDispatched.TYPE: lambda d: _listed(
        _field(d, "attempt", "attempt {}"), _bytes(d, "request_bytes"), _ms(d, "queued_us", "queued {}")
    ),
    schema.EventResponse.TYPE: lambda d: _listed(
        _field(d, "outcome"),
        _field(d, "status", "status {}") if d.get("status") != d.get("outcome") else "",
        _ms(d, "latency_us", "after {}"),
        _field(d, "detail"),
        _reply(d),
    ),
    schema.ToolStarted.TYPE: lambda d: _listed(_field(d, "tool"), _field(d, "uid", "by uid {}")),
    schema.ToolCalled.TYPE: lambda d: _listed(
        _field(d, "tool"), _field(d, "outcome"), _ms(d, "latency_us", "after {}"), _field(d, "detail")
    ),
    schema.EventDead.TYPE: lambda d: _listed("given up", _sentence(d, "reason"), _attempts(d.get("attempts"))),
    schema.EventQuarantined.TYPE: lambda d: _listed(_sentence(d, "reason"), _attempts(d.get("attempts"))),
    schema.EventReplayed.TYPE: lambda d: _listed(_field(d, "by", "by {}"), _attempts(d.get("attempts")) + " before"),
    schema.EventRetried.TYPE: lambda d: _listed(
        _field(d, "by", "at once, by {}"), _attempts(d.get("attempts")) + " before"
    ),
    schema.EventSkipped.TYPE: lambda d: _listed(_field(d, "by", "by {}"), _attempts(d.get("attempts")) + " before"),
    schema.EventCancelled.TYPE: lambda d: _listed(_field(d, "by", "by {}"), _attempts(d.get("attempts")) + " before"),
    schema.PluginStarted.TYPE: lambda d: _listed(
        _sentence(d, "reason"), _field(d, "pid", "pid {}"), _field(d, "uid", "uid {}")
    ),
    schema.PluginCrashed.TYPE: _ended,
    schema.PluginStopped.TYPE: _ended,
    schema.PluginFailed.TYPE: _ended,
    schema.NetQuery.TYPE: lambda d: (
        f"{_field(d, 'name', limit=260)} ({_field(d, 'type')}) {_field(d, 'verdict')}{_times(d)}"
        + (f", {why}" if (why := failure(schema.NetQuery.TYPE, d)) else "")
    ),
    schema.NetConnect.TYPE: lambda d: (
        _listed(_endpoint(d), f"failed, {why}") + _times(d)
        if (why := failure(schema.NetConnect.TYPE, d))
        else _endpoint(d) + _field(d, "rule", " by {}")
    ),
    schema.NetDenied.TYPE: lambda d: _endpoint(d) + _field(d, "rule", " by {}") + _times(d),
    schema.NetClosed.TYPE: lambda d: _listed(
        _endpoint(d),
        _bytes(d, "sent", " out"),
        _bytes(d, "received", " in"),
        _field(d, "duration_ms", "{} ms"),
        _field(d, "reason"),
    ),
    schema.SyscallDenied.TYPE: lambda d: _field(d, "call") + _times(d),
    schema.FsDenied.TYPE: lambda d: _listed(_field(d, "path"), _sentence(d, "why")) + _times(d),
    schema.ApiCalled.TYPE: lambda d: f"{_field(d, 'method')} {_field(d, 'verdict')}" + _field(d, "permission", " ({})"),
}
_DENIED = {schema.NetDenied.TYPE: "connection", schema.SyscallDenied.TYPE: "call", schema.FsDenied.TYPE: "path"}
_FAILED = {schema.NetConnect.TYPE: "connection", schema.NetQuery.TYPE: "lookup"}


def collect(directory: Path, event_id: str, *, since: float = 0.0) -> list[tuple[bytes, Record]]:
    """The records of an event, and the starts and ends of its plugins while it was on its way.

    ``since``: Unix time at which it was accepted, for whoever knows it; files from before need not be read.
    """
    begin = datetime.fromtimestamp(max(0.0, since - _SLACK), UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ")
    wanted = Query(event=event_id, since=begin)
    found = [pair for pair in query(directory, wanted) if event_id in pair[1].events]
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


def story_lines(
    event_id: str, records: list[Record], width: int = WIDTH, deliveries: Deliveries | None = None
) -> Iterator[Line]:
    """The lines of the story, ``width`` columns at most; times count from the first record.

    ``deliveries``, as ``event.show`` has them, say what the records of this host cannot: that another host of a cluster
    has the delivery. None: nobody could be asked.
    """
    known = {str(one["plugin"]): one for one in deliveries or ()}
    begin = _moment(records[0])
    origin = next((record for record in records if record.type == schema.EventAccepted.TYPE), None)
    accepted = origin.data if origin is not None else {}
    listed = accepted.get("plugins")
    named = [str(name) for name in listed] if isinstance(listed, list) else []
    elsewhere = (name for name, one in known.items() if one["host"])
    plugins = list(dict.fromkeys([*(r.plugin for r in records if r.plugin), *named, *elsewhere]))
    letters = {name: chr(ord("A") + i) if i < 26 else "?" for i, name in enumerate(plugins)}
    what = f"  {_field(accepted, 'event')}" + _field(accepted, "subject", " of {}") if accepted else ""
    yield from _wrap("", f"{printable(event_id)}{what}", width)
    late = accepted.get("accepted_at")  # by the host's own word, and of the form of a record's time
    at = late if isinstance(late, str) else (origin or records[0]).time
    when = f"{printable(at[:23]).replace('T', ' ')} UTC"
    yield Line(_fit(f"  accepted {when}{_field(accepted, 'by', ' by {}')}" if accepted else f"  {when}", width))
    for name, letter in letters.items():
        mine = [record for record in records if record.plugin == name]
        text, bad = _verdict(mine, begin, event_id, known.get(name))
        yield from _wrap(f"  {letter} ", f"{printable(name)}: {text}", width, hang=2, bad=bad)
    shared = False
    for record in records:
        among = record.event_id is None and event_id in record.data.get("event_ids", ())
        shared |= among
        lead = f"{'+' + _span(max(0.0, _moment(record) - begin)):>10} "
        lead += f"{letters.get(record.plugin or '', ' ')}{'*' if among else ' '}"
        text = f"{printable(record.type.removeprefix('event.')):<{_WHAT}} {_details(record)}"
        bad = record.type.endswith(_BAD) or failure(record.type, record.data) is not None
        yield from _wrap(lead, text, width, bad=bad, seq=record.seq)
    if shared:
        yield Line("* several events were in flight: this one or another of them")


def _moment(record: Record) -> float:
    return datetime.fromisoformat(record.time).timestamp()


def _standing(delivery: Mapping[str, Any], event_id: str) -> tuple[str, bool]:
    """A delivery that this host's records do not tell the end of, as the daemon knows it; and whether that is bad."""
    state, detail, host = (printable(str(delivery[key] or "")) for key in ("state", "detail", "host"))
    if host:
        text = f"{state} {detail or f'on {host}'}"
        return f"{text}; its records are there: isolator audit story {event_id} on {host}", state in _GIVEN_UP
    text = "not sent yet" if state == "queued" else state
    return text + (f": {detail}" if detail else ""), state in _GIVEN_UP


def _verdict(
    records: list[Record], begin: float, event_id: str, delivery: Mapping[str, Any] | None
) -> tuple[str, bool]:
    """The outcome for one plugin in a few words, and whether it is bad."""
    sent = sum(r.type == schema.EventDispatched.TYPE for r in records)
    ends = (schema.EventResponse.TYPE, *_GIVING_UP, schema.EventReplayed.TYPE, schema.EventDispatched.TYPE)
    last = next((r for r in reversed(records) if r.type in ends and r.event_id == event_id), None)
    bad = False
    called = next((r for r in reversed(records) if r.type == schema.ToolCalled.TYPE and r.event_id == event_id), None)
    if called is not None:
        bad = called.data.get("outcome") != "ok"
        text = f"{_field(called.data, 'tool')}: {_field(called.data, 'outcome', limit=20)}"
    elif last is None and any(r.type == schema.ToolStarted.TYPE for r in records):
        text = "the call is under way or was cut short"
    elif delivery is not None and (last is None or (delivery["host"] and not _is_end(last))):
        text, bad = _standing(delivery, event_id)
    elif last is None:
        text = "no request to it is on record here"
    elif last.type == schema.EventDispatched.TYPE:
        text = f"attempt {sent} is under way or was cut short"
    elif last.type == schema.EventReplayed.TYPE:
        text = "queued again"
    elif last.type in (schema.EventSkipped.TYPE, schema.EventCancelled.TYPE):
        text = f"{last.type.removeprefix('event.')} {_field(last.data, 'by', 'by {}', limit=30)}"
    elif last.type != schema.EventResponse.TYPE:
        bad = True
        reason = _sentence(last.data, "reason")
        text = ("quarantined: " if last.type.endswith("quarantined") else "given up: ") + reason
    elif last.data.get("outcome") in ("ok", "skipped"):
        which = "at the first attempt" if sent == 1 else f"at attempt {sent}"
        text = f"{last.data['outcome']} {which}, {_span(max(0.0, _moment(last) - begin))} after"
    else:
        bad = True
        text = f"{_attempts(sent)} failed, the last {_field(last.data, 'outcome', limit=20)}; to be tried again"
    denied: Counter[str] = Counter()
    failed: Counter[str] = Counter()
    for record in records:
        count = record.data.get("count", 1)
        count = count if isinstance(count, int) else 1
        if record.type in _DENIED:
            denied[_DENIED[record.type]] += count
        elif failure(record.type, record.data):
            failed[_FAILED[record.type]] += count
    for counted, how in ((denied, "denied"), (failed, "failed")):
        if counted:
            listed = _listed(*(f"{count} {kind}{'' if count == 1 else 's'}" for kind, count in counted.items()))
            text, bad = f"{text}; {listed} {how}", True
    return text, bad


def _is_end(record: Record) -> bool:
    """Whether a record is the end of a delivery."""
    answered = record.type == schema.EventResponse.TYPE and record.data.get("outcome") in ("ok", "skipped")
    return answered or record.type in _GIVING_UP


def _details(record: Record) -> str:
    details = _DETAILS.get(record.type)
    if details is not None:
        return details(record.data)
    return " ".join(
        f"{printable(str(name))}={value_text(value, 120)}"
        for name, value in record.data.items()
        if value is not None and name not in ("event_ids", "delivery_ids")
    )


def _wrap(
    lead: str, text: str, columns: int, *, hang: int = _WHAT + 1, bad: bool = False, seq: int | None = None
) -> Iterator[Line]:  # fmt: skip
    """Break at spaces, and within what is too long for a line; what follows is indented below the details."""
    space = f"{lead} " if lead else ""
    for line in textwrap.wrap(
        text, columns, initial_indent=space, subsequent_indent=" " * (len(space) + hang), break_on_hyphens=False
    ):
        yield Line(line.rstrip(), bad, seq)


def _fit(line: str, width: int) -> str:
    line = line.rstrip()
    return line if len(line) <= width else f"{line[: width - 3]}..."
