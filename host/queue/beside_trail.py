"""The queue beside the trail: accepted events that one of them has and the other lacks.

The queue lacks events when its database was damaged, or restored from before. The trail lacks the newest ones when the
host or the machine ended between an event's sync and that of its record.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

from isolator.audit import files
from isolator.audit.record import parse
from isolator.audit.schema import EventAccepted
from isolator.linux.backwards import reversed_lines

_MARK = f'"type":"{EventAccepted.TYPE}"'.encode()
_MOST = 256 << 20
"""Bytes of the trail that are read, from its end."""


@dataclass
class Compared:
    """Ends of the accepted events, of those on the trail and of those in the queue."""

    recorded: int
    """Number of the newest event that both have: the trail may be owed those behind it."""
    since: float = 0.0
    """Unix time of acceptance before which it is owed none: the trail that was read does not reach back further."""
    missing: int = 0
    """Events of the trail beyond the queue's last number."""
    number: int = 0
    """The newest one's."""
    last: str = ""
    """The newest one's id."""


def compare(trail: Path, held: int) -> Compared:
    """Compare the end of the trail in a folder with ``held``, the number of the queue's newest event.

    The trail is believed where it can be read. It may be about to get what another process has sent to its writer.
    """
    found, left = Compared(recorded=held), _MOST
    try:
        for file in files.newest_first(trail):
            for line in reversed_lines(file):
                left -= len(line)
                if left < 0:
                    break
                record = parse(line) if _MARK in line else None
                if record is None or record.type != EventAccepted.TYPE:
                    continue
                number = record.data.get("number")
                if not isinstance(number, int):
                    found.recorded = held
                    return found
                if number > held:
                    if not found.missing:
                        found.number, found.last = number, record.event_id or ""
                    found.missing += 1
                elif "accepted_at" not in record.data:  # such a record comes late, and not in the order of numbers
                    found.recorded, found.since = number, 0.0
                    return found
            file.seek(0)
            found.recorded, found.since = 0, files.time_of(file.readline(1 << 20)) or math.inf
            if left < 0:
                break
    except OSError:
        pass  # the trail's own trouble, which its writer reports
    return found
