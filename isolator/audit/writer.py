"""The writer: reads the sources' sockets, chains the records, commits and acknowledges them.

    sources' sockets ─▶ event loop: check, tag with the event in flight, chain ─▶ batch
                                        ▲                                           │ one at a time
                     acks, "blocked" ◀──┴──────────── worker thread: write, fdatasync ◀┘

- **Order.** The host's socket is read empty before a packet of any other source is handled, so the dispatch that
  caused a connection is known when the connection's record comes by (`cause.py`).
- **Group commit.** A commit begins when the one before ended and takes all that has gathered; nobody waits per
  record, and a slow disk makes batches larger, not the queue longer than ``MAX_WAITING`` bytes: then the sockets
  are left alone and the senders keep their records.
- **Noise.** What a plugin or a caller repeats beyond its budget is counted and summed up (`budget.py`).
- **Trouble.** When the trail cannot be opened or written, every source gets ``{"blocked": why}`` and the same
  work is tried again until it succeeds, then ``{"blocked": null}``. Senders keep what was not acknowledged.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import time
from functools import partial
from pathlib import Path
from typing import Any

from isolator.audit.budget import WINDOW
from isolator.audit.cause import CauseState
from isolator.audit.client import utc_now
from isolator.audit.commits import FileThread
from isolator.audit.intake import Intake
from isolator.audit.log import Chain, Limits, Outlook, Trail
from isolator.audit.metrics import Metrics, MetricState
from isolator.audit.schema import BROKER, HOST, RETENTION, SENDERS
from isolator.audit.source import Source, SourceState
from isolator.errors import IsolatorError
from isolator.ipc.body import Body
from isolator.ipc.succession import Departure, Descriptors
from isolator.ipc.tasks import essential
from isolator.paths import Paths

MAX_WAITING = 8 << 20
"""Bytes of records that wait for the disk before the sockets are left alone."""
_PACKETS = 16
_FEW = 128
"""A socket that had fewer records and is empty is left alone until the next commit, which nothing that comes meanwhile
could be in before: it is read together then. A packet by itself wakes this process, which costs more than its records
do, and its sender waits for that. Who sends a burst sends so many at once."""
_BURST = 1024
"""Records since the commit before the last. Who sends so many is listened to: they take longer to handle than the time
from one commit to the next."""
_DRAIN = 4096
"""More packets than a socket's buffer can hold: reading so many empties it of what was there before."""
_RETRY = 0.5
_GATHER = 0.005
"""Seconds from one commit to the next: under load they cost more than the records do, and their syncs compete with
those of the host's database. Nobody waits for a commit, but for the last one."""
_LULL, _LULL_RECORDS = 0.01, 16
"""The same while each source sends fewer records from one commit to the next but one: a commit costs thirty times what
a record does, and wakes its senders besides."""
_REST = 2 * _LULL
"""Seconds after which such a socket is read whether the disk has answered or not."""
_HOST_WAIT = 1.0
_STALLED = 10.0
"""A commit that takes longer counts as blocked until it ends."""


class WriterState(Body):
    """Knowledge of a writer that the trail does not have, on its way to another writer."""

    sources: tuple[SourceState, ...]
    origins: dict[str, str]
    """by source, the number of its last record, written or counted"""
    causes: CauseState
    metrics: tuple[MetricState, ...]


class Writer:
    """The writer of one trail. ``open`` starts it; everything runs on one event loop and one worker thread."""

    def __init__(self, paths: Paths, limits: Limits) -> None:
        self.metrics = Metrics()
        self.blocked: str | None = None
        self.alarm: str | None = None
        """Why the trail will not last as long as it should, else None."""
        self.ended = True
        """Whether, by the trail, the daemon before had stopped."""
        self._limits = limits
        self._trail = Trail(paths.audit_log, paths.audit_lib, limits)
        self._intake: Intake | None = None
        """None until the trail is open."""
        self._sources: list[Source] = []
        self._loop = asyncio.get_running_loop()
        self._worker = FileThread()
        self._work: asyncio.Task[None] | None = None
        self._wake = asyncio.Event()
        self._gathered = asyncio.Event()
        """Set when it is time for the next commit."""
        self._progress = asyncio.Condition()
        self._seal_timer: asyncio.TimerHandle | None = None
        self._summary_timer: asyncio.TimerHandle | None = None
        self._stopping = asyncio.Event()
        self._leaving = False

    async def open(self) -> None:
        """Take up the trail; returns after the first attempt, which goes on in the background if it failed."""
        attempted = asyncio.Event()
        self._work = essential(self._run(attempted), "writer of the trail")
        await attempted.wait()

    @property
    def runs(self) -> dict[str, str]:
        """Plugins by run, of runs that have no end in the trail; empty while the trail cannot be taken up."""
        return dict(self._intake.chain.runs) if self._intake is not None else {}

    def attach(self, name: str, sock: socket.socket) -> None:
        """Read records of source ``name`` from ``sock``; a socket it had before is read to its end first."""
        sock.setblocking(False)
        for old in [s for s in self._sources if s.name == name]:
            self._drain(old)
            self._detach(old)
        source = Source(name, sock)
        self._sources.append(source)
        self._sources.sort(key=lambda s: SENDERS.index(s.name))
        source.report(blocked=self.blocked, alarm=self.alarm)
        if name == HOST:
            self._release()
        elif name == BROKER and not any(s.name == HOST for s in self._sources):
            # After a restart of this process the host's dispatches may be on their way again; they come first.
            source.held = True
            self._loop.call_later(_HOST_WAIT, self._release)
        self._update_reading()

    async def flush(self) -> None:
        """Return when everything received so far is on disk."""
        for source in list(self._sources):
            self._drain(source)
        async with self._progress:
            await self._progress.wait_for(lambda: self._intake is not None)
            assert self._intake is not None
            self._intake.sum_up(everything=True)
            target = self._intake.chain.seq
            self._hurry()
            await self._progress.wait_for(lambda: self._trail.seq >= target)

    async def stop(self) -> None:
        """Write what is there, seal it, and end; gives up at once when the trail cannot be written."""
        for source in list(self._sources):
            self._drain(source)
        self._stopping.set()
        self._hurry()
        if self._work is not None:
            await self._work
        for source in list(self._sources):
            self._detach(source)
        self._worker.close()
        self._trail.close()

    async def pass_on(self, departure: Departure) -> WriterState:
        """Write what was received, close the files, and hand the sockets to another writer; raises IsolatorError.

        Records that come meanwhile wait in the sockets.
        """
        self._leaving = True
        self._update_reading()
        intake = self._intake
        if intake is None:
            raise IsolatorError("the audit trail", "is not open yet")
        intake.sum_up(everything=True)
        self._hurry()
        async with self._progress:
            await self._progress.wait_for(lambda: self._trail.seq >= intake.chain.seq)
        # Nothing has come since: the next commit would be empty.
        if self._work is not None:
            self._work.cancel()
        for timer in (self._seal_timer, self._summary_timer):
            if timer is not None:
                timer.cancel()
        await asyncio.to_thread(self._worker.close)
        self._trail.close()
        return WriterState(
            sources=tuple(source.pass_on(departure) for source in self._sources if source.open),
            origins=dict(intake.chain.origins),
            causes=intake.causes.pass_on(),
            metrics=self.metrics.pass_on(),
        )

    def take_over(self, state: WriterState, descriptors: Descriptors) -> None:
        """Go on in the place of another writer, whose records are all in the trail; to be called once it is open."""
        if self._intake is None:
            raise IsolatorError("the audit trail", self.blocked or "is not open")
        self._intake.chain.origins.update(state.origins)
        self._intake.causes.take_over(state.causes)
        self.metrics.take_over(state.metrics)
        self._sources = [Source.taken_over(one, descriptors) for one in state.sources]
        self._report()
        self._update_reading()

    # -- from the sockets -----------------------------------------------------------------------------------------

    def _release(self) -> None:
        for source in self._sources:
            source.held = False
        self._update_reading()

    @property
    def _has_room(self) -> bool:
        return self._intake is not None and self._intake.chain.bytes < MAX_WAITING and not self._leaving

    def _update_reading(self) -> None:
        """Listen to the sockets unless there is no chain yet or too much waits for the disk."""
        room = self._has_room
        for source in self._sources:
            wanted = room and source.open and not source.held and source.rest is None
            source.listen(self._readable if wanted else None)

    def _readable(self, source: Source) -> None:
        before = source.received
        source.hear()
        for _ in range(_PACKETS):
            packet = source.receive()
            if packet is None:
                few = 0 < source.received - before < _FEW and source.received - source.since < _BURST
                if few and source.open:
                    source.rest = self._loop.call_later(_REST, self._rested, source)
                break
            if source.name != HOST:
                for host in self._sources:
                    if host.name == HOST:
                        self._drain(host)
            self._take(source, packet)
        if source.received > before or not source.open:
            self._wake.set()
        self._update_reading()

    def _rested(self, source: Source) -> None:
        if source.rest is not None:
            source.rest.cancel()
        source.rest = None
        if self._has_room and source in self._sources and source.open and not source.held:
            self._readable(source)
        else:
            self._update_reading()

    def _drain(self, source: Source) -> None:
        for _ in range(_DRAIN):
            if self._intake is None or (packet := source.receive()) is None:
                return
            self._take(source, packet)

    def _take(self, source: Source, packet: bytes) -> None:
        assert self._intake is not None
        source.received += self._intake.take(source.name, packet)
        if self._summary_timer is None and self._intake.budgets.counting:
            self._summary_timer = self._loop.call_later(self._intake.budgets.window, self._summary_due)

    def _summary_due(self) -> None:
        self._summary_timer = None
        assert self._intake is not None
        if self.blocked is None:
            self._intake.sum_up()
            self._wake.set()
        if self._intake.budgets.counting:
            self._summary_timer = self._loop.call_later(WINDOW, self._summary_due)

    def _detach(self, source: Source) -> None:
        source.close()
        self._sources.remove(source)

    # -- to the disk ----------------------------------------------------------------------------------------------

    def _seal(self) -> None:
        self._seal_timer = None
        if self._intake is None or not self._intake.chain.unsealed:
            return
        if self.blocked is None:
            self._intake.chain.seal(utc_now())
            self._wake.set()
        else:
            self._seal_timer = self._loop.call_later(self._limits.seal_interval, self._seal)

    async def _run(self, attempted: asyncio.Event) -> None:
        while self._intake is None:
            try:
                end, signer = await self._worker.call(self._trail.open)
            except (OSError, ValueError) as error:
                self._block(_reason(error))
                attempted.set()
                if await self._pause():
                    return
                continue
            self._intake = Intake(Chain(end, signer, self._limits), self.metrics)
            self.ended = end.stopped
            for delivery in end.deliveries:
                self._intake.causes.observe(delivery, time.monotonic_ns())
        intake, chain = self._intake, self._intake.chain
        self._take_notes()
        self._look_ahead()
        self._wake.set()
        self._unblock()
        attempted.set()
        self._update_reading()
        while True:
            await self._wake.wait()
            self._wake.clear()
            self._gathered.clear()
            if self._stopping.is_set():
                intake.sum_up(everything=True)
                if chain.unsealed:
                    chain.seal(utc_now())
            if not await self._commit():
                return
            if not self._stopping.is_set():
                await self._gather()
            for source in [one for one in self._sources if one.rest is not None]:
                self._rested(source)
            if self._stopping.is_set():
                if not chain.bytes and not chain.unsealed:
                    return
                self._wake.set()
            elif self._seal_timer is None and chain.unsealed:
                self._seal_timer = self._loop.call_later(self._limits.seal_interval, self._seal)

    async def _commit(self) -> bool:
        """Bring everything that has gathered to the disk; False when it is time to stop without it."""
        assert self._intake is not None
        reached = [(source, source.received) for source in self._sources]
        for source, received in reached:
            source.since, source.committed = source.committed, received
        batches = self._intake.chain.take()
        self._update_reading()
        while True:
            stalled = self._loop.call_later(
                _STALLED, self._block, f"the disk has not answered for {_STALLED:g} s; see if it is failing"
            )
            begun = time.monotonic()
            try:
                await self._worker.call(partial(self._trail.commit, batches))
                break
            except OSError as error:
                batches = []
                stalled.cancel()
                self._block(_reason(error))
                if await self._pause():
                    return False
            finally:
                stalled.cancel()
        self.metrics.committed(time.monotonic() - begun, self._trail.seq)
        self._unblock()
        self._look_ahead()
        for source, received in reached:
            if received > source.acked:
                source.report(acked=received, blocked=self.blocked, alarm=self.alarm)
        for source in [s for s in self._sources if not s.open and s.acked == s.received]:
            self._detach(source)
        self._take_notes()
        async with self._progress:
            self._progress.notify_all()
        return True

    async def _gather(self) -> None:
        """Wait until enough may have come for another commit, or somebody waits for one."""
        lull = all(source.received - source.since < _LULL_RECORDS for source in self._sources)
        timer = self._loop.call_later(_LULL if lull else _GATHER, self._gathered.set)
        await self._gathered.wait()
        timer.cancel()

    def _hurry(self) -> None:
        self._wake.set()
        self._gathered.set()

    async def _pause(self) -> bool:
        """Wait before the next attempt; True when the daemon ends meanwhile, for whom nobody would wait."""
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._stopping.wait(), _RETRY)
        return self._stopping.is_set()

    def _take_notes(self) -> None:
        """Turn what the worker found about the files into records."""
        assert self._intake is not None
        notes, self._trail.notes = self._trail.notes, []
        seen: list[dict[str, Any]] = []
        for note in notes:
            if note.data in seen:
                continue
            seen.append(note.data)
            self._intake.append_gap(note)
            if note.why == RETENTION:
                # Sealed before anything is deleted: nobody without the key can explain missing files like this.
                self._intake.chain.seal(utc_now())
                self._trail.retired(self._intake.chain.seq, note.files)
            self._wake.set()

    def _look_ahead(self) -> None:
        """Raise or end the alarm of a trail that fills up too fast, and set the budgets by it."""
        assert self._intake is not None
        outlook = self._trail.outlook
        if outlook is not None:
            self.metrics.set_lifetime(outlook.lifetime)
        short = outlook is not None and outlook.short
        self._intake.budgets.tighten(short)
        if short != (self.alarm is not None):
            self.alarm = _too_fast(outlook, self._limits) if short and outlook is not None else None
            self._report()

    def _block(self, why: str) -> None:
        if self.blocked != why:
            self.blocked = why
            self.metrics.set_blocked(True)
            self._report()

    def _unblock(self) -> None:
        if self.blocked is not None:
            self.blocked = None
            self.metrics.set_blocked(False)
            self._report()

    def _report(self) -> None:
        for source in self._sources:
            source.report(blocked=self.blocked, alarm=self.alarm)


def _too_fast(outlook: Outlook, limits: Limits) -> str:
    room = limits.keep_files * limits.rotate_size >> 20
    return (
        f"the audit trail fills up: at this pace its {room} MiB reach back {_days(outlook.lifetime)}, and "
        f"{_days(limits.min_age)} are wanted; see 'isolator audit query --type audit.summary --since 1d' for a cause "
        "of noise, or give it more room (keep_files under [audit] in host.toml)"
    )


def _days(seconds: float) -> str:
    for size, unit in ((86400, "days"), (3600, "hours"), (60, "minutes")):
        if seconds >= 2 * size:
            return f"{seconds / size:.0f} {unit}"
    return f"{seconds:.0f} seconds"


def _reason(error: BaseException) -> str:
    if isinstance(error, OSError):
        name = f" ({Path(os.fsdecode(error.filename)).name})" if error.filename else ""
        return f"the audit trail cannot be written: {error.strerror or error}{name}"
    return f"the audit trail cannot be written: {error}"
