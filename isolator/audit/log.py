"""The trail being written: the chain in memory, and the file it is committed to.

``Chain`` gives each record its place, hash and seals; it lives on the event loop and touches no file. ``Trail``
does the file work and is called from one worker thread, a commit at a time, so that the loop never waits for a disk.

A commit writes what has gathered since the last one, calls fdatasync once, and notes the new head. If any step fails
nothing of the batch counts as written, whatever the kernel may have kept: after a failed fsync the page cache says
"clean" for pages that never reached the disk. The next attempt checks that the file still holds the last record known
to be safe, cuts off what comes after it and writes the whole batch again.
"""

from __future__ import annotations

import contextlib
import errno
import os
import stat
import time
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from isolator.audit import files
from isolator.audit.record import Incoming, RejectedError, own_hash_fits, spell
from isolator.audit.recover import HEAD_NAME, OF_RUNS, ChainEnd, follow_run, read_head, recover
from isolator.audit.schema import RETENTION, AuditGap, AuditSeal
from isolator.audit.seal import Signer, load_signer, set_aside
from isolator.linux.descriptors import owning
from isolator.linux.durable import sync_folder

_HEAD_SIZE = 256
_CHECK_BYTES = 1 << 20


@dataclass(frozen=True)
class Limits:
    """When to seal and rotate, and which full files to keep; sizes in bytes, times in seconds.

    Of full files ``keep_files`` are kept (0: all), and also what is younger than ``min_age``, as long as all of them
    are not larger than ``keep_files`` times ``rotate_size``: room on the disk is bounded whatever is recorded.
    """

    seal_records: int = 1000
    seal_interval: float = 60.0
    rotate_size: int = 64 << 20
    rotate_age: float = 86400.0
    keep_files: int = 90
    min_age: float = 7 * 86400.0


@dataclass(frozen=True)
class Outlook:
    """The age that the trail reaches before it is deleted, at the pace of the last ``min_age``; in seconds."""

    lifetime: float
    short: bool
    """Whether that is less than ``min_age``, and no mere moment: a quarter of the room was taken at this pace."""


@dataclass
class Batch:
    """Lines that are committed together. ``last``: the file is full after this one."""

    lines: list[bytes]
    seq: int
    hash: str
    last: bool


class Chain:
    """Gives records their seq, prev and hash, seals them, and gathers their lines in batches."""

    def __init__(self, end: ChainEnd, signer: Signer, limits: Limits) -> None:
        self.seq, self.hash, self.sealed = end.seq, end.hash, end.sealed
        self.origins, self.runs = end.origins, end.runs
        self.bytes = 0
        """Bytes of the lines not taken yet."""
        self.sum_up: Callable[[], list[Incoming]] = list
        """Called before a file ends: records that have to be in it."""
        self.seals = 0
        self._signer, self._limits = signer, limits
        self._file_bytes = 0 if end.size >= limits.rotate_size else end.size
        self._begun = end.begun if self._file_bytes else time.time()
        self._batches: list[Batch] = []
        self._lines: list[bytes] = []

    @property
    def unsealed(self) -> int:
        """Records after the last seal, which counts as sealed itself."""
        return max(0, self.seq - self.sealed - (1 if self.sealed else 0))

    def append(self, record: Incoming) -> None:
        """Add a record; raises RejectedError, and leaves no trace, when it cannot be spelled."""
        self._add(record)
        if self.seq - self.sealed >= self._limits.seal_records or self._is_full():
            self.seal(record.time)

    def seal(self, now: str) -> None:
        """Sign what is not signed yet; begins a new file when this one is full."""
        if self._is_full():
            for record in self.sum_up():
                self._add(record)
        signature = self._signer.sign(self.sealed + 1, self.seq, self.hash)
        seal = AuditSeal(
            from_=self.sealed + 1, to=self.seq, hash=self.hash, key=self._signer.name, signature=signature,
            origins=dict(self.origins), runs=dict(self.runs),
        )  # fmt: skip
        self.sealed = self.seq
        self._add(Incoming(now, seal.TYPE, data=seal.data))
        self.seals += 1
        if self._is_full():
            self._gather(last=True)
            self._file_bytes, self._begun = 0, time.time()

    def _is_full(self) -> bool:
        return self._file_bytes >= self._limits.rotate_size or time.time() - self._begun >= self._limits.rotate_age

    def take(self) -> list[Batch]:
        """Everything gathered so far, for a commit."""
        if self._lines:
            self._gather(last=False)
        batches, self._batches, self.bytes = self._batches, [], 0
        return batches

    def _gather(self, *, last: bool) -> None:
        self._batches.append(Batch(self._lines, self.seq, self.hash, last))
        self._lines = []

    def count(self, record: Incoming) -> None:
        """Note the number of a record that is counted instead of written: its sender has not lost it."""
        if record.number:
            self.origins[record.source] = record.number

    def _add(self, record: Incoming) -> None:
        seq = self.seq + 1
        line, self.hash = spell(seq, record, self.hash)
        self.seq = seq
        self._lines.append(line)
        size = len(line)
        self.bytes += size
        self._file_bytes += size
        if record.number:
            self.origins[record.source] = record.number
        if record.type in OF_RUNS:
            follow_run(self.runs, record.type, record.plugin, record.run)


class Trail:
    """The files of the trail, as their one writer sees them. Not thread-safe: one call at a time."""

    def __init__(self, log: Path, lib: Path, limits: Limits) -> None:
        self.notes: list[AuditGap] = []
        """Records about the files themselves, for the chain to append."""
        self.seq = 0
        """The last record that is durable."""
        self.commits = 0
        self.outlook: Outlook | None = None
        """As of the newest file; None while there is nothing to judge by, or everything is kept."""
        self._log, self._lib, self._limits = log, lib, limits
        self._live = log / files.LIVE
        self._fd = self._head = -1
        self._size, self._hash, self._first, self._inode = 0, "", 1, 0
        self._todo: deque[Batch] = deque()
        self._full = self._unverified = False
        self._retired: list[tuple[int, list[Path]]] = []

    def open(self) -> tuple[ChainEnd, Signer]:
        """Take up the trail where it ends; raises OSError and may be called again then."""
        self.close()
        signer = load_signer(self._lib, self._log)
        self.notes += [AuditGap(count=0, why=why) for why in signer.notes]
        head = read_head(self._lib / HEAD_NAME)
        self._open_head()
        self._fd = self._open_live()
        end = recover(self._fd, self._log, head, self.notes)
        if end.newline_missing:
            os.write(self._fd, b"\n")
            end.size += 1
        sync_folder(self._log)
        self.seq, self._hash = end.seq, end.hash
        self._size, self._first = end.size, end.first
        self._inode = os.fstat(self._fd).st_ino
        self._full = end.size >= self._limits.rotate_size
        self._retire()
        return end, signer

    def close(self) -> None:
        """Close the files."""
        for fd in (self._fd, self._head):
            if fd >= 0:
                os.close(fd)
        self._fd = self._head = -1

    def commit(self, batches: Iterable[Batch]) -> None:
        """Write batches and wait until they are on disk.

        Raises OSError; what was not written yet is kept and written first by the next call.
        """
        self._todo.extend(batches)
        try:
            while self._todo:
                self._check()
                batch = self._todo[0]
                data = b"".join(batch.lines)
                self._write(data)
                os.fdatasync(self._fd)
                self._size += len(data)
                self.seq, self._hash = batch.seq, batch.hash
                self._full = batch.last
                self._todo.popleft()
                self.commits += 1
            self._note_head()
        except OSError as error:
            self._unverified = True
            if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                self.close()  # nothing of ours keeps a failing disk from being unmounted and repaired
            raise
        self._delete_retired()

    def retired(self, seq: int, names: list[str]) -> None:
        """Delete full files once the record ``seq``, which accounts for them, is durable."""
        self._retired.append((seq, [self._log / name for name in names]))

    def _check(self) -> None:
        """Make sure that the live file is open, has the length that we know and its own name, and is not full."""
        if self._fd < 0:
            self._reopen()
        elif self._unverified:
            self._check_tail()
        self._unverified = False
        status, named = os.fstat(self._fd), self._named()
        if named is None or (named.st_ino, named.st_dev) != (status.st_ino, status.st_dev):
            self._restore_name(named is not None)
            status = os.fstat(self._fd)
        self._inode = status.st_ino
        if status.st_size != self._size:
            self._foreign_length(status.st_size)
        if self._full:
            self._rotate()

    def _named(self) -> os.stat_result | None:
        try:
            return os.stat(self._live, follow_symlinks=False)
        except FileNotFoundError:
            return None

    def _open_live(self) -> int:
        flags = os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
        named = self._named()
        if named is not None and not stat.S_ISREG(named.st_mode):
            kept = set_aside(self._live)
            self.notes.append(AuditGap(count=0, why=f"{files.LIVE} was not a regular file", kept=kept))
        fd = os.open(self._live, flags, 0o640)
        if os.fstat(fd).st_uid == os.geteuid():
            os.fchmod(fd, 0o640)
        return fd

    def _open_head(self) -> None:
        path = self._lib / HEAD_NAME
        if os.path.lexists(path) and (path.is_symlink() or not path.is_file()):
            set_aside(path)
        head = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
        if self._head >= 0:
            os.close(self._head)
        self._head = head

    def _check_tail(self) -> None:
        """After a failure: cut back to what is known to be safe, and read its last record from the disk."""
        length = os.fstat(self._fd).st_size
        if length < self._size:
            return  # recorded by _check
        os.ftruncate(self._fd, self._size)
        if not self._size:
            return
        os.posix_fadvise(self._fd, max(0, self._size - _CHECK_BYTES), 0, os.POSIX_FADV_DONTNEED)
        if not self._ends_as_written(self._fd):
            self.notes.append(AuditGap(count=1, why="after an I/O error the last record reads back changed"))

    def _ends_as_written(self, fd: int) -> bool:
        """Whether the last record that is known to be safe stands where we left it."""
        start = max(0, self._size - _CHECK_BYTES)
        line = os.pread(fd, self._size - start, start).rstrip(b"\n").rpartition(b"\n")[2]
        return own_hash_fits(line) and files.hash_of(line) == self._hash

    def _reopen(self) -> None:
        """Open the live file again after a failure. It has to be the one that was left, perhaps on a disk that was
        repaired and mounted again: a trail is not begun anew because its disk is away."""
        if self._size:
            with owning(os.open(self._live, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)) as fd:
                if os.fstat(fd).st_ino != self._inode and not self._ends_as_written(fd):
                    raise OSError(errno.ESTALE, f"another file has its name; put it back, or restart: {self._live}")
        self._fd = self._open_live()
        self._check_tail()
        with contextlib.suppress(OSError):
            self._open_head()

    def _restore_name(self, other: bool) -> None:
        """Put back the live file, which somebody removed or replaced: ours is still open."""
        why = f"{files.LIVE} was removed or replaced while in use, and restored"
        note = AuditGap(count=0, why=why, kept=set_aside(self._live)) if other else AuditGap(count=0, why=why)
        temporary = self._log / f"{files.LIVE}.new"
        with contextlib.suppress(FileNotFoundError):
            temporary.unlink()
        new = os.open(temporary, os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o640)
        try:
            offset = 0
            while part := os.pread(self._fd, 1 << 20, offset):
                offset += len(part)
                while part:
                    part = part[os.write(new, part) :]
            os.fsync(new)
            os.rename(temporary, self._live)
            sync_folder(self._log)
        except OSError:
            os.close(new)
            raise
        os.close(self._fd)
        self._fd = new
        self.notes.append(note)

    def _foreign_length(self, length: int) -> None:
        if length > self._size:
            extra = os.pread(self._fd, min(length - self._size, 1024), self._size)
            os.ftruncate(self._fd, self._size)
            self.notes.append(
                AuditGap(
                    count=0,
                    why="somebody else wrote to the file; cut off",
                    bytes=length - self._size,
                    text=extra.decode("ascii", "replace"),
                )
            )
            return
        line = files.last_line(self._live)
        last = files.seq_of(line) if line else None
        if length and os.pread(self._fd, 1, length - 1) != b"\n":
            os.write(self._fd, b"\n")
            length += 1
        lost = self.seq - (self._first - 1 if last is None else last)
        self.notes.append(AuditGap(count=lost, why="somebody cut the file while it was in use"))
        self._size = length

    def _rotate(self) -> None:
        full = self._log / files.rotated_name(self._first)
        if full.exists():
            self.notes.append(AuditGap(count=0, why=f"{full.name} stood in the way", kept=set_aside(full)))
        os.rename(self._live, full)
        # The old descriptor is of no more use, and should making the new file fail, it is made by the next attempt.
        os.close(self._fd)
        self._fd = -1
        self._first, self._size, self._full = self.seq + 1, 0, False
        self._fd = self._open_live()
        sync_folder(self._log)
        self._retire()

    def _retire(self) -> None:
        """Find the full files that are over the limit; deleting waits until a record accounts for them."""
        if not self._limits.keep_files:
            return
        pending = {path for _, paths in self._retired for path in paths}
        full = [path for path in files.rotated(self._log) if path not in pending]
        surplus = full[: self._surplus(full)]
        if not surplus:
            return
        follower = files.first_line(full[len(surplus)])
        first, after = files.first_of(surplus[0]) or 1, files.seq_of(follower) or 1
        self.notes.append(
            AuditGap(
                count=after - first,
                why=RETENTION,
                from_=first,
                to=after - 1,
                hash=files.prev_of(follower),
                files=[path.name for path in surplus],
            )
        )

    def _surplus(self, full: list[Path]) -> int:
        """How many of the full files, oldest first, are to be deleted; judges on the way how long the trail lasts."""
        limits, status = self._limits, [path.stat() for path in full]
        now, room = time.time(), limits.keep_files * limits.rotate_size
        # The last batch makes a file a little larger than it should be; that must not cost another file.
        sizes = [min(file.st_size, limits.rotate_size) for file in status]
        young = [now - file.st_mtime < limits.min_age for file in status]
        recent = sum(size for size, is_young in zip(sizes, young, strict=True) if is_young)
        self.outlook = None
        if recent:
            begun = max(files.begun(full[young.index(True)]), now - limits.min_age)
            lifetime = room * max(1.0, now - begun) / recent
            self.outlook = Outlook(lifetime, lifetime < limits.min_age and 4 * recent >= room)
        used, count = sum(sizes), len(full)
        for index, size in enumerate(sizes):
            if used <= room and (count <= limits.keep_files or young[index]):
                return index
            used, count = used - size, count - 1
        return len(full)

    def _delete_retired(self) -> None:
        while self._retired and self._retired[0][0] <= self.seq:
            for path in self._retired.pop(0)[1]:
                with contextlib.suppress(FileNotFoundError):
                    path.unlink()

    def _write(self, data: bytes) -> None:
        view = memoryview(data)
        while view:
            view = view[os.write(self._fd, view) :]

    def _note_head(self) -> None:
        text = f'{{"seq": {self.seq}, "hash": "{self._hash}"}}'.ljust(_HEAD_SIZE - 1) + "\n"
        # Only a second witness: a stale note is as good as an older one, so its disk's trouble is not the trail's.
        with contextlib.suppress(OSError):
            os.pwrite(self._head, text.encode(), 0)


__all__ = ["Batch", "Chain", "Limits", "RejectedError", "Trail"]
