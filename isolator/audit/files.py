"""The files of one trail: ``audit.jsonl`` is written, ``audit.FIRSTSEQ.jsonl`` are full.

Every full file ends with a seal, and the first record of the next file continues its chain. The name says the
``seq`` of the first record, twelve digits, so names sort in the order of the chain and a missing file shows.
"""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path
from typing import BinaryIO

from isolator.audit.record import own_hash_fits, parse

LIVE = "audit.jsonl"
_ROTATED = re.compile(r"audit\.(\d{12})\.jsonl")
_SEQ = re.compile(rb'\{"seq":([1-9][0-9]{0,17}),')
_PREV = re.compile(rb',"prev":"([0-9a-f]{64})","hash":"[0-9a-f]{64}"\}$')


def rotated_name(first: int) -> str:
    """The name of a full file whose first record is ``first``."""
    return f"audit.{first:012d}.jsonl"


def first_of(path: Path) -> int | None:
    """The ``seq`` in a full file's name; None for any other name."""
    match = _ROTATED.fullmatch(path.name)
    return int(match[1]) if match else None


def rotated(directory: Path) -> list[Path]:
    """The full files, oldest first; raises OSError."""
    with os.scandir(directory) as entries:
        return sorted(directory / e.name for e in entries if _ROTATED.fullmatch(e.name) and e.is_file())


def trail(directory: Path) -> list[Path]:
    """Every file of the trail, oldest first, the live one last; raises OSError."""
    files = rotated(directory)
    live = directory / LIVE
    return [*files, live] if live.exists() else files


def newest_first(directory: Path) -> Iterator[BinaryIO]:
    """Every file of the trail, open, the newest first; raises OSError.

    The live one that becomes a full one meanwhile comes once, and one that is deleted meanwhile does not come.
    """
    path, last = directory / LIVE, -1
    while True:
        with contextlib.suppress(FileNotFoundError), path.open("rb") as file:
            inode = os.fstat(file.fileno()).st_ino
            if inode != last:
                yield file
            last = inode
        older = [one for one in rotated(directory) if one.name < path.name]
        if not older:
            return
        path = older[-1]


def seq_of(line: bytes) -> int | None:
    """The ``seq`` at the start of a line, or None."""
    match = _SEQ.match(line)
    return int(match[1]) if match else None


def prev_of(line: bytes) -> str | None:
    """The ``prev`` at the end of a line without its newline, or None."""
    match = _PREV.search(line[-160:])
    return match[1].decode() if match else None


def hash_of(line: bytes) -> str:
    """The ``hash`` at the end of a line whose own hash fits."""
    return line[-66:-2].decode()


def first_line(path: Path) -> bytes:
    """The first line of a file without its newline; empty when there is none."""
    with path.open("rb") as file:
        return file.readline(1 << 20).rstrip(b"\n")


def begun(path: Path) -> float:
    """Unix time of the first record of a file; 0 when it cannot be read."""
    return time_of(first_line(path))


def time_of(line: bytes) -> float:
    """Unix time of the record of a line; 0 when that is none."""
    record = parse(line)
    try:
        return datetime.fromisoformat(record.time).timestamp() if record is not None else 0.0
    except ValueError:
        return 0.0


def last_line(path: Path) -> bytes | None:
    """The last line of a file that carries its own hash, without its newline."""
    with path.open("rb") as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(max(0, size - (4 << 20)))
        lines = file.read().split(b"\n")
    return next((line for line in reversed(lines) if own_hash_fits(line)), None)
