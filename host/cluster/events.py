"""The way of this host's events from its outbox into the log: sent again until they are read back."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import sqlite3
from collections.abc import Awaitable, Callable
from typing import Any

from host.cluster.clock import Clock
from host.cluster.decisions import AGAIN
from host.cluster.entries import Event, Replay, encode, subject
from host.cluster.fold import Member
from host.cluster.log import Log, LogUnavailableError
from host.cluster.outbox import Outbox
from host.database.store import Store as Database
from isolator.errors import UnavailableError

Write = Callable[[Callable[[sqlite3.Connection], Any]], Awaitable[Any]]


class Events:
    """Sends what the outbox has, which is in ``database``; ``write`` has something on disk there, once it takes that.

    ``writes`` gets how the log answers.
    """

    def __init__(
        self,
        host: str,
        outbox: Outbox,
        database: Database,
        log: Log,
        clock: Clock,
        write: Write,
        writes: Callable[[LogUnavailableError | None], None],
    ) -> None:
        self._host, self._outbox, self._database, self._log, self._clock = host, outbox, database, log, clock
        self._write, self._writes = write, writes
        self.unsent, self.back = asyncio.Event(), asyncio.Event()
        """Something was put into the outbox; something of it was read back."""

    async def _next(self, known: Callable[[], Member]) -> tuple[int, tuple[Event | Replay, ...]]:
        """Return what is to be sent, all of it on disk, which takes no other write than that of its emission."""
        outbox, database = self._outbox, self._database
        end = database.read(outbox.emitted)
        with contextlib.suppress(UnavailableError):
            await database.durable()
            if database.read(functools.partial(outbox.is_fit, log=known())):
                return database.read(functools.partial(outbox.next, log=known(), end=end))
        found: tuple[int, tuple[Event | Replay, ...]]
        found = await self._write(functools.partial(outbox.next, log=known()))
        return found

    async def run(self, known: Callable[[], Member]) -> None:
        """Send until it is cancelled; ``known`` is this host as far as the log was read."""
        while True:
            message = self._outbox.message(await self._next(known))
            if message is None:
                await self.unsent.wait()
                self.unsent.clear()
                continue
            self.back.clear()
            try:
                await self._log.append(subject(self._host, "ev"), encode(message))
                self._writes(None)
            except LogUnavailableError as error:
                self._writes(error)
            last = message.first.number + len(message.entries) - 1
            read = known().events
            if read.series != message.first.series or read.number < last:
                await self._clock.event(self.back, AGAIN)
