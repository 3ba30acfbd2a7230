"""Records as text for a terminal.

What a plugin wrote reaches the operator's terminal only through ``printable``: control characters and escape
sequences, bidirectional and invisible characters, and scripts that run right to left (they would reorder the rest of
the line) are shown as escapes. Values that could be taken for other fields are quoted. A line is always one record.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from isolator.audit.schema import AuditSeal
from isolator.errors import printable

if TYPE_CHECKING:  # the supervisor shows text, and parses no record
    from isolator.audit.record import Record

_MAX_VALUE = 300


def value_text(value: Any, limit: int = _MAX_VALUE) -> str:
    """One value, printable, on one line; quoted where its extent would be in doubt."""
    if isinstance(value, str):
        text = value
        if not text or any(c in text for c in ' "=\\') or not text.isprintable():
            text = json.dumps(text, ensure_ascii=False)
    elif isinstance(value, list) and all(isinstance(i, (str, int)) for i in value):
        text = ",".join(value_text(i, limit) for i in value) or "-"
    else:
        text = json.dumps(value, ensure_ascii=False, separators=(",", ":"))
    shown = printable(text)
    return shown if len(shown) <= limit else f"{shown[: limit - 3]}..."


def record_text(record: Record) -> str:
    """A record on one line: time, number, type, plugin, event, and what the type has to say."""
    who = printable(record.plugin or "-")
    parts = [f"{record.time[:10]} {record.time[11:23]}", f"{record.seq:>6}", f"{printable(record.type):<18}", who]
    if record.event_id:
        parts.append(f"event_id={value_text(record.event_id)}")
    # Of a seal, what it covers; the signature is for verifiers.
    names = ("from", "to", "key") if record.type == AuditSeal.TYPE else record.data
    shown = ((name, record.data.get(name)) for name in names)
    parts += [f"{printable(str(name))}={value_text(value)}" for name, value in shown if value is not None]
    if record.cut:
        parts.append("(cut)")
    return " ".join(parts)
