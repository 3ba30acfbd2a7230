"""One life of a host in its cluster: it begins a session, reads the log, and writes what this host decides and emits.

A life ends when the host has to stop, or to begin anew as a process does that has just started.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
import sqlite3
from collections.abc import Callable, Sequence
from typing import Final

from host.cluster import entries
from host.cluster.beats import Agreement, Beats
from host.cluster.decisions import Decisions
from host.cluster.fold import Applied, State, fold
from host.cluster.lease import Fence, Watch
from host.cluster.log import Entered, LogUnavailableError
from host.cluster.outbox import read_back
from host.cluster.parts import Parts
from host.cluster.problems import StoppedError
from host.cluster.store import kept
from host.cluster.unheld import Unheld
from isolator.ipc.tasks import cancel_all

TICK: Final = 0.25
"""Seconds between two readings, should nobody wake this host."""
EXAMINE: Final = 10.0
"""Seconds between two looks at the log's bounds."""
PUT_BACK: Final = (
    "this host's database is an earlier copy: the log has events of this host that it does not know; it goes on under "
    "new numbers, and events that it had accepted after that copy and not sent are lost"
)


class Life:
    """Knowledge of this host by what it has read in this life. ``parting``: how it is about to end its part, if so."""

    def __init__(self, parts: Parts, parting: Callable[[], entries.Parting]) -> None:
        self._parts, self._host, self._log, self._clock = parts, parts.host, parts.log, parts.clock
        self._footing, self._database, self._follower = parts.footing, parts.database, parts.follower
        self._holding, self._outbox = parts.holding, parts.outbox
        self._problems, self._troubles = parts.problems, parts.troubles
        self._agreement = Agreement()
        fence = parts.holding.fence = Fence()
        self.watch = Watch(parts.host, parts.clock.now())
        self.watch.look(parts.footing.state, parts.clock.now())
        self.beats = Beats(parts, self.watch, fence, parting)
        self.decisions = Decisions(parts, fence, self._rest, self.beats.due)
        self.unheld = Unheld()
        self.came_back = False
        """A decision of this life was read back."""
        self._examined = -EXAMINE

    async def run(self, end: int) -> None:
        """Read up to the log's ``end``, begin a session, and follow the log; raises StoppedError."""
        parts = self._parts
        await self._read(end)
        self._follower.read_up()
        await self._begin_session()
        tasks = [
            asyncio.create_task(self.decisions.run()),
            asyncio.create_task(parts.events.run(lambda: parts.footing.state.member(parts.host))),
        ]
        tasks.append(asyncio.create_task(self._read()))
        if "log_lost" in parts.problems.lines:
            tasks.append(asyncio.create_task(self._void_leases()))
        try:
            await asyncio.wait(tasks, return_when=asyncio.FIRST_EXCEPTION)
            for task in tasks:
                if task.done():
                    task.result()
        finally:
            await cancel_all(tasks)

    def give_up(self, why: str) -> None:
        """Decide and hold nothing any more."""
        self.decisions.end(why)
        self._parts.holding.give_up(why)
        self.beats.forget()

    @property
    def _state(self) -> State:
        return self._footing.state

    def look_soon(self) -> None:
        """Have the log examined before it is read on: it may have lost what was read."""
        self._examined = -EXAMINE

    async def _begin_session(self) -> None:
        parts = self._parts
        own = parts.footing.state.member(parts.host)

        if self._database.read(lambda db: parts.outbox.is_earlier_copy(db, own)):
            self._problems.begin("put_back", PUT_BACK)

        def write(db: sqlite3.Connection) -> int:
            session = entries.next_session(max(own.decisions.series, kept(db).session), parts.random(20))
            db.execute("UPDATE cluster_self SET session=?", (session,))
            parts.outbox.fit(db, own)
            return session

        self.decisions.begin(await parts.footing.write(write))

    def _rest(self) -> Sequence[entries.Claim | entries.Beat]:
        self._look_at_plugins()
        rest, more = self.beats.rest()
        if more:
            self.decisions.changed()
        return rest

    def _look_at_plugins(self) -> None:
        """Say which plugins nobody can hold, while this host knows what the others do."""
        now = self._clock.now()
        if not self._holding.fence.is_steady(now):
            return
        self._problems.end("put_back")
        self.unheld.look(self._state, self.watch.alive(self._state, now), now)
        line = self.unheld.line
        if line is None:
            self._problems.end("unheld")
        else:
            self._problems.begin("unheld", line)

    # Reading

    async def _read(self, end: float = math.inf) -> None:
        while self._footing.place < end:
            if self._clock.now() - self._examined >= EXAMINE and not await self._examine():
                await self._clock.sleep(TICK)
            elif not await self._step():
                with contextlib.suppress(LogUnavailableError):
                    await self._log.wait(TICK)

    async def _void_leases(self) -> None:
        """Have no lease count that the lost entries may have ended: nobody knows who was promised what."""
        while "log_lost" in self._problems.lines:
            with contextlib.suppress(LogUnavailableError):
                await self.decisions.write(entries.VoidLeases("the log lost its newest entries"))
                self._problems.end("log_lost")

    async def _examine(self) -> bool:
        """Look whether the log is still the one that was read; whether reading may go on."""
        if not await self._footing.is_sure():
            return False
        self._examined = self._clock.now()
        footing = self._footing
        if self._parts.copies is not None and footing.facts is not None:
            self._parts.copies.look(footing.facts, footing.state.place, footing.state.time)
        return True

    async def _step(self) -> bool:
        """Read the next message, if there is one, and act on it."""
        try:
            entered = await self._log.after(self._footing.place)
        except LogUnavailableError as error:
            self._troubles.reads(error)
            self.look_soon()  # servers that come back may have lost what they had
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
            message = entries.decode(entered.subject, entered.body)
        except ValueError as error:
            host = entered.subject.rpartition(".")[2]
            if isinstance(error, entries.UnknownFormatError) and host not in self._parts.settings.distrusted:
                remedy = f"until it is updated, or [cluster] distrusted names {host} as a hostile host"
                line = f"{entered.subject} holds {error}: this host holds nothing {remedy}"
                raise StoppedError("newer_version", line) from None
            line = f"{entered.subject[:100]!r} holds what no host writes, at {entered.place}: it is passed over"
            self._problems.begin("unreadable", line)
            self._footing.read(entered)
            return
        member = self._state.member(message.host)
        before = member.decisions if message.stream == "ctl" else member.events
        said = member.beat
        applied = fold(self._state, self._footing.store, message, entered.place, entered.time)
        mark = self._footing.read(entered)
        taken = _taken(before, applied, self._state, message) if message.host == self._host else []
        if taken and message.stream == "ev" and not self._outbox.is_own(taken):
            if self.decisions.session:
                raise StoppedError("twin", self._twin("an event"))
            # It has given numbers again that the log has.
            self._problems.begin("put_back", PUT_BACK)
            await self._footing.write(self._outbox.renew)
        await self._keep(message, applied, taken, mark)
        now = self._clock.now()
        self.watch.look(self._state, now)
        self._compare(message)
        if message.host == self._host:
            self._read_own(message, taken, now)
        if message.stream == "ctl":
            for one in applied:
                if isinstance(one.entry, entries.Plugin) and one.entry.placement == "all" and not one.void:
                    self._parts.fences.free(one.entry.name)
            self.beats.drop(self._holding.follow(self._state, came_back=self.came_back))
            if _may_be_claimed(applied, said, self._state.member(message.host).beat):
                self.decisions.changed()

    async def _keep(
        self, message: entries.Message, applied: list[Applied], taken: Sequence[Applied], mark: str
    ) -> None:
        state = self._state
        changes = self._footing.store.changes(state, message.host, mark)
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

    def _compare(self, message: entries.Message) -> None:
        """Compare this host with the one whose beats these are; raises StoppedError."""
        self._agreement.folded(self._state)
        if message.host == self._host or not self.decisions.session:
            return  # beats from before this life may be about entries that the log has lost
        now = self._clock.now()
        for beat in message.entries:
            if isinstance(beat, entries.Beat):
                self._parts.clocks[message.host] = beat.clock - self._clock.wall()
                alive = self.watch.alive(self._state, now)
                if not self._agreement.compare(message.host, beat, alive, now):
                    self.look_soon()  # the log may have lost what one of both has read

    def _read_own(self, message: entries.Message, taken: Sequence[Applied], now: float) -> None:
        """Act on what stands in the log under this host's name; raises StoppedError if another host wrote it."""
        if message.stream == "ev":
            if "outbox_full" in self._problems.lines:
                self._problems.end("outbox_full")
            if taken:  # what counts for nothing is sent again after a while, not at once
                self._parts.events.back.set()
            return
        session = self.decisions.session
        if not taken or not session or taken[-1].ref.series < session:
            return
        if taken[-1].ref.series > session or not all(map(self.decisions.applied, taken)):
            raise StoppedError("twin", self._twin("a decision"))
        last = taken[-1].ref
        self._holding.fence.read_back(entries.Number(last.series, last.number), now)
        self.came_back = True

    def _twin(self, what: str) -> str:
        return (
            f"{what} stands in the log under the name {self._host} that this host did not write: another daemon has "
            "this name, or a copy of this disk runs; give one of them another [cluster] name, then isolator reload here"
        )


def _may_be_claimed(applied: Sequence[Applied], before: entries.Beat, after: entries.Beat) -> bool:
    """Whether a host's message may have made something claimable: it need not wait for the next beat."""
    freed = any(isinstance(one.entry, entries.Plugin | entries.Release) and not one.void for one in applied)
    return freed or (before.ready, before.labels) != (after.ready, after.labels)


def _taken(before: entries.Number, applied: Sequence[Applied], state: State, message: entries.Message) -> list[Applied]:
    """Those of a message's entries whose turn it was, whether they count or not."""
    member = state.member(message.host)
    after = member.decisions if message.stream == "ctl" else member.events
    return [
        one
        for one in applied
        if one.ref.series == after.series
        and (before.number if before.series == after.series else 0) < one.ref.number <= after.number
    ]
