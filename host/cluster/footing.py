"""Place of this host in the log: its fold, up to where it has read, and whether that is still this log's."""

from __future__ import annotations

import functools
import hashlib
import logging
import sqlite3
from collections.abc import Callable
from typing import TYPE_CHECKING, Final, TypeVar

from host.cluster import snapshots
from host.cluster.fold import State
from host.cluster.log import Entered, Facts, LogUnavailableError
from host.cluster.problems import LASTS, OF_THE_LOG, StoppedError, check_bounds
from host.cluster.store import FoldStore, keep_log, kept
from isolator.errors import UnavailableError

if TYPE_CHECKING:
    from host.cluster.parts import Parts

RETRY: Final = 1.0
T = TypeVar("T")
_logger = logging.getLogger(__name__)


class Footing:
    """The fold and its place."""

    def __init__(self, parts: Parts) -> None:
        self._log, self._database, self._follower = parts.log, parts.database, parts.follower
        self._clock, self._problems, self._troubles = parts.clock, parts.problems, parts.troubles
        self.store = FoldStore(parts.database)
        self.state = State()
        self.place = 0
        """Up to here the log was read; entries that nobody can read included."""
        self._mark = ""
        """Tells the message at that place from any other."""
        self._shorter: float | None = None
        """Since when the log ends before what was read of it."""
        self.facts: Facts | None = None
        """The log as its servers described it last."""

    def load(self) -> None:
        """Take the fold up from the database."""
        self.state, self._mark = self.store.load(), self._database.read(kept).mark
        self.place = self.state.place

    def read(self, entered: Entered) -> str:
        """Have read a message; returns its mark."""
        self.place, self._mark = entered.place, _mark(entered)
        return self._mark

    async def write(self, apply: Callable[[sqlite3.Connection], T]) -> T:
        """Have something on disk, be that full for a while."""
        while True:
            try:
                return await self._database.run(apply)
            except UnavailableError:
                await self._clock.sleep(RETRY)

    async def usable_log(self) -> Facts:
        """The log's facts, once it answers and is this cluster's; an unusable one is looked at again and again."""
        while True:
            try:
                facts = await self.check()
            except LogUnavailableError as error:
                self._troubles.reads(error)
            except StoppedError as stopped:
                self._troubles.reads(None)
                self._problems.end(*sorted(OF_THE_LOG - {stopped.kind}))
                self._problems.begin(stopped.kind, stopped.line)
                if stopped.kind == "log_lost":
                    await self._fold_again()
                    continue
                if stopped.kind == "trimmed" and await self._adopt():
                    continue
            else:
                self._troubles.reads(None)
                self._problems.end(*sorted(OF_THE_LOG))
                await self.write(functools.partial(keep_log, created=facts.created))
                return facts
            await self._clock.sleep(RETRY)

    async def check(self) -> Facts:
        """The log's facts; raises StoppedError for a log that this host cannot follow from where it is."""
        facts = self.facts = await self._log.facts()
        self._troubles.copies(facts)
        check_bounds(facts, self._database.read(kept).log, self.place)
        if self.place < facts.first:
            return facts
        entered = await self._log.after(self.place - 1) if facts.last >= self.place else None
        if entered is not None and entered.place == self.place and _mark(entered) == self._mark:
            self._shorter = None
            return facts
        now = self._clock.now()
        self._shorter = (self._shorter or now) if facts.last < self.place else None
        if entered is not None or (self._shorter is not None and now - self._shorter >= LASTS):
            raise StoppedError(
                "log_lost",
                f"the log, which ends at {facts.last}, does not have what this host has read up to {self.place}: "
                "its servers lost its newest entries",
            )
        # A new leader, or the replica that answers, may not have taken up all that it has.
        raise LogUnavailableError(f"it ends at {facts.last}, and was read up to {self.place}")

    async def is_sure(self) -> bool:
        """Whether what was read is still there, so that reading may go on; raises StoppedError if it is not."""
        try:
            await self.check()
        except LogUnavailableError as error:
            self._troubles.reads(error)
            return False
        return True

    async def _fold_again(self) -> None:
        """Empty the fold, which knows entries that the log has lost."""

        def empty(db: sqlite3.Connection) -> None:
            self.store.reset(db)
            self._follower.again(db)

        await self.write(empty)
        self.load()

    async def _adopt(self) -> bool:
        """Take over another host's fold of an earlier place, from which the log is whole; whether there is one."""
        assert self.facts is not None

        async def write(restore: Callable[[sqlite3.Connection], None]) -> None:
            def replace(db: sqlite3.Connection) -> None:
                restore(db)
                self._follower.adopted(db, self.state)

            await self.write(replace)

        try:
            await snapshots.adopt(self._log, self.facts, write)
        except LogUnavailableError as error:
            _logger.info("cluster: %s", error)
            return False
        self.load()
        return True


def _mark(entered: Entered) -> str:
    return hashlib.sha256(entered.subject.encode() + b"\n" + entered.body).hexdigest()[:32]
