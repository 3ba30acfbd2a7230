"""Handler of ``audit.follow``: the trail as it is written, for callers of the control socket.

The records are read from the files; the writer is not involved. A caller gets the lines exactly as they stand there,
so that its copy can be verified elsewhere, and it can go on after the last ``seq`` that it has.

The cost of a follower is bounded. Files are read a block at a time in threads of their own, so that a slow disk stops
nobody but followers. A block is sent when the one before has been read; until then the file is not even held open, nor
while the trail cannot be written, as its disk may have to be unmounted: of a trail like that a new stream sends what is
there, once. A caller that reads nothing for ``STALLED`` seconds is cut off.
"""

from __future__ import annotations

import asyncio
import errno
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from host.control.audit_types import AuditFollow, FollowedTrail
from host.control.endpoints import Caller, Verbs, serves
from isolator.audit import files, reader
from isolator.audit.client import AuditClient
from isolator.errors import IsolatorError, UnavailableError, UsageError
from isolator.ipc.tasks import Tasks

FOLLOWERS = 32
BLOCK = 1 << 16
"""Bytes of the trail in one notification, and bytes that may wait for a caller beside it."""
STALLED = 600.0
AT_REST = 0.02
"""Seconds between two reads of the newest file: many small commits make one notification."""
_RETRY = 1.0


class TrailStreams(Verbs):
    """The streams of the trail to callers of this process."""

    def __init__(self, directory: Path, audit: AuditClient) -> None:
        self._directory, self._audit = directory, audit
        self._threads = ThreadPoolExecutor(4, "trail")
        self._streams: dict[Caller, _Stream] = {}
        audit.on_blocked = self._blocked

    @serves(AuditFollow)
    async def follow(self, request: AuditFollow, caller: Caller) -> FollowedTrail:
        if caller in self._streams:
            raise UsageError("audit.follow", "this connection follows the trail already", "open another one")
        if len(self._streams) >= FOLLOWERS:
            raise UnavailableError("audit.follow", f"{FOLLOWERS} callers follow the trail already", "end one of them")
        stream = self._streams[caller] = _Stream(self._directory, self._audit, self._threads, caller)
        over = caller.keep(lambda: self._end(caller))
        try:
            return await stream.begin(request)
        except BaseException:
            over()
            self._end(caller)
            raise

    def close(self) -> None:
        for caller in list(self._streams):
            self._end(caller)
        self._threads.shutdown(wait=False, cancel_futures=True)

    def _end(self, caller: Caller) -> None:
        stream = self._streams.pop(caller, None)
        if stream is not None:
            stream.end()

    def _blocked(self, _: str | None) -> None:
        for stream in self._streams.values():
            stream.wake()


class _Stream:
    """The stream to one caller."""

    def __init__(self, directory: Path, audit: AuditClient, threads: ThreadPoolExecutor, caller: Caller) -> None:
        self._directory, self._audit, self._threads, self._caller = directory, audit, threads, caller
        self._loop = asyncio.get_running_loop()
        self._seq = 0
        self._follower: reader.Follower | None = None
        self._changed = asyncio.Event()
        self._tasks = Tasks()
        self._task: asyncio.Task[None] | None = None
        self._reading: asyncio.Future[Any] | None = None

    async def begin(self, request: AuditFollow) -> FollowedTrail:
        """Find the first record to send, and begin behind the answer."""
        lines, after = request.lines, request.after
        try:
            shown = await self._in_thread(lambda: reader.tail(self._directory, max(lines, 1)))
        except PermissionError:
            raise IsolatorError("audit trail", "the host process may not read it", "restart the daemon") from None
        except OSError as error:
            raise UnavailableError("audit trail", f"cannot be read: {error.strerror}", "see 'isolator check'") from None
        last = (files.seq_of(shown[-1]) or 0) if shown else 0
        if after is not None and after > last:
            why = f"ends at record {last}, you have record {after}: it was cut, or this is another trail"
            raise IsolatorError("audit trail", why, "isolator audit verify --anchor SEQ:HASH of your last record")
        if after is None:
            after = (files.seq_of(shown[0]) or 1) - 1 if shown and lines else last
        self._seq = after
        self._caller.narrow(BLOCK)
        self._task = self._tasks.run("a stream of the trail", self._run())
        self._task.add_done_callback(self._ended)
        return {"after": after, "last": last}

    def wake(self) -> None:
        """Read again: there may be new records, or the trail can no longer be written."""
        self._changed.set()

    def end(self) -> None:
        """Stop, and close the file."""
        if self._task is not None:
            self._task.cancel()
        else:
            self._close_file()

    def _ended(self, task: asyncio.Task[None]) -> None:
        if not task.cancelled():
            self._caller.cut()  # a stream that has ended must not look like a quiet one

    async def _run(self) -> None:
        begun = False
        """All that was there is sent, or could not be read."""
        try:
            while True:
                if begun and self._audit.blocked is not None:
                    self._close_file()
                    await self._audit.writable()
                try:
                    lines = await self._in_thread(self._read)
                except OSError as error:
                    begun = True
                    self._close_file()
                    if error.errno in (errno.EMFILE, errno.ENFILE, errno.EACCES, errno.ENOSPC):
                        return self._caller.cut()
                    await asyncio.sleep(_RETRY)  # its disk is in trouble, and the writer will tell
                    continue
                if lines:
                    await self._send(lines)
                else:
                    begun = True
                    await self._wait_for_records()
        except TimeoutError:
            self._caller.cut()
        finally:
            self._close_file()

    def _read(self) -> list[bytes]:
        if self._follower is None:
            self._follower = reader.Follower(self._directory, self._seq, block=BLOCK)
        return self._follower.available(1)

    async def _send(self, lines: list[bytes]) -> None:
        assert self._follower is not None
        self._seq = self._follower.seq
        self._caller.notify("audit.records", {"lines": [line.decode("ascii", "backslashreplace") for line in lines]})
        if not self._caller.drained.is_set():
            self._close_file()
            async with asyncio.timeout(STALLED):
                await self._caller.drained.wait()

    async def _wait_for_records(self) -> None:
        """Wait until the folder of the trail has changed, or the trail can no longer be written."""
        await asyncio.sleep(AT_REST)
        assert self._follower is not None
        fd = self._follower.fileno()
        self._changed.clear()
        if self._audit.blocked is not None:
            return
        self._loop.add_reader(fd, self._changed.set)
        try:
            await self._changed.wait()
        finally:
            self._loop.remove_reader(fd)

    def _close_file(self) -> None:
        if self._reading is not None and not self._reading.done():
            self._reading.add_done_callback(self._close_late)  # descriptors are never closed under a thread
            return
        follower, self._follower = self._follower, None
        if follower is not None:
            follower.close()

    def _close_late(self, reading: asyncio.Future[Any]) -> None:
        if not reading.cancelled():
            reading.exception()  # nobody waits for it any more
        self._close_file()

    async def _in_thread(self, work: Callable[[], list[bytes]]) -> list[bytes]:
        self._reading = self._loop.run_in_executor(self._threads, work)
        return await asyncio.shield(self._reading)
