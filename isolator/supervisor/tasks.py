"""Loops that run as long as the daemon: each has an owner that notices its end and begins it anew."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable

from isolator.pacing import Backoff

logger = logging.getLogger(__name__)

_BACKOFF_FIRST, _BACKOFF_LAST = 0.1, 30.0
_STEADY_SECONDS = 60.0


class Tasks:
    """The loops of one owner, which ``close`` ends."""

    def __init__(self) -> None:
        self._tasks: list[asyncio.Task[None]] = []

    def keep(self, name: str, loop: Callable[[], Awaitable[None]]) -> None:
        """Run ``loop``, which never returns; when it ends all the same, log why and begin it again after a pause."""
        self._tasks.append(asyncio.create_task(_keep(name, loop), name=name))

    async def close(self) -> None:
        """End every loop, and wait until it has ended. Idempotent."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self._tasks.clear()


async def _keep(name: str, loop: Callable[[], Awaitable[None]]) -> None:
    clock, backoff = asyncio.get_running_loop().time, Backoff(_BACKOFF_FIRST, _BACKOFF_LAST)
    while True:
        started = clock()
        try:
            await loop()
            logger.critical("%s has ended; it is begun again", name)
        except Exception as error:  # whatever it was, the work has to go on
            logger.critical("%s has failed and is begun again: %s: %s", name, type(error).__name__, error)
        if clock() - started > _STEADY_SECONDS:
            backoff.reset()
        await asyncio.sleep(backoff.next())
