"""The way of this host's events from its outbox into the log: sent again until they are read back."""

from __future__ import annotations

import asyncio
import contextlib
import functools
from collections.abc import Callable
from typing import TYPE_CHECKING

from host.cluster.decisions import AGAIN
from host.cluster.entries import Event, Replay, encode, subject
from host.cluster.fold import Member
from host.cluster.log import LogUnavailableError
from isolator.errors import UnavailableError

if TYPE_CHECKING:
    from host.cluster.parts import Parts


class Events:
    """Sends what the outbox has."""

    def __init__(self, parts: Parts) -> None:
        self._host, self._outbox, self._database = parts.host, parts.outbox, parts.database
        self._log, self._clock, self._footing, self._troubles = parts.log, parts.clock, parts.footing, parts.troubles
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
        return await self._footing.write(functools.partial(outbox.next, log=known()))

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
                self._troubles.writes(None)
            except LogUnavailableError as error:
                self._troubles.writes(error)
            last = message.first.number + len(message.entries) - 1
            read = known().events
            if read.series != message.first.series or read.number < last:
                await self._clock.event(self.back, AGAIN)
