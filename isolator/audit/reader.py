"""Reading the trail: its last records, its next ones, and those that match.

Readers open the files themselves, so nothing they do, and nothing they fail to do, is felt by the writer. They
follow a rotation by the numbers of the records: after record N comes the file whose first record is N + 1.
"""

from __future__ import annotations

import json
import os
import re
import select
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime, timedelta
from itertools import islice
from pathlib import Path

from isolator.audit import files
from isolator.audit.record import Record, own_hash_fits, parse, quoted
from isolator.errors import NotFoundError
from isolator.linux import inotify
from isolator.linux.backwards import reversed_lines
from isolator.linux.memory_search import holds

_BLOCK = 1 << 16
_SEARCHED = 1 << 20
"""Bytes of the trail that are searched at a time."""
_MAX_LINE = 4 << 20
"""Far above the longest record: a packet of escapes is not as long."""
_SLACK = timedelta(hours=1)
"""Records of different processes are in the order of arrival, not of their times; never by this much."""


def trail_files(directory: Path) -> list[Path]:
    """The files of the trail, oldest first; raises NotFoundError when there is none."""
    try:
        found = files.trail(directory)
    except FileNotFoundError:
        found = []
    if not found:
        raise NotFoundError("audit trail", f"there is none in {directory}", "start the daemon, or check --root")
    return found


def backwards(directory: Path) -> Iterator[bytes]:
    """The whole lines of the trail, newest first; raises NotFoundError when there is none."""
    trail_files(directory)
    for file in files.newest_first(directory):
        yield from reversed_lines(file)


def tail(directory: Path, count: int) -> list[bytes]:
    """The last ``count`` whole lines of the trail, oldest first."""
    return list(islice(backwards(directory), count))[::-1]


class Follower:
    """Every record after ``after``, as it is written. Waits in poll(2) and never delays the writer.

    It holds the file that it reads open until ``close``, and ``block`` bytes of it at a time.
    """

    def __init__(self, directory: Path, after: int, *, block: int = 1 << 18) -> None:
        self._directory, self._seq, self._block = directory, after, block
        self._file: int = -1
        self._at = 0
        """Where the next line begins in the file."""
        self._doubted = -1
        """The record behind which the file was read once more."""
        self._watch = inotify.Inotify()
        changes = inotify.IN_MODIFY | inotify.IN_CREATE | inotify.IN_MOVED_TO | inotify.IN_MOVED_FROM
        self._watch.watch(str(directory), changes)

    def fileno(self) -> int:
        """Readable when there may be more."""
        return self._watch.fileno()

    def close(self) -> None:
        """Release the file and the watch."""
        self._watch.close()
        if self._file >= 0:
            os.close(self._file)
            self._file = -1

    @property
    def seq(self) -> int:
        """The last record that was returned."""
        return self._seq

    def available(self, most: int = 4096) -> list[bytes]:
        """The lines that can be read now, without waiting; call again while it returns some.

        It stops at the end of the block with which there are ``most``.
        """
        self._watch.read()
        lines: list[bytes] = []
        while len(lines) < most:
            if self._file < 0 and not self._open_next():
                break
            if os.fstat(self._file).st_size < self._at:
                self._start_over()
                continue
            # What was written between a last read and the rotation is there at the second.
            whole = self._whole_lines() or ([] if self._is_current() else self._whole_lines())
            if whole:
                lines += self._new(whole)
            elif self._is_current():
                break
            else:
                os.close(self._file)
                self._file = -1
        return lines

    def _whole_lines(self) -> list[bytes]:
        """The next lines that have an end. One that has none is read again: it may be cut off and written anew."""
        data = more = os.pread(self._file, self._block, self._at)
        while more and b"\n" not in more:
            if len(data) > _MAX_LINE:
                self._at += len(data)  # no record is as long: somebody else wrote this
                data = b""
            more = os.pread(self._file, self._block, self._at + len(data))
            data += more
        *whole, rest = data.split(b"\n")
        self._at += len(data) - len(rest)
        return whole

    def _new(self, whole: list[bytes]) -> list[bytes]:
        """Those of some lines that are records after the last one.

        One that does not continue it may be the middle of what was cut off and written anew, longer than before: the
        file is then read once more behind the last record.
        """
        new = []
        for line in whole:
            seq = files.seq_of(line)
            if (seq is None or seq > self._seq + 1) and self._doubted != self._seq:
                self._doubted = self._seq
                self._start_over()
                break
            if seq is not None and seq > self._seq:
                self._seq = seq
                new.append(line)
        return new

    def wait(self, timeout: float | None = None, *also: int) -> list[int]:
        """Wait for a change or for one of the descriptors ``also`` (in error); returns those descriptors."""
        poll = select.poll()
        poll.register(self.fileno(), select.POLLIN)
        for fd in also:
            poll.register(fd, select.POLLERR | select.POLLHUP)
        return [fd for fd, _ in poll.poll(None if timeout is None else timeout * 1000) if fd != self.fileno()]

    def _is_current(self) -> bool:
        try:
            live = (self._directory / files.LIVE).stat()
        except FileNotFoundError:
            return True  # between two files
        ours = os.fstat(self._file)
        return (live.st_ino, live.st_dev) == (ours.st_ino, ours.st_dev)

    def _open_next(self) -> bool:
        while True:
            chosen = self._choose()
            try:
                file = os.open(chosen, os.O_RDONLY | os.O_CLOEXEC)
            except FileNotFoundError:
                return False
            # A rotation between choosing and opening gives the name to the next file: records would be missed.
            try:
                same = self._choose() == chosen and chosen.stat().st_ino == os.fstat(file).st_ino
            except FileNotFoundError:
                same = False
            if same:
                self._file, self._at = file, _offset_after(file, self._seq)
                return True
            os.close(file)

    def _choose(self) -> Path:
        """The file that has the next record, or will have it."""
        paths = files.trail(self._directory)
        for path, following in zip(paths, [*paths[1:], None], strict=True):
            after = files.first_of(following) if following else None
            if (after is None or after > self._seq + 1) and (files.first_of(path) is None or not self._is_done(path)):
                return path
        return self._directory / files.LIVE

    def _is_done(self, path: Path) -> bool:
        line = files.last_line(path)
        last = files.seq_of(line) if line else None
        return last is not None and last <= self._seq

    def _start_over(self) -> None:
        """Go on behind the last record that was returned: what came after it was cut off, and may be written anew."""
        self._at = _offset_after(self._file, self._seq)


def _offset_after(fd: int, seq: int) -> int:
    """The start of a line of ``fd`` before which there is no record after ``seq``: found by halving, as they ascend."""
    low, high = 0, os.fstat(fd).st_size
    while high - low > _BLOCK:
        middle = (low + high) // 2
        begin = _next_line(fd, middle)
        found = files.seq_of(os.pread(fd, 32, begin))
        if found is not None and found <= seq:
            low = begin
        else:
            high = middle
    return low


def _next_line(fd: int, offset: int) -> int:
    while data := os.pread(fd, _BLOCK, offset):
        if (at := data.find(b"\n")) >= 0:
            return offset + at + 1
        offset += len(data)
    return offset


class Continuity:
    """Check that each line continues the chain of the one before; ``seq`` and ``hash`` are the last one's."""

    def __init__(self, seq: int = 0, hash: str = "") -> None:
        self.seq, self.hash = seq, hash

    def check(self, line: bytes) -> str | None:
        """Take the next line; returns its fault, or None."""
        seq, prev, before = files.seq_of(line), files.prev_of(line), self.hash
        if seq is None or prev is None or not own_hash_fits(line):
            return "a line that is no record, or was changed after it was written"
        expected, self.seq, self.hash = self.seq + 1, seq, files.hash_of(line)
        if seq > expected and (expected > 1 or before):
            return f"records {expected} to {seq - 1} are missing: removed, or no longer kept"
        if seq < expected:
            return f"record {seq} stands after record {expected - 1}"
        if before and prev != before:
            return f"record {seq} does not continue the chain of record {expected - 1}: the trail was rewritten"
        return None


@dataclass(frozen=True)
class Query:
    """Conditions that a record must all meet.

    ``types`` may end in ``.*``; ``event`` is the beginning of an event's id; times are in the form of the trail.
    """

    plugin: str | None = None
    types: tuple[str, ...] = ()
    event: str | None = None
    since: str | None = None
    until: str | None = None

    def matches(self, record: Record) -> bool:
        """Whether a record is wanted."""
        return (
            (self.plugin is None or record.plugin == self.plugin)
            and (not self.types or any(_type_fits(record.type, wanted) for wanted in self.types))
            and (self.event is None or any(event.startswith(self.event) for event in record.events))
            and (self.since is None or record.time >= self.since)
            and (self.until is None or record.time <= self.until)
        )


def _type_fits(type: str, wanted: str) -> bool:
    return type.startswith(wanted[:-1]) if wanted.endswith(".*") else type == wanted


def query(directory: Path, wanted: Query) -> Iterator[tuple[bytes, Record]]:
    """Every matching line and its record, oldest first."""
    for line in lines(directory, wanted):
        if (record := parse(line)) is not None:
            yield line, record


def lines(directory: Path, wanted: Query) -> Iterator[bytes]:
    """Every matching line, oldest first, without its newline.

    A record's line begins with nearly all that decides, so only lines that name an event are parsed. A block of the
    trail is passed over as a whole when it lacks a text that every matching line has.
    """
    texts, pattern = _texts(wanted), _pattern(wanted)
    decided = wanted.event is wanted.since is wanted.until is None
    for path in _within(trail_files(directory), wanted):
        for block, end in _blocks(path):
            if all(any(holds(block, end, text) for text in either) for either in texts):
                found: list[bytes] = pattern.findall(block, 0, end)
                yield from found if decided else (line for line in found if _fits(line, wanted))


def _fits(line: bytes, wanted: Query) -> bool:
    """Whether a line whose type and plugin are wanted is of that time and event."""
    if wanted.since is not None or wanted.until is not None:
        begin = line.index(b'"time":"') + 8
        time = line[begin : line.index(b'"', begin)].decode()
        if time < (wanted.since or "") or time > (wanted.until or "~"):
            return False
    if wanted.event is None:
        return True
    begun = wanted.event
    record = parse(line) if quoted(begun)[:-1].encode() in line else None
    return record is not None and any(event.startswith(begun) for event in record.events)


def _texts(wanted: Query) -> list[list[bytes]]:
    """Texts of which a matching line has one of each list: the longer, the faster they are looked for."""
    types = [type[:-1] if type.endswith(".*") else f'{type}","origin":"' for type in wanted.types]
    names = [[quoted(wanted.event)[:-1]]] if wanted.event is not None else []
    names += [[f'","plugin":{quoted(wanted.plugin)},']] if wanted.plugin is not None else []
    either = [*names, [f'","type":"{type}' for type in types]] if types else names
    return [[text.encode() for text in texts] for texts in either]


def _pattern(wanted: Query) -> re.Pattern[bytes]:
    """Pattern of a line, and the newline before it, whose type and plugin are wanted (its form: ``record``)."""
    any_text = '[^"]*'
    types = [re.escape(type[:-1]) + any_text if type.endswith(".*") else re.escape(type) for type in wanted.types]
    type = f"(?:{'|'.join(types or [any_text])})"
    plugin = re.escape(quoted(wanted.plugin)) + "," if wanted.plugin is not None else ""
    begin = f'{{"seq":[1-9][0-9]*,"time":"{any_text}","type":"{type}","origin":"{any_text}","plugin":{plugin}'
    return re.compile(f'\\n(\\{begin}.*,"hash":"[0-9a-f]{{64}}"}})(?=\\n)'.encode())


def _blocks(path: Path) -> Iterator[tuple[bytearray, int]]:
    """The lines of a file a block at a time, each line between two newlines: a buffer, and the end of its lines in it.

    The next block takes the buffer's place.
    """
    buffer, held = bytearray(b"\n") + bytearray(_SEARCHED), 1
    with path.open("rb", buffering=0) as file:
        while read := file.readinto(memoryview(buffer)[held:]):
            held += read
            end = buffer.rfind(b"\n", 0, held) + 1
            if end > 1:
                yield buffer, end
                rest = buffer[end - 1 : held]
                buffer[: len(rest)] = rest
                held = len(rest)
            elif held == len(buffer):
                buffer += bytearray(_SEARCHED)
    buffer[held : held + 1] = b"\n"
    if held > 1:
        yield buffer, held + 1


def event_ids(directory: Path, prefix: str, limit: int) -> list[str]:
    """The first ``limit`` different ids of events in the trail that begin with ``prefix``."""
    found: dict[str, None] = {}
    needle = json.dumps(prefix)[:-1].encode()
    for path in trail_files(directory):
        for block, end in _blocks(path):
            for line in bytes(block[:end]).split(b"\n") if holds(block, end, needle) else ():
                record = parse(line) if needle in line else None
                found.update(dict.fromkeys(i for i in (record.events if record else ()) if i.startswith(prefix)))
                if len(found) >= limit:
                    return list(found)[:limit]
    return list(found)


def _within(paths: list[Path], wanted: Query) -> list[Path]:
    """The files that can hold records of the wanted time, by the time of each file's first record."""
    begins = [(record.time if (record := parse(files.first_line(path))) else None) for path in paths]
    since = _shifted(wanted.since, -_SLACK)
    until = _shifted(wanted.until, _SLACK)
    return [
        path
        for path, begin, following in zip(paths, begins, [*begins[1:], None], strict=True)
        if not (until and begin and begin > until) and not (since and following and following < since)
    ]


def _shifted(time: str | None, by: timedelta) -> str | None:
    if time is None:
        return None
    return (datetime.fromisoformat(time) + by).strftime("%Y-%m-%dT%H:%M:%S.%fZ")
