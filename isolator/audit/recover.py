"""The end of the chain on disk, where a restarted writer continues, and how the last writer ended.

Two sources are compared: the live file from its last seal on, and ``head.json``, in which the writer noted its last
record after each commit (in the key's directory, out of everybody's reach). The note is never ahead of the disk:

- The file ends in bytes that are no whole record, and the note does not know more: a writer was killed or lost
  power in the middle of a write. None of it had been acknowledged. The bytes are cut off, and a record says so.
- The note knows records that the file lacks or has otherwise: somebody changed the trail. Nothing is touched; the
  chain goes on from the *note*, so verification names the place for ever, and a record says so at once.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
from pathlib import Path

from isolator.audit import schema
from isolator.audit.files import LIVE, begun, first_line, hash_of, last_line, prev_of, rotated, seq_of
from isolator.audit.record import GENESIS, Incoming, Record, own_hash_fits, parse
from isolator.base.structs import field, struct_class
from isolator.linux.files import read_plain

HEAD_NAME = "head.json"
_HEAD_MOST = 4096
_SEAL_MARK = f'"type":"{schema.AuditSeal.TYPE}","origin":"{schema.AUDIT}"'.encode()
_SEAL_BEGIN = re.compile(rb'\{"seq":[1-9][0-9]{0,17},"time":"[^"]*",' + re.escape(_SEAL_MARK))
"""Beginning of a seal's line. The mark alone proves nothing: an object in the ``data`` of any record may spell it."""
_DELIVERY_MARKS = tuple(
    f'"type":"{kind.TYPE}"'.encode()
    for kind in (schema.EventDispatched, schema.EventResponse, schema.ToolStarted, schema.ToolCalled)
)
_WINDOW = 4 << 20


@struct_class(frozen=True)
class Head:
    """The last record that is durably on disk."""

    seq: int
    hash: str


@struct_class()
class ChainEnd:
    """End of the chain on disk: the next record continues here."""

    seq: int = 0
    hash: str = GENESIS
    sealed: int = 0
    """The last ``seq`` that a seal covers."""
    first: int = 1
    """The first ``seq`` of the live file."""
    size: int = 0
    """Bytes of the live file that are kept."""
    origins: dict[str, str] = field(default_factory=dict)
    """By source, session and number of its last record in the trail."""
    runs: dict[str, str] = field(default_factory=dict)
    """By run that was begun and has no end in the trail, its plugin."""
    deliveries: list[Incoming] = field(default_factory=list)
    """The last dispatches and responses, in order."""
    begun: float = 0.0
    """Unix time of the live file's first record."""
    newline_missing: bool = False
    stopped: bool = True
    """Whether the last record but the trail's own is ``host.stopped``; true of an empty trail."""


def read_head(path: Path) -> Head | None:
    """The writer's note of its last record; None when it is missing or unreadable as such."""
    try:
        value = json.loads(read_plain(path, most=_HEAD_MOST))
        seq, digest = value["seq"], value["hash"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None
    return Head(seq, digest) if isinstance(seq, int) and isinstance(digest, str) else None


def recover(fd: int, directory: Path, head: Head | None, notes: list[schema.AuditGap]) -> ChainEnd:
    """Read the end of the trail; cuts a torn end off the live file ``fd`` (open for reading and writing).

    Faults are added to ``notes``, to be recorded. More than one torn line is kept beside the trail, as
    ``audit.cut.SEQ``. Raises OSError.
    """
    end = ChainEnd()
    files = rotated(directory)
    before = last_line(files[-1]) if files else None
    if before is not None:
        _advance(end, before)
    size = os.fstat(fd).st_size
    end.first = end.seq + 1
    # Records of a killed writer may be in the page cache only; they count as written from here on.
    os.fdatasync(fd)
    known: dict[int, str] = {}
    start, data, scan_from = _tail(fd, size)
    good = start + scan_from
    for line in data[scan_from:].split(b"\n")[:-1]:
        seq = seq_of(line)
        if seq is None or not own_hash_fits(line) or parse(line) is None:
            break
        if known and (seq != end.seq + 1 or prev_of(line) != end.hash):
            break
        if not known and start + scan_from == 0 and before is not None and prev_of(line) != end.hash:
            notes.append(schema.AuditGap(count=0, why="the live file does not continue the file before it"))
        _advance(end, line)
        known[seq] = end.hash
        good += len(line) + 1
    if size:
        end.first = seq_of(first_line(directory / LIVE)) or end.first
        # A time that cannot be read counts as old: then a new file is begun, which harms nothing.
        end.begun = begun(directory / LIVE)
    _collect_deliveries(end, data[: good - start])
    end.stopped = _ends_with_a_stop(data[: good - start])
    end.size = size
    rest = data[good - start :]
    if head is not None and (head.seq > end.seq or known.get(head.seq, head.hash) != head.hash):
        _resume_at_head(end, head, notes)
        end.newline_missing = bool(rest) and not rest.endswith(b"\n")
        return end
    if rest:
        _cut_off(end, fd, good, rest, directory, notes)
    if head is None and end.seq:
        why = "the writer's note of its last record was missing: only seals vouch for what is before"
        notes.append(schema.AuditGap(count=0, why=why))
    return end


def _tail(fd: int, size: int) -> tuple[int, bytes, int]:
    """The last part of the file that holds a seal: its offset, its bytes, and where in it the last seal begins."""
    window = _WINDOW
    while True:
        start = max(0, size - window)
        data = _read(fd, start, size - start)
        if start:
            skip = data.find(b"\n") + 1
            start, data = start + skip, data[skip:]
        begin = _last_seal(data)
        if begin is not None:
            return start, data, begin
        if size - window <= 0:
            return start, data, 0
        window *= 4


def _last_seal(data: bytes) -> int | None:
    """The offset of the last line that is a seal, of whole lines."""
    end = len(data)
    while (at := data.rfind(_SEAL_MARK, 0, end)) >= 0:
        end = data.rfind(b"\n", 0, at) + 1
        if _SEAL_BEGIN.match(data, end):
            return end
    return None


def _read(fd: int, offset: int, length: int) -> bytes:
    parts = []
    while length > 0 and (part := os.pread(fd, length, offset)):
        parts.append(part)
        offset, length = offset + len(part), length - len(part)
    return b"".join(parts)


def _advance(end: ChainEnd, line: bytes) -> None:
    record = parse(line)
    if record is None:
        return
    end.seq, end.hash = record.seq, hash_of(line)
    if record.type == schema.AuditSeal.TYPE:
        end.sealed = record.seq - 1
        origins = record.data.get("origins")
        if isinstance(origins, dict):
            end.origins = {str(name): str(last) for name, last in origins.items()}
        runs = record.data.get("runs")
        if isinstance(runs, dict):
            end.runs = {str(run): str(plugin) for run, plugin in runs.items()}
    elif ":" in record.origin:
        source, _, number = record.origin.partition(":")
        end.origins[source] = number
    if record.type in OF_RUNS:
        follow_run(end.runs, record.type, record.plugin, record.run)


_BEGINS = frozenset({schema.PluginStarted.TYPE, schema.ExecStarted.TYPE, schema.RunStarted.TYPE})
_ENDS = frozenset({schema.PluginStopped.TYPE, schema.PluginCrashed.TYPE, schema.ExecEnded.TYPE, schema.RunEnded.TYPE})

OF_RUNS = _BEGINS | _ENDS
"""Types of records by which a run begins or ends."""


def follow_run(runs: dict[str, str], kind: str, plugin: str | None, run: str | None) -> None:
    """Update ``runs``, those without an end, with one more record of ``OF_RUNS``."""
    if run is None:
        return
    if kind in _BEGINS and plugin is not None:
        runs[run] = plugin
    elif kind in _ENDS:
        runs.pop(run, None)


def _collect_deliveries(end: ChainEnd, data: bytes) -> None:
    for line in data.split(b"\n"):
        if any(mark in line for mark in _DELIVERY_MARKS):
            record = parse(line)
            if record is not None:
                end.deliveries.append(_replayed(record))


def _ends_with_a_stop(data: bytes) -> bool:
    for line in reversed(data.split(b"\n")):
        record = parse(line)
        if record is not None and not record.type.startswith("audit."):
            return record.type == schema.HostStopped.TYPE
    return True


def _replayed(record: Record) -> Incoming:
    # The monotonic times are not on disk: a dispatched event has always been in flight, an answered one ends now.
    return Incoming(
        record.time,
        record.type,
        record.plugin,
        record.run,
        record.event_id,
        record.delivery_id,
        happened=0 if record.type == schema.EventDispatched.TYPE else None,
    )


def _resume_at_head(end: ChainEnd, head: Head, notes: list[schema.AuditGap]) -> None:
    missing = max(0, head.seq - end.seq)
    notes.append(
        schema.AuditGap(
            count=missing,
            why="the trail was cut or changed while nobody wrote it"
            if missing
            else "the end of the trail was rewritten while nobody wrote it",
            found={"seq": end.seq, "hash": end.hash},
            written={"seq": head.seq, "hash": head.hash},
        )
    )
    end.seq, end.hash = head.seq, head.hash
    end.sealed = min(end.sealed, head.seq)


def _cut_off(end: ChainEnd, fd: int, good: int, rest: bytes, directory: Path, notes: list[schema.AuditGap]) -> None:
    gap = schema.AuditGap(
        count=1,
        why="torn last record: its writer died in the middle of writing it",
        bytes=len(rest),
        sha256=hashlib.sha256(rest).hexdigest(),
        text=rest[:1024].decode("ascii", "replace"),
    )
    if b"\n" in rest:
        kept = directory / f"audit.cut.{end.seq + 1:012d}"
        with contextlib.suppress(FileExistsError), kept.open("xb") as file:
            file.write(rest)
            os.fsync(file.fileno())
        count, why = rest.count(b"\n") + 1, "the end of the file was no chain of records"
        gap = schema.AuditGap(**{**gap.data, "count": count, "why": why, "kept": kept.name})
    os.ftruncate(fd, good)
    os.fdatasync(fd)
    end.size = good
    notes.append(gap)
