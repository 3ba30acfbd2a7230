"""Requests to reload the daemon, one at a time, and what became of the last one."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Awaitable, Callable

from isolator.errors import IsolatorError, UnavailableError
from isolator.ipc.tasks import Tasks

logger = logging.getLogger(__name__)


class Reloads:
    """The reloads of one daemon. ``generation`` counts them, over every exec; the first start is number 1.

    ``perform`` is called with the number of the next generation, and returns only by raising.
    """

    def __init__(self, generation: int) -> None:
        self.generation = generation
        self.refused = ""
        """Why the last one was refused; empty while it is under way, and when it was not."""
        self.perform: Callable[[int], Awaitable[None]] | None = None
        self.again = False
        """Another one is to follow that which is under way."""
        self._tasks = Tasks()
        self._task: asyncio.Task[None] | None = None

    def ask(self) -> int:
        """Begin one; returns the generation that comes of it. Raises UnavailableError while another is under way."""
        if self.perform is None:
            raise UnavailableError("reload", "the daemon is starting or stopping", "ask again")
        if self._under_way:
            raise UnavailableError("reload", "another one is under way", "wait for it")
        self.refused, self.again = "", False
        self._task = self._tasks.run("reload", self._run(self.perform))
        return self.generation + 1

    def ask_for_one_more(self) -> None:
        """Begin one; while another is under way, when that is over: it may have read what has changed since.

        Raises UnavailableError as ``ask`` does otherwise.
        """
        if self._under_way:
            self.again = True
        else:
            self.ask()

    @property
    def _under_way(self) -> bool:
        return self._task is not None and not self._task.done()

    async def close(self) -> None:
        """Begin none any more, and give up the one that is under way."""
        self.perform = None
        await self._tasks.close()

    async def _run(self, perform: Callable[[int], Awaitable[None]]) -> None:
        try:
            await perform(self.generation + 1)
            self.refused = "it came back without an error"
        except (IsolatorError, OSError) as error:
            self.refused = str(error)
        except Exception as error:  # whatever it was, the daemon goes on as it is, and whoever waits has to know
            self.refused = f"a fault of the daemon: {type(error).__name__}: {error}"
        logger.error("not reloaded, and nothing has changed: %s", self.refused)
        if self.again and self.perform is not None:
            asyncio.get_running_loop().call_soon(self._follow)

    def _follow(self) -> None:
        with contextlib.suppress(UnavailableError):  # somebody else was quicker, or it stops
            self.ask()
