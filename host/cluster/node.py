"""A host of a cluster: it reads the log, folds it, and writes what this host decides and emits.

Reading decides everything. What is kept over a restart is the fold, with its place, and the outbox; leases are the
log's. A new process begins a new session, and acts on nothing before it has read back its first decision: so neither a
deadline nor a decision in flight has to be handed on, and what the one before had in flight cannot count any more once
that has been read.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import logging
import math
import secrets
import sqlite3
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final

from host.cluster.clock import Clock, Handle
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
    encode,
    next_session,
    subject,
)
from host.cluster.fold import Applied, Shard, State, fold
from host.cluster.follower import Fences, Follower
from host.cluster.lease import Fence, Watch
from host.cluster.log import Entered, Facts, Log, LogFullError, LogRefusedError, LogUnavailableError
from host.cluster.outbox import Outbox, OutboxFullError, read_back
from host.cluster.problems import FINAL, Kind, Problems, StoppedError
from host.cluster.store import FoldStore, keep_log, kept, make_tables
from host.database import Store as Database

TICK: Final = 0.25
"""Seconds between two readings, should nobody wake this host."""
EXAMINE: Final = 10.0
"""Seconds between two looks at the log's bounds."""
LASTS: Final = 3.0
"""Seconds for which the log may be without an answer before that is a problem."""
_RETRY = 1.0
_DIGESTS = 4096
_CLAIMS = 200
"""Claims in one message."""
_POSITIONS = 110_000
"""Bytes of positions in one beat, by estimate."""
_logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Settings:
    """This host in its cluster. ``outbox``: bytes of events that may wait for the log."""

    host: str
    labels: tuple[str, ...] = ()
    version: str = ""
    outbox: int = 256 << 20


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
        self.host, self.log, self.state = settings.host, log, State()
        self.problems = Problems(notice)
        self._settings, self._database, self._follower, self._fences = settings, database, follower, fences
        self._clock, self._random = clock or Clock(), random
        self._outbox = Outbox(database, settings.host, settings.outbox, random)
        self._store = FoldStore(database)
        self._held: dict[Shard, int] = {}
        """The shards that the follower has, with their epochs."""
        self._released: set[Shard] = set()
        self._positions: dict[Shard, Position] = {}
        self._digests: OrderedDict[int, str] = OrderedDict()
        self._differs: dict[str, bool] = {}
        self._extended: dict[str, float] = {}
        self._since: dict[Kind, float] = {}
        """Since when the log has not answered."""
        self._unsent, self._events_back = asyncio.Event(), asyncio.Event()
        self._over, self._leaving = True, False
        self._timer: Handle | None = None
        self._task: asyncio.Task[None] | None = None
        self._begin_life(0)

    def _begin_life(self, place: int) -> None:
        """Begin at a place of the log as a process does that has just started."""
        self._place = place
        """Up to here the log was read; entries that nobody can read included."""
        self._fence, self._watch = Fence(), Watch(self.host, self._clock.now())
        self._decisions = Decisions(self.host, self.log, self._fence, self._clock, self._rest, self._writes)
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
        self.state = self._store.load()
        self._begin_life(self.state.place)
        self._task = asyncio.create_task(self._run(), name="cluster")

    async def close(self) -> None:
        """End, as a process does; leases and outbox stay as they are."""
        if self._timer is not None:
            self._timer.cancel()
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
        try:
            ref = self._outbox.put(db, entry)
        except OutboxFullError as error:
            self.problems.begin("outbox_full", str(error))
            raise
        self._unsent.set()
        return ref

    async def decide(self, entry: Entry) -> Applied:
        """Write a decision; returns its fate when it was read back.

        Raises LogUnavailableError when that takes too long: whether it counts is unknown then, as after a lost reply.
        Raises ValueError for an entry that no message holds.
        """
        if final := next((line for kind, line in self.problems.lines.items() if kind in FINAL), None):
            raise LogUnavailableError(final)
        if isinstance(entry, Release):
            self._released.add((entry.plugin, entry.shard))
        return await self._decisions.write(entry)

    def changed(self) -> None:
        """Have the next beat sent soon (0.2 s): positions or readiness have changed."""
        self._decisions.changed()

    def may_act(self, plugin: str) -> bool:
        """Whether shards of a plugin that this host holds may be acted on now."""
        held = any(shard[0] == plugin and shard not in self._released for shard in self._held)
        return held and self._fence.may_act(self._clock.now())

    @property
    def held(self) -> dict[Shard, int]:
        """The shards that this host holds, with their epochs."""
        return dict(self._held)

    @property
    def deadline(self) -> float:
        """Until when this host may act, by its clock."""
        return self._fence.deadline

    @property
    def is_member(self) -> bool:
        """Whether this host's decisions come back at the moment."""
        return self._came_back and self._fence.may_act(self._clock.now())

    def waiting(self) -> tuple[int, int]:
        """How many events of this host wait for the log, and their bytes."""
        return self._outbox.waiting()

    def is_silent(self, host: str) -> bool:
        """Whether nothing new has come of a host for so long that others take its shards."""
        return self._watch.is_silent(host, self._clock.now())

    async def leave(self) -> None:
        """Give up every shard, each when nothing of it is in flight, and take no other; raises LogUnavailableError."""
        self._leaving = True
        for shard, epoch in [*self._held.items()]:
            await self._follower.drain(shard)
            await self.decide(Release(*shard, epoch))
        self.changed()

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
                await self._clock.sleep(_RETRY)
            except Exception as error:
                _logger.exception("cluster: the log cannot be followed any more")
                self._give_up(f"the log cannot be followed: {error}")
                raise

    async def _live(self) -> None:
        """Follow the log until this host has to stop, or begin anew."""
        facts = await self._usable_log()
        self._begin_life(self._place)
        await self._read(facts.last)
        await self._begin_session()
        tasks = [asyncio.create_task(self._decisions.run()), asyncio.create_task(self._send_events())]
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

        self._decisions.begin(await self._database.run(write))

    def _give_up(self, why: str) -> None:
        self._decisions.end(why)
        for shard in [*self._held]:
            self._lose(shard, why)
        self._fence = Fence()
        self._set_over()

    async def _usable_log(self) -> Facts:
        """The log's facts, once it answers and is this cluster's; an unusable one is looked at again and again."""
        while True:
            try:
                facts = await self.log.facts()
                self._check(facts)
            except LogUnavailableError as error:
                self._reads(error)
            except StoppedError as stopped:
                self._reads(None)
                self.problems.begin(stopped.kind, stopped.line)
                if stopped.kind == "log_lost":
                    await self._fold_again()
                    continue
            else:
                self._reads(None)
                self.problems.end("refused", "settings", "another_log", "trimmed")
                await self._database.run(functools.partial(keep_log, created=facts.created))
                return facts
            await self._clock.sleep(_RETRY)

    def _check(self, facts: Facts) -> None:
        """Raise StoppedError for a log that this host cannot follow from where it is."""
        known = self._database.read(kept).log
        if facts.wrong:
            raise StoppedError("settings", f"the log cannot be used: {'; '.join(facts.wrong)}")
        if known and facts.created != known:
            raise StoppedError(
                "another_log",
                f"this is another cluster's log (made {facts.created}, this host follows one made {known}): "
                "see [cluster] servers in host.toml, or have this host leave its cluster first: isolator cluster leave",
            )
        if facts.last < self._place:
            raise StoppedError(
                "log_lost",
                f"the log ends at {facts.last}, and this host has read it up to {self._place}: "
                "its servers lost the rest",
            )
        if facts.first > self._place + 1:
            raise StoppedError(
                "trimmed",
                f"the log begins at {facts.first} and this host has read it up to {self._place}: "
                "it cannot know what was decided between, so it holds nothing; its events wait in its outbox",
            )

    async def _fold_again(self) -> None:
        """Empty the fold, which knows entries that the log has lost."""

        def empty(db: sqlite3.Connection) -> None:
            self._store.reset(db)
            self._follower.again(db)

        await self._database.run(empty)
        self.state, self._place = self._store.load(), 0
        self._digests.clear()

    # Reading

    async def _read(self, end: float = math.inf) -> None:
        while self._place < end:
            if self._clock.now() - self._examined >= EXAMINE:
                await self._examine()
            if not await self._step():
                with contextlib.suppress(LogUnavailableError):
                    await self.log.wait(TICK)

    async def _void_leases(self) -> None:
        """Have no lease count that the lost entries may have ended: nobody knows who was promised what."""
        while "log_lost" in self.problems.lines:
            with contextlib.suppress(LogUnavailableError):
                await self.decide(VoidLeases("the log lost its newest entries"))
                self.problems.end("log_lost")

    async def _examine(self) -> None:
        self._examined = self._clock.now()
        with contextlib.suppress(LogUnavailableError):
            self._check(await self.log.facts())

    async def _step(self) -> bool:
        """Read the next message, if there is one, and act on it."""
        try:
            entered = await self.log.after(self._place)
        except LogUnavailableError as error:
            self._reads(error)
            await self._clock.sleep(TICK)
            return False
        self._reads(None)
        if entered is None:
            return False
        if entered.place > self._place + 1:
            # A place that was never filled, or what was there is gone: the servers keep a log for so long only.
            with contextlib.suppress(LogUnavailableError):
                self._check(await self.log.facts())
                await self._take(entered)
            return True
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
            self._place = entered.place
            return
        member = self.state.member(message.host)
        before = member.decisions if message.stream == "ctl" else member.events
        applied = fold(self.state, self._store, message, entered.place, entered.time)
        self._place = entered.place
        taken = _taken(before, applied, self.state, message) if message.host == self.host else []
        if taken and message.stream == "ev" and not self._outbox.is_own(taken):
            if self._decisions.session:
                raise StoppedError("twin", self._twin("an event"))
            # This database is an earlier copy: it has given numbers again that the log has.
            await self._database.run(self._outbox.renew)
        await self._keep(message, applied, taken)
        now = self._clock.now()
        self._watch.look(self.state, now)
        self._compare(message)
        if message.host == self.host:
            self._read_own(message, taken, now)
        if message.stream == "ctl":
            for one in applied:
                if isinstance(one.entry, Plugin) and one.entry.placement == "all" and not one.void:
                    self._fences.free(one.entry.name)
            self._settle()

    async def _keep(self, message: Message, applied: list[Applied], taken: Sequence[Applied]) -> None:
        changes, state = self._store.changes(self.state, message.host), self.state
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
        """Compare this host's fold with those that beats tell of; raises StoppedError if half of the hosts differ."""
        self._digests[self.state.place] = self.state.digest
        if len(self._digests) > _DIGESTS:
            self._digests.popitem(last=False)
        for beat in message.entries:
            known = self._digests.get(beat.place) if isinstance(beat, Beat) and message.host != self.host else None
            if isinstance(beat, Beat) and known is not None:
                self._differs[message.host] = known != beat.digest
        alive = {host for host in self.state.members if host == self.host or not self.is_silent(host)}
        differing = sorted(host for host, differs in self._differs.items() if differs and host in alive)
        if differing and 2 * len(differing) >= len(alive):
            raise StoppedError(
                "diverged",
                f"the log means something else to {', '.join(differing[:5])} than to this host: a host or a server is "
                "damaged; this host holds nothing until its daemon is started again",
            )

    def _read_own(self, message: Message, taken: Sequence[Applied], now: float) -> None:
        """Act on what stands in the log under this host's name; raises StoppedError if another host wrote it."""
        if message.stream == "ev":
            if "outbox_full" in self.problems.lines:
                self.problems.end("outbox_full")
            self._events_back.set()
            return
        session = self._decisions.session
        if not taken or not session or taken[-1].ref.series < session:
            return
        if taken[-1].ref.series > session or not all(map(self._decisions.applied, taken)):
            raise StoppedError("twin", self._twin("a decision"))
        last = taken[-1].ref
        self._fence.read_back(Number(last.series, last.number), now)
        self._came_back = True

    def _twin(self, what: str) -> str:
        return (
            f"{what} stands in the log under the name {self.host} that this host did not write: another daemon has "
            "this name, or a copy of this disk runs; give one of them another [cluster] name, then restart this daemon"
        )

    def _settle(self) -> None:
        """Tell the follower what it holds now, and until when."""
        mine = {shard: one.epoch for shard, one in self.state.leases.items() if one.holder == self.host}
        for shard, epoch in [*self._held.items()]:
            if mine.get(shard) != epoch:
                self._lose(shard, self._fate_of(shard))
        if not self._came_back:
            return
        for shard, epoch in mine.items():
            if shard not in self._held:
                self._held[shard] = epoch
                self._released.discard(shard)
                self._fences.hold(shard[0], self._fence.deadline)
                self._follower.held(shard, epoch, self.state.positions.get(shard) or Position(*shard, epoch))
        for name in {shard[0] for shard in self._held}:
            if self._extended.get(name, 0.0) + 1.0 <= self._fence.deadline:
                self._extended[name] = self._fence.deadline
                self._fences.hold(name, self._fence.deadline)
        self._set_over()

    def _fate_of(self, shard: Shard) -> str:
        lease = self.state.leases.get(shard)
        if lease is not None:
            return f"held by {lease.holder}"
        freed = self.state.freed.get(shard)
        return "released" if freed is not None and freed.drained else "freed"

    def _lose(self, shard: Shard, why: str) -> None:
        del self._held[shard]
        self._positions.pop(shard, None)
        drained = shard in self._released
        self._released.discard(shard)
        self._follower.lost(shard, why)
        if not drained or not any(name == shard[0] for name, _ in self._held):
            # The cage may have work of this shard in it, so it ends although it serves others, too.
            self._fences.lost(shard[0])
            self._extended.pop(shard[0], None)

    def _set_over(self) -> None:
        """Note whether the deadline is over, now and when it will be."""
        now = self._clock.now()
        over = not self._fence.may_act(now)
        if over != self._over:
            self._over = over
            self._follower.fenced(over)
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if not over:
            self._timer = self._clock.call_later(self._fence.deadline - now, self._set_over)

    # Writing

    def _rest(self) -> Sequence[Entry]:
        """The claims of the moment, and the beat."""
        now = self._clock.now()
        claims: list[Entry] = []
        if self._fence.is_steady(now) and not self._leaving:
            claims += [self.state.claim(shard) for shard in self._watch.claimable(self.state, now)[:_CLAIMS]]
        beat = Beat(
            labels=self._settings.labels,
            version=self._settings.version,
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

    async def _send_events(self) -> None:
        while True:
            message = await self._outbox.batch(self.state.member(self.host).events)
            if message is None:
                await self._unsent.wait()
                self._unsent.clear()
                continue
            body, last = encode(message), message.first.number + len(message.entries) - 1
            self._events_back.clear()
            try:
                await self.log.append(subject(self.host, "ev"), body)
                self._writes(None)
            except LogUnavailableError as error:
                self._writes(error)
            if not self._has(Number(message.first.series, last)):
                await self._clock.event(self._events_back, AGAIN)

    def _has(self, number: Number) -> bool:
        log = self.state.member(self.host).events
        return log.series == number.series and log.number >= number.number

    def _reads(self, error: LogUnavailableError | None) -> None:
        """Note how the log answers those who read."""
        kind: Kind = "refused" if isinstance(error, LogRefusedError) else "unreachable"
        self._lasting(kind, error, "the log does not answer")

    def _writes(self, error: LogUnavailableError | None) -> None:
        """Note how the log answers those who write."""
        if isinstance(error, LogFullError | LogRefusedError):
            self.problems.begin(
                "full" if isinstance(error, LogFullError) else "refused", f"the log takes nothing: {error}"
            )
            return
        if error is None:
            self.problems.end("full", "refused")
        self._lasting("unwritable", error, "the log takes nothing, perhaps its servers have no quorum")

    def _lasting(self, kind: Kind, error: LogUnavailableError | None, what: str) -> None:
        """Have a problem that lasts; elections of the servers' leader do not."""
        now = self._clock.now()
        if error is None:
            self._since.pop(kind, None)
            self.problems.end(kind)
        elif now - self._since.setdefault(kind, now) >= LASTS or kind == "refused":
            self.problems.begin(kind, f"{what}: {error}")


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
