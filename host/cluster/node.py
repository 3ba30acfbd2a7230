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
import secrets
import sqlite3
from collections.abc import Callable, Mapping
from contextlib import AbstractAsyncContextManager
from pathlib import Path
from typing import Final

from host.cluster.clock import Clock
from host.cluster.decisions import AGAIN
from host.cluster.entries import Beat, Entry, Event, EventRef, Parting, Release, Replay
from host.cluster.fold import Applied, Shard, State
from host.cluster.follower import Follower
from host.cluster.footing import RETRY
from host.cluster.lease import HOLD, could_hold
from host.cluster.life import Life
from host.cluster.log import QUESTION, Facts, Log, LogUnavailableError
from host.cluster.outbox import OutboxFullError
from host.cluster.parts import Parts
from host.cluster.problems import FINAL, HARMLESS, OF_THE_LOG, Kind, Problems, StoppedError
from host.cluster.snapshots import EVERYBODY, Snapshots, subject_of
from host.cluster.store import keep_log, make_tables
from host.database.store import Store as Database
from host.fence.fences import Fences
from isolator.errors import IsolatorError
from isolator.ipc.tasks import cancel_all
from isolator.policy.cluster import Cluster

ANSWER: Final = 2.0
"""Seconds for an answer of another host."""
STOP: Final = 5.0
"""Seconds that a host which stops has for its releases."""
_logger = logging.getLogger(__name__)


class Node:
    """This host in its cluster. ``notice``: a problem begins, with its line, or ends (None).

    ``folder`` is for copies of the fold, which new hosts need once the log's beginning is gone.
    """

    def __init__(
        self,
        settings: Cluster,
        log: Log,
        database: Database,
        follower: Follower,
        fences: Fences,
        folder: Path | None = None,
        *,
        clock: Clock | None = None,
        notice: Callable[[Kind, str | None], None] = lambda _, __: None,
        random: Callable[[int], int] = secrets.randbits,
    ) -> None:
        self.host, self.log = settings.name, log
        self.problems = Problems(notice)
        self.settings = settings
        self.answers: list[Callable[[bytes], bytes | None]] = []
        """Those who answer other hosts' questions to this one, each its own kind; None: it is none."""
        copies: Snapshots | None = None
        if folder is not None:
            copies = Snapshots(self.host, database, folder)
            self.answers.append(copies.answer)
            log.answer(EVERYBODY, copies.answer)
        log.answer(subject_of(self.host), self._answered)
        parts = self._parts = Parts(
            settings, log, database, follower, fences, clock or Clock(), random, self.problems, copies
        )
        self._footing, self._outbox = parts.footing, parts.outbox
        self._events, self._holding = parts.events, parts.holding
        self._outbox.renumbered = follower.renumbered
        self._parting: Parting = ""
        self._task: asyncio.Task[None] | None = None
        self._life = self._new_life()

    def _new_life(self) -> Life:
        return Life(self._parts, lambda: self._parting)

    # For the rest of this host

    async def start(self) -> None:
        """Take the fold and the outbox up from the database, and begin to follow the log."""

        def open_tables(db: sqlite3.Connection) -> None:
            make_tables(db, self.host, self._outbox.new_generation())
            self._outbox.open(db)

        await self._parts.database.run(open_tables)
        self._footing.load()
        self._life = self._new_life()
        self._task = asyncio.create_task(self._run(), name="cluster")

    async def close(self) -> None:
        """End, as a process does; leases and outbox stay as they are."""
        self._holding.close()
        if self._parts.copies is not None:
            await self._parts.copies.close()
        if self._task is not None:
            self._task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._task
        self._life.decisions.end("this host ends")
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
        if line := next((line for kind, line in self.problems.lines.items() if kind in FINAL | OF_THE_LOG), None):
            raise LogUnavailableError(line)
        if isinstance(entry, Release):
            self._holding.release(entry)
        try:
            return await self._life.decisions.write(entry)
        except LogUnavailableError:
            if isinstance(entry, Release) and not self._life.decisions.is_flying(entry):
                self._holding.keep(entry)  # it was never sent
            raise

    def changed(self) -> None:
        """Have the next beat sent soon (0.2 s): positions or readiness have changed."""
        self._life.decisions.changed()

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
        return self._life.came_back and self._holding.fence.may_act(self._parts.clock.now())

    @property
    def state(self) -> State:
        """The fold; another object after the log had to be read again."""
        return self._footing.state

    @property
    def clocks(self) -> Mapping[str, float]:
        """Seconds by which the wall clocks of other hosts were ahead of this one's when their newest beat was read."""
        return self._parts.clocks

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

    def kept_back(self) -> str:
        """Why the log takes no event of this host at the moment; empty if it does, as far as is known."""
        line = next((line for kind, line in self.problems.lines.items() if kind not in HARMLESS), "")
        return line or ("" if self.is_member else "nothing that this host wrote has come back from the log lately")

    def is_silent(self, host: str) -> bool:
        """Whether nothing new has come of a host for so long that others take its shards."""
        return self._life.watch.is_silent(host, self._parts.clock.now())

    def alive(self) -> list[str]:
        """The hosts that are not silent, this one among them."""
        return self._life.watch.alive(self.state, self._parts.clock.now())

    async def ask(self, host: str, question: bytes) -> bytes:
        """The answer of a host, which is a stranger's; raises LogUnavailableError if there is none within 2 s."""
        try:
            async with self.limit(ANSWER):
                return await self.log.ask(subject_of(host), question)
        except TimeoutError:
            raise LogUnavailableError(f"{host} does not answer") from None

    def limit(self, seconds: float) -> AbstractAsyncContextManager[None]:
        """Raise TimeoutError if what is done with this takes longer, by this host's clock."""
        return self._parts.clock.limit(seconds)

    def _answered(self, question: bytes) -> bytes | None:
        if len(question) > QUESTION:
            return None
        return next((found for answer in self.answers if (found := answer(question)) is not None), None)

    @property
    def unheld(self) -> Mapping[str, str]:
        """By plugin that no host can hold, the reason and the remedy."""
        return self._life.unheld.lines

    async def leave(self, *, force: bool = False) -> int:
        """End this host's part in this cluster; returns how many events stay in the outbox, as ``force`` allows.

        Every shard is released when nothing of it is in flight, the outbox is emptied, and the fold forgotten: the next
        start joins as a new host does, be it another cluster. Raises LogUnavailableError, and goes on as before.
        """
        try:
            await self._part("left", self.held)
            async with self._parts.clock.limit(HOLD):
                await self._sent()
        except (LogUnavailableError, TimeoutError) as error:
            if not force:
                self._parting = ""
                why = str(error) or f"{self.waiting()[0]} events of this host are not in the log yet"
                raise LogUnavailableError(why) from None
        plugins = {*self.state.plugins, *self._parts.follower.here()}
        if self._task is not None:
            await cancel_all([self._task])
        line = (
            "this host has left its cluster: remove [cluster] from host.toml, if it is there, then run isolator reload"
        )
        self.problems.begin("left", line)
        self._life.give_up(line)
        self.problems.end("unheld")
        await self._parts.database.run(self._forget)
        for plugin in plugins:
            self._parts.fences.free(plugin)
        return self.waiting()[0]

    async def stop(self) -> int:
        """Give what another living host can hold to it, since this host stops: nothing of its plugins runs any more.

        Then the outbox is emptied; returns how many events stay in it. What the log does not take in ``STOP`` seconds,
        and what no other host can hold, stays this host's.
        """
        if self.is_member:
            others = [host for host in self.alive() if host != self.host]
            shards = {
                shard: epoch for shard, epoch in self.held.items()
                if any(could_hold(self.state, host, shard[0]) for host in others)
            }  # fmt: skip
            with contextlib.suppress(LogUnavailableError, TimeoutError):
                async with self.limit(STOP):
                    if others:
                        await self._part("stopped", shards)
                    await self._sent()
        return self.waiting()[0]

    async def _sent(self) -> None:
        """Return once the log has every event of this host."""
        while self.waiting()[0]:
            await self._parts.clock.event(self._events.back, AGAIN)

    async def _part(self, parting: Parting, shards: Mapping[Shard, int]) -> None:
        """Say that this host ends its part, and release shards of which nothing is in flight then.

        Raises LogUnavailableError.
        """
        self._parting = parting
        await asyncio.gather(*(self._parts.follower.drain(shard) for shard in shards))
        releases = (self.decide(Release(*one, epoch)) for one, epoch in shards.items())
        await asyncio.gather(*releases, self.say())

    async def say(self) -> None:
        """Return once the log has what this host is like now, and all before that was read; raises LogUnavailableError.

        Of two hosts that change at once, the one that stands later there knows of the other.
        """
        await self.decide(Beat(parting=self._parting))  # one with the rest ends the message

    def _forget(self, db: sqlite3.Connection) -> None:
        self._footing.store.reset(db)
        self._outbox.forget(db)
        self._parts.follower.left(db)
        self._parts.follower.again(db)
        keep_log(db, "")

    # Life

    async def _run(self) -> None:
        while True:
            try:
                facts = await self._footing.usable_log()
                self._life = self._new_life()
                await self._life.run(facts.last)
            except StoppedError as stopped:
                _logger.error("cluster: %s", stopped.line)
                self.problems.begin(stopped.kind, stopped.line)
                self._life.give_up(stopped.line)
                if stopped.kind in FINAL:
                    return
                await self._parts.clock.sleep(RETRY)
            except Exception as error:  # a fault of this program's, which must not let it act on
                _logger.exception("cluster: the log cannot be followed any more")
                line = f"the log cannot be followed: {error!r}; see the daemon's log, then start it again"
                self.problems.begin("failed", line)
                self._life.give_up(line)
                return
