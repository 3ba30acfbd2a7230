"""The write-ahead log: its syncs, its checkpoints, and whether its files are still those that the next start will find.

A sync is begun on the event loop and ends there (``isolator.linux.aio``); no thread has to take the interpreter's lock
from the loop in between. Where the kernel does not offer that, the helper thread syncs. The same thread makes the
checkpoints, on a connection of its own, so that they never hold up the loop.

The kernel's worker that syncs is bound to the loop's processor, and may have to wait until the loop has nothing else to
do. So the disk gets the write of an event that comes alone before that, and the loop does its own part meanwhile: what
can be made ahead, and the look at the files. Then the worker has the processor, for the disk's flush.

A log that grows takes the file system's journal along with each sync, which costs half as much again. So it is made as
large at the start as it gets between two checkpoints; zeros after the last frame are no frame to SQLite, as the frames
of an earlier round are none.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import queue
import sqlite3
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

from host.database import files
from isolator.ipc.tasks import end_process
from isolator.linux.aio import FileSync

Op = TypeVar("Op")

HIGH = 32 << 20
"""Bytes of log beyond which commits wait for one checkpoint: a log that is appended to all the time never restarts."""
SHARE = 4
"""On a small disk the log is large already when it takes this part of what is free for it."""
LOW = 256 << 10
CLOSING = 10.0
"""Seconds that the end of this process waits for the disk."""
DELAY, AVOID = 0.001, 1.0
"""Seconds: a disk that took longer to take a write is given none ahead of its sync for so long."""
WRITING = 0.000025
"""Seconds in which hardly any disk has written a short log. Then comes the flush, which the kernel's worker begins."""
BEGIN = 4 << 20
"""Bytes of a new log, on a small disk half of what is large there."""


@dataclass
class Sync(Generic[Op]):
    """Sync the log, report these operations, and perhaps make a checkpoint."""

    ops: list[Op]
    checkpoint: bool = False
    hold: bool = False
    """Commits wait for the checkpoint, which can then cover the whole log."""
    rescue: bool = False
    """The disk is full: the reserve is given up for the checkpoint."""


class WriteAheadLog(Generic[Op]):
    """The log of one database, which is open; all methods belong to the event loop's thread.

    ``synced(ops, error, harm)`` is called on the loop for each ``Sync``: with the error if it failed, or with what
    somebody did to the files; after harm nothing more is synced. ``released(job)`` is called once its checkpoint has
    ended. ``writing(ops)`` is called for some, while the disk writes what they changed: it must not raise, and has some
    ``WRITING`` seconds.
    """

    def __init__(
        self,
        path: Path,
        reserve: files.Reserve,
        synced: Callable[[list[Op], OSError | None, str | None], None],
        released: Callable[[Sync[Op]], None],
        writing: Callable[[list[Op]], None],
    ) -> None:
        self._path, self._reserve = path, reserve
        self._synced, self._released, self._writing = synced, released, writing
        self._loop = asyncio.get_running_loop()
        self.fd = os.open(f"{path}-wal", os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
        names = (str(path), f"{path}-wal", f"{path}-shm")
        self._files = {name: files.identity(name) for name in names}
        self._synced_size = 0
        """Bytes at the newest sync: it shrinks by a checkpoint of ours alone."""
        self._grow()
        self._direct: FileSync | None = None
        self._ahead_from = 0.0
        """Loop time from which the disk is handed a write ahead of its sync."""
        self._under_way: list[Op] = []
        """Operations of the direct sync that is under way."""
        self._found: tuple[OSError | None, str | None] = (None, None)
        """Error and harm found in the files, which are looked at while they are written or synced."""
        self._ended = asyncio.Event()
        self._ended.set()
        with contextlib.suppress(OSError):
            self._direct = FileSync(self.fd)
            self._loop.add_reader(self._direct.fileno(), self._direct_ended)
        self._work: queue.SimpleQueue[Sync[Op] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="store-sync", daemon=True)
        self._thread.start()

    @property
    def size(self) -> int:
        """Its bytes."""
        return os.lseek(self.fd, 0, os.SEEK_END)  # quicker than fstat

    @property
    def identity(self) -> tuple[int, int] | None:
        """Device and inode of the database's file as it was opened."""
        return self._files[str(self._path)]

    def high(self) -> int:
        """Bytes of log beyond which commits wait for a checkpoint, as the disk is now."""
        disk = os.fstatvfs(self.fd)
        room = disk.f_bavail * disk.f_frsize + self.size
        return min(HIGH, max(LOW, room // SHARE))

    def begin(self, job: Sync[Op], *, alone: bool = False) -> None:
        """Begin a sync; the one before has been reported. ``alone``: who waits for it has waited for no other.

        Then ``writing`` is called while the disk writes, for which the kernel's worker waits as well.
        """
        if self._direct is not None and not job.checkpoint:
            found = None
            if alone and self._write_ahead(self._direct):
                self._writing(job.ops)
                found = self._outcome(lambda: None)
            with contextlib.suppress(OSError):  # the kernel has no room for it at the moment
                self._direct.begin()
                self._under_way = job.ops
                self._ended.clear()
                self._found = found or self._outcome(lambda: None)
                return
        self._work.put(job)

    def _write_ahead(self, direct: FileSync) -> bool:
        """Let the disk work while the kernel's worker is woken, which a loop that goes on may hold up.

        Returns whether it does. A loop that is held up by a busy disk leaves that to the worker for a while.
        """
        began = self._loop.time()
        if began < self._ahead_from:
            return False
        direct.write_out()
        ended = self._loop.time()
        if ended - began > DELAY:
            self._ahead_from = ended + AVOID
        return True

    async def close(self) -> None:
        """Report what is under way, sync once more, and end; a disk that does not answer is not waited for long."""
        self._work.put(Sync([]))
        self._work.put(None)
        await asyncio.to_thread(self._thread.join, CLOSING)
        if self._direct is not None:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(CLOSING):
                    await self._ended.wait()
            self._loop.remove_reader(self._direct.fileno())
            if self._ended.is_set():
                self._direct.close()
        if not self._thread.is_alive():  # else its next look at the file would be one at what has the number by then
            os.close(self.fd)

    def _grow(self) -> None:
        with contextlib.suppress(OSError):
            size = self.size
            missing = min(BEGIN, self.high() // 2) - size
            if missing > 0:
                os.pwrite(self.fd, bytes(missing), size)

    def _direct_ended(self) -> None:
        assert self._direct is not None
        ops, self._under_way = self._under_way, []
        error, harm = self._found
        try:
            error = self._direct.end() or error
        except OSError as failure:
            error = failure
        self._ended.set()
        self._synced(ops, error, None if error is not None else harm)

    def _outcome(self, sync: Callable[[], OSError | None]) -> tuple[OSError | None, str | None]:
        """The error of a sync or, where there is none, what somebody did to the files."""
        try:
            error = sync()
            return error, None if error is not None else self._harm()
        except OSError as error:
            return error, None

    def _run(self) -> None:
        try:
            self._serve()
        except Exception as error:  # whatever it was: nobody would ever be answered again
            end_process("sync of the database", error)

    def _serve(self) -> None:
        connection = files.connect(self._path)
        connection.execute("PRAGMA wal_autocheckpoint=0")
        while (job := self._work.get()) is not None:
            error, harm = self._outcome(lambda: os.fdatasync(self.fd))
            self._report(self._synced, job.ops, error, harm)
            if harm is not None:
                break
            if job.rescue:
                self._reserve.release()
            if job.checkpoint and error is None:
                with contextlib.suppress(sqlite3.Error):  # busy or full: the next round tries again
                    connection.execute(f"PRAGMA wal_checkpoint({'TRUNCATE' if job.hold else 'PASSIVE'})").fetchone()
            if job.checkpoint and not self._reserve.held:
                self._reserve.hold()
            if job.hold:
                self._synced_size = self.size
            if job.checkpoint:
                self._report(self._released, job)
        connection.close()

    def _report(self, function: Callable[..., None], *arguments: Any) -> None:
        with contextlib.suppress(RuntimeError):  # the loop is closed: the process ends
            self._loop.call_soon_threadsafe(function, *arguments)

    def _harm(self) -> str | None:
        """Name the file that somebody removed, replaced, cut or overwrote while it was in use; None: all is well.

        The log's size alone would not do: a commit after a cut writes at its old place and leaves a hole before it.
        """
        for name, opened in self._files.items():
            now = files.identity(name)
            if now != opened:
                return f"{name} was {'removed' if now is None else 'replaced'} while in use"
        before, self._synced_size = self._synced_size, self.size
        if self._synced_size < before:
            return f"{self._path}-wal was cut while in use"
        if self._synced_size and not files.has_wal_header(self.fd):
            return f"{self._path}-wal was overwritten while in use"
        return None
