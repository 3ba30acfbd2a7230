"""A host of a cluster: it reads the log, folds it, and writes what this host decides and emits.

Reading decides everything. What is kept over a restart is the fold, with its place, and the outbox; leases are the
log's. A new process begins a new session, and acts on nothing before it has read back its first decision: so neither a
deadline nor a decision in flight has to be handed on, and what the one before had in flight cannot count any more once
that has been read.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import secrets
import sqlite3
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final, TypeVar

from host.cluster import snapshots
from host.cluster.agreement import Agreement
from host.cluster.clock import Clock
from host.cluster.decisions import AGAIN, Decisions
from host.cluster.entries import (
    Beat,
    Entry,
    Event,
    EventRef,
    Message,
    Number,
    Plugin,
    Position,
    Release,
    Replay,
    UnknownFormatError,
    VoidLeases,
    decode,
    next_session,
)
from host.cluster.events import Events
from host.cluster.fold import Applied, Shard, State, fold
from host.cluster.follower import Fences, Follower
from host.cluster.footing import RETRY, Footing
from host.cluster.holding import Holding
from host.cluster.lease import HOLD, Fence, Watch
from host.cluster.log import Entered, Facts, Log, LogUnavailableError
from host.cluster.outbox import Outbox, OutboxFullError, read_back
from host.cluster.problems import FINAL, Kind, LogTroubles, Problems, StoppedError
from host.cluster.store import keep_log, kept, make_tables
from host.database.store import Store as Database
from isolator.errors import IsolatorError

TICK: Final = 0.25
"""Seconds between two readings, should nobody wake this host."""
EXAMINE: Final = 10.0
"""Seconds between two looks at the log's bounds."""
_CLAIMS = 200
"""Claims in one message."""
_POSITIONS = 110_000
"""Bytes of positions in one beat, by estimate."""
_logger = logging.getLogger(__name__)
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Settings:
    """This host in its cluster. ``outbox``: bytes of events that may wait for the log.

    ``snapshots`` is a folder for copies of the fold, which new hosts need once the log's beginning is gone.
    """

    host: str
    labels: tuple[str, ...] = ()
    version: str = ""
    outbox: int = 256 << 20
    snapshots: Path | None = None


class Node:
    """This host in its cluster. ``notice``: a problem begins, with its line, or ends (None)."""

    def __init__(
        self,
        settings: Settings,
        log: Log,
        database: Database,
        follower: Follower,
        fences: Fences,
        *,
        clock: Clock | None = None,
        notice: Callable[[Kind, str | None], None] = lambda _, __: None,
        random: Callable[[int], int] = secrets.randbits,
    ) -> None:
        self.host, self.log = settings.host, log
        self.problems = Problems(notice)
        self.settings = settings
        self.clocks: dict[str, float] = {}
        """Seconds by which the wall clocks of other hosts were ahead of this one's when their newest beat was read."""
        self._database, self._follower, self._fences = database, follower, fences
        self._clock, self._random = clock or Clock(), random
        self._snapshots: snapshots.Snapshots | None = None
        if settings.snapshots is not None:
            self._snapshots = snapshots.Snapshots(settings.host, database, settings.snapshots)
            for subject_asked in (snapshots.EVERYBODY, snapshots.subject_of(settings.host)):
                log.answer(subject_asked, self._snapshots.answer)
        self._outbox = Outbox(database, settings.host, settings.outbox, random)
        self._holding = Holding(settings.host, follower, fences, self._clock)
        self._troubles = LogTroubles(self.problems, self._clock)
        self._footing = Footing(log, database, follower, self._clock, self.problems, self._troubles)
        self._positions: dict[Shard, Position] = {}
        self._events = Events(settings.host, self._outbox, log, self._clock, self._footing.write, self._troubles.writes)
        self._leaving = False
        self._task: asyncio.Task[None] | None = None
        self._copying: asyncio.Task[None] | None = None
        self._begin_life()

    def _begin_life(self) -> None:
        """Begin as a process does that has just started."""
        self._agreement = Agreement()
        fence = self._holding.fence = Fence()
        self._watch = Watch(self.host, self._clock.now())
        self._decisions = Decisions(self.host, self.log, fence, self._clock, self._rest, self._troubles.writes)
        self._came_back = False
        """A decision of this life was read back."""
        self._examined = -EXAMINE

    # For the rest of this host

    async def start(self) -> None:
        """Take the fold and the outbox up from the database, and begin to follow the log."""

        def open_tables(db: sqlite3.Connection) -> None:
            make_tables(db, self.host, self._outbox.new_generation())
            self._outbox.open(db)

        await self._database.run(open_tables)
        self._footing.load()
        self._begin_life()
        self._task = asyncio.create_task(self._run(), name="cluster")

    async def close(self) -> None:
        """End, as a process does; leases and outbox stay as they are."""
        self._holding.close()
        if self._copying is not None:
            await asyncio.gather(self._copying, return_exceptions=True)
        if self._task is not None:
            self._task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._task
        self._decisions.end("this host ends")
        await self.log.close()

    def emit(self, db: sqlite3.Connection, entry: Event | Replay) -> EventRef:
        """Number an event for all hosts, in the caller's transaction, which may run again; durable when that is.

        Raises OutboxFullError before anything was written, IsolatorError for one that no message holds.
        """
        if "left" in self.problems.lines:
            raise IsolatorError("the cluster", self.problems.lines["left"])
        try:
            ref = self._outbox.put(db, entry)
        except OutboxFullError as error:
            self.problems.begin("outbox_full", str(error))
            raise
        self._events.unsent.set()
        return ref

    async def decide(self, entry: Entry) -> Applied:
        """Write a decision; returns its fate when it was read back.

        Raises LogUnavailableError when that takes too long: whether it counts is unknown then, as after a lost reply.
        Raises ValueError for an entry that no message holds.
        """
        if final := next((line for kind, line in self.problems.lines.items() if kind in FINAL), None):
            raise LogUnavailableError(final)
        if isinstance(entry, Release):
            self._holding.release(entry)
        try:
            return await self._decisions.write(entry)
        except LogUnavailableError:
            if isinstance(entry, Release) and not self._decisions.is_flying(entry):
                self._holding.keep(entry)  # it was never sent
            raise

    def changed(self) -> None:
        """Have the next beat sent soon (0.2 s): positions or readiness have changed."""
        self._decisions.changed()

    def may_act(self, plugin: str) -> bool:
        """Whether shards of a plugin that this host holds may be acted on now."""
        return self._holding.may_act(plugin)

    @property
    def held(self) -> dict[Shard, int]:
        """The shards that this host holds, with their epochs."""
        return dict(self._holding.epochs)

    @property
    def deadline(self) -> float:
        """Until when this host may act, by its clock."""
        return self._holding.fence.deadline

    @property
    def is_member(self) -> bool:
        """Whether this host's decisions come back at the moment."""
        return self._came_back and self._holding.fence.may_act(self._clock.now())

    @property
    def state(self) -> State:
        """The fold; another object after the log had to be read again."""
        return self._footing.state

    @property
    def facts(self) -> Facts | None:
        """The log as its servers described it last."""
        return self._footing.facts

    @property
    def place(self) -> int:
        """Up to where this host has read the log."""
        return self._footing.place

    def waiting(self) -> tuple[int, int]:
        """How many events of this host wait for the log, and their bytes."""
        return self._outbox.waiting()

    def is_silent(self, host: str) -> bool:
        """Whether nothing new has come of a host for so long that others take its shards."""
        return self._watch.is_silent(host, self._clock.now())

    async def leave(self, *, force: bool = False) -> int:
        """End this host's part in this cluster; returns how many events stay in the outbox, as ``force`` allows.

        Every shard is released when nothing of it is in flight, the outbox is emptied, and the fold forgotten: the next
        start joins as a new host does, be it another cluster. Raises LogUnavailableError, and goes on as before.
        """
        self._leaving = True
        try:
            for shard, epoch in self.held.items():
                await self._follower.drain(shard)
                await self.decide(Release(*shard, epoch))
            async with self._clock.limit(HOLD):
                while self.waiting()[0]:
                    await self._clock.event(self._events.back, AGAIN)
        except (LogUnavailableError, TimeoutError) as error:
            if not force:
                self._leaving = False
                why = str(error) or f"{self.waiting()[0]} events of this host are not in the log yet"
                raise LogUnavailableError(why) from None
        plugins = [*self.state.plugins]
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
        line = "this host has left its cluster: remove [cluster] from host.toml, then run isolator reload"
        self.problems.begin("left", line)
        self._give_up(line)
        await self._database.run(self._forget)
        for plugin in plugins:
            self._fences.free(plugin)
        return self.waiting()[0]

    def _forget(self, db: sqlite3.Connection) -> None:
        self._footing.store.reset(db)
        self._outbox.forget(db)
        self._follower.again(db)
        keep_log(db, "")

    # Life

    async def _run(self) -> None:
        while True:
            try:
                await self._live()
            except StoppedError as stopped:
                _logger.error("cluster: %s", stopped.line)
                self.problems.begin(stopped.kind, stopped.line)
                self._give_up(stopped.line)
                if stopped.kind in FINAL:
                    return
                await self._clock.sleep(RETRY)
            except Exception as error:  # a fault of this program's, which must not let it act on
                _logger.exception("cluster: the log cannot be followed any more")
                line = f"the log cannot be followed: {error!r}; see the daemon's log, then start it again"
                self.problems.begin("failed", line)
                self._give_up(line)
                return

    async def _live(self) -> None:
        """Follow the log until this host has to stop, or begin anew."""
        facts = await self._footing.usable_log()
        self._begin_life()
        await self._read(facts.last)
        await self._begin_session()
        tasks = [
            asyncio.create_task(self._decisions.run()),
            asyncio.create_task(self._events.run(lambda: self.state.member(self.host).events)),
        ]
        tasks.append(asyncio.create_task(self._read()))
        if "log_lost" in self.problems.lines:
            tasks.append(asyncio.create_task(self._void_leases()))
        try:
            await asyncio.wait(tasks, return_when=asyncio.FIRST_EXCEPTION)
            for task in tasks:
                if task.done():
                    task.result()
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _begin_session(self) -> None:
        own = self.state.member(self.host)

        def write(db: sqlite3.Connection) -> int:
            session = next_session(max(own.decisions.series, kept(db).session), self._random(20))
            db.execute("UPDATE cluster_self SET session=?", (session,))
            self._outbox.fit(db, own.events)
            return session

        self._decisions.begin(await self._footing.write(write))

    def _give_up(self, why: str) -> None:
        self._decisions.end(why)
        self._holding.give_up(why)
        self._positions.clear()

    # Reading

    async def _read(self, end: float = math.inf) -> None:
        while self._footing.place < end:
            if self._clock.now() - self._examined >= EXAMINE and not await self._examine():
                await self._clock.sleep(TICK)
            elif not await self._step():
                with contextlib.suppress(LogUnavailableError):
                    await self.log.wait(TICK)

    async def _void_leases(self) -> None:
        """Have no lease count that the lost entries may have ended: nobody knows who was promised what."""
        while "log_lost" in self.problems.lines:
            with contextlib.suppress(LogUnavailableError):
                await self.decide(VoidLeases("the log lost its newest entries"))
                self.problems.end("log_lost")

    async def _examine(self) -> bool:
        """Look whether the log is still the one that was read; whether reading may go on."""
        if not await self._footing.is_sure():
            return False
        self._examined = self._clock.now()
        facts = self._footing.facts
        if self._snapshots is not None and facts is not None and (self._copying is None or self._copying.done()):
            made = self._snapshots.keep_up(facts, self.state.place, self.state.time)
            self._copying = asyncio.create_task(made, name="copy of the fold")
        return True

    async def _step(self) -> bool:
        """Read the next message, if there is one, and act on it."""
        try:
            entered = await self.log.after(self._footing.place)
        except LogUnavailableError as error:
            self._troubles.reads(error)
            self._examined = -EXAMINE  # servers that come back may have lost what they had
            return False
        self._troubles.reads(None)
        if entered is None:
            return False
        # A place that was never filled, or what was there is gone: the servers keep a log for so long only.
        if entered.place > self._footing.place + 1 and not await self._footing.is_sure():
            return False
        await self._take(entered)
        return True

    async def _take(self, entered: Entered) -> None:
        try:
            message = decode(entered.subject, entered.body)
        except UnknownFormatError as error:
            raise StoppedError(
                "newer_version", f"{entered.subject} holds {error}: this host holds nothing until it is updated"
            ) from None
        except ValueError:
            line = f"{entered.subject[:100]!r} holds what no host writes, at {entered.place}: it is passed over"
            self.problems.begin("unreadable", line)
            self._footing.read(entered)
            return
        member = self.state.member(message.host)
        before = member.decisions if message.stream == "ctl" else member.events
        applied = fold(self.state, self._footing.store, message, entered.place, entered.time)
        mark = self._footing.read(entered)
        taken = _taken(before, applied, self.state, message) if message.host == self.host else []
        if taken and message.stream == "ev" and not self._outbox.is_own(taken):
            if self._decisions.session:
                raise StoppedError("twin", self._twin("an event"))
            # This database is an earlier copy: it has given numbers again that the log has.
            await self._footing.write(self._outbox.renew)
        await self._keep(message, applied, taken, mark)
        now = self._clock.now()
        self._watch.look(self.state, now)
        self._compare(message)
        if message.host == self.host:
            self._read_own(message, taken, now)
        if message.stream == "ctl":
            for one in applied:
                if isinstance(one.entry, Plugin) and one.entry.placement == "all" and not one.void:
                    self._fences.free(one.entry.name)
            for shard in self._holding.follow(self.state, came_back=self._came_back):
                self._positions.pop(shard, None)

    async def _keep(self, message: Message, applied: list[Applied], taken: Sequence[Applied], mark: str) -> None:
        changes, state = self._footing.store.changes(self.state, message.host, mark), self.state
        back = taken[-1].ref if taken and message.stream == "ev" else None
        if back is not None and back.series != self._outbox.generation:
            back = None
        failed: list[Exception] = []

        def write(db: sqlite3.Connection) -> None:
            changes(db)
            if back is not None:
                read_back(db, back.number, state.time)
            try:
                self._follower.applied(db, state.place, state.time, applied)
            except sqlite3.Error:
                raise
            except Exception as error:  # nobody else would hear of it
                failed[:] = [error]
                raise

        self._database.submit(write)
        await self._database.committed()
        if failed:
            raise failed[0]
        self._follower.kept(state.place, state.time, applied)

    def _compare(self, message: Message) -> None:
        """Compare this host with the one whose beats these are; raises StoppedError."""
        self._agreement.folded(self.state)
        if message.host == self.host or not self._decisions.session:
            return  # beats from before this life may be about entries that the log has lost
        now = self._clock.now()
        for beat in message.entries:
            if isinstance(beat, Beat):
                self.clocks[message.host] = beat.clock - self._clock.wall()
                alive = (one for one in self.state.members if one == self.host or not self.is_silent(one))
                if not self._agreement.compare(message.host, beat, alive, now):
                    self._examined = -EXAMINE  # the log may have lost what one of both has read

    def _read_own(self, message: Message, taken: Sequence[Applied], now: float) -> None:
        """Act on what stands in the log under this host's name; raises StoppedError if another host wrote it."""
        if message.stream == "ev":
            if "outbox_full" in self.problems.lines:
                self.problems.end("outbox_full")
            self._events.back.set()
            return
        session = self._decisions.session
        if not taken or not session or taken[-1].ref.series < session:
            return
        if taken[-1].ref.series > session or not all(map(self._decisions.applied, taken)):
            raise StoppedError("twin", self._twin("a decision"))
        last = taken[-1].ref
        self._holding.fence.read_back(Number(last.series, last.number), now)
        self._came_back = True

    def _twin(self, what: str) -> str:
        return (
            f"{what} stands in the log under the name {self.host} that this host did not write: another daemon has "
            "this name, or a copy of this disk runs; give one of them another [cluster] name, then restart this daemon"
        )

    # Writing

    def _rest(self) -> Sequence[Entry]:
        """The claims of the moment, and the beat."""
        now = self._clock.now()
        claims: list[Entry] = []
        if self._holding.fence.is_steady(now) and not self._leaving:
            claims += [self.state.claim(shard) for shard in self._watch.claimable(self.state, now)[:_CLAIMS]]
        beat = Beat(
            labels=self.settings.labels,
            version=self.settings.version,
            clock=self._clock.wall(),
            place=self.state.place,
            digest=self.state.digest,
            ready=() if self._leaving else tuple(self._follower.ready()),
            positions=tuple(self._some_positions()),
        )
        return [*claims, beat]

    def _some_positions(self) -> list[Position]:
        self._positions |= {(one.plugin, one.shard): one for one in self._follower.positions()}
        found: list[Position] = []
        size = 0
        for shard, position in [*self._positions.items()]:
            size += 200 + 110 * (len(position.read) + len(position.open))
            if found and size > _POSITIONS:
                self._decisions.changed()
                break
            found.append(self._positions.pop(shard))
        return found


def _taken(before: Number, applied: Sequence[Applied], state: State, message: Message) -> list[Applied]:
    """Those of a message's entries whose turn it was, whether they count or not."""
    member = state.member(message.host)
    after = member.decisions if message.stream == "ctl" else member.events
    return [
        one
        for one in applied
        if one.ref.series == after.series
        and (before.number if before.series == after.series else 0) < one.ref.number <= after.number
    ]
