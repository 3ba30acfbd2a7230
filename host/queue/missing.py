"""Accepted events of the trail that the queue does not have: its database was damaged or restored from before."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from isolator.audit import files
from isolator.audit.record import parse
from isolator.audit.schema import EventAccepted

_MARK = f'"type":"{EventAccepted.TYPE}"'.encode()
_BLOCK = 1 << 20
_MOST = 256 << 20
"""Bytes of the trail that are read, from its end."""


@dataclass
class Missing:
    """Events of the trail beyond the queue's last number."""

    count: int = 0
    number: int = 0
    """The newest one's."""
    last: str = ""
    """The newest one's id."""


def missing(trail: Path, held: int) -> Missing:
    """Compare the end of the trail in a folder with ``held``, the number of the queue's newest event.

    The trail may lack what was accepted last, and is believed where it can be read; it never has more.
    """
    found, left = Missing(), _MOST
    try:
        for path in reversed(files.trail(trail)):
            for line in _lines_from_the_end(path, left):
                record = parse(line)
                if record is None or record.type != EventAccepted.TYPE:
                    continue
                number = record.data.get("number")
                if not isinstance(number, int) or number <= held:
                    return found
                if not found.count:
                    found.number, found.last = number, record.event_id or ""
                found.count += 1
            left -= path.stat().st_size
            if left <= 0:
                break
    except OSError:
        pass  # the trail's own trouble, which its writer reports
    return found


def _lines_from_the_end(path: Path, most: int) -> Iterator[bytes]:
    """Whole lines of a file that bear the mark, the last first."""
    with path.open("rb") as file:
        end, rest = file.seek(0, 2), b""
        while end > 0 and most > 0:
            start = max(0, end - _BLOCK)
            file.seek(start)
            block = file.read(end - start) + rest
            end, most = start, most - _BLOCK
            cut = block.find(b"\n") + 1 if start else 0
            if start and not cut:
                rest = block
                continue
            rest = block[:cut]
            for line in reversed(block[cut:].split(b"\n")):
                if _MARK in line:
                    yield line
