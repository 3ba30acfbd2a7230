"""Runs of the plugins' sidecars, as the supervisor starts and reaches them.

An event for many plugins wants many connections in one turn of the event loop. They are asked for in few messages, none
of which waits for a sidecar; one that does not accept at once is asked for by itself, and nobody else waits for it.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
from itertools import zip_longest
from typing import Any

from isolator.errors import IsolatorError, UnavailableError
from isolator.ipc.body import Message, Request
from isolator.ipc.channel import Channel
from isolator.ipc.messages import ConnectRun, ConnectRuns, EnsureRun, LendSocket, RunOf
from isolator.linux.descriptors import close_all

CONNECT_DEADLINE = 10.0
"""Seconds for the sidecar's socket to appear and accept."""
AT_ONCE = 16
"""Connections in one message: while the supervisor makes the next ones, these are used."""


class Runs:
    """The runs of one host's plugins."""

    def __init__(self, supervisor: Channel) -> None:
        self._supervisor = supervisor
        self._loop = asyncio.get_running_loop()
        self._gathered: list[tuple[RunOf, asyncio.Future[int]]] = []

    async def ensure(self, name: str) -> str:
        """Start a plugin unless it runs; returns its run. Raises IsolatorError."""
        return (await self._supervisor.ask(EnsureRun(name=name))).run

    async def connect(self, name: str, run: str) -> int:
        """Connect to a sidecar, whose socket may still have to appear; raises IsolatorError."""
        return await connection(self._begin(RunOf(name=name, run=run)))

    def connect_soon(self, name: str, run: str) -> asyncio.Future[int]:
        """As ``connect``, for ``connection`` to wait for; those of one turn of the event loop share messages."""
        made: asyncio.Future[int] = self._loop.create_future()
        self._gathered.append((RunOf(name=name, run=run), made))
        if len(self._gathered) == AT_ONCE:
            self._ask()
        elif len(self._gathered) == 1:
            self._loop.call_soon(self._ask)
        return made

    def lend(self, name: str, run: str) -> asyncio.Future[Message]:
        """Ask for the socket file of a run; the answer is one to ``run.socket``, or IsolatorError."""
        return self._send(LendSocket(name=name, run=run))

    def _ask(self) -> None:
        wanted, self._gathered = self._gathered, []
        if len(wanted) == 1:
            self._begin(*wanted[0])
        elif wanted:
            request = ConnectRuns(runs=tuple(run for run, _ in wanted))
            self._send(request).add_done_callback(lambda answer: self._many_answered(wanted, answer))

    def _begin(self, run: RunOf, made: asyncio.Future[int] | None = None) -> asyncio.Future[int]:
        """Ask for one, and wait for its sidecar."""
        made = made or self._loop.create_future()
        request = ConnectRun(name=run.name, run=run.run, deadline=CONNECT_DEADLINE)
        self._send(request).add_done_callback(lambda answer: _answered(made, answer))
        return made

    def _send(self, request: Request[Any]) -> asyncio.Future[Message]:
        # The supervisor has the deadline, and may have to come to rest and be reloaded first. A connection that
        # nobody waited for any more would be closed without a request.
        try:
            return self._supervisor.begin(request)
        except IsolatorError as error:
            answer: asyncio.Future[Message] = self._loop.create_future()
            answer.set_exception(error)
            return answer

    def _many_answered(self, wanted: list[tuple[RunOf, asyncio.Future[int]]], answer: asyncio.Future[Message]) -> None:
        """Give each its connection or its error; one that has neither is asked for by itself."""
        answers, fds = _read(answer)
        for (run, made), found in zip_longest(wanted, answers[: len(wanted)]):
            if found is True and fds:
                _give(made, fds.pop(0))
            elif made.done():
                continue
            elif isinstance(found, dict):
                made.set_exception(IsolatorError.from_json(found))
            else:
                self._begin(run, made)
        close_all(fds)


def _read(answer: asyncio.Future[Message]) -> tuple[tuple[Any, ...], list[int]]:
    """The answers in a reply for many, and its descriptors; nothing when it is none."""
    if answer.cancelled() or answer.exception() is not None:
        return (), []
    with contextlib.suppress(IsolatorError):
        return ConnectRuns.read_reply(answer.result().fields).answers, answer.result().fds
    return (), answer.result().fds


def _answered(made: asyncio.Future[int], answer: asyncio.Future[Message]) -> None:
    error = answer.exception() if not answer.cancelled() else None
    fds = answer.result().fds if not answer.cancelled() and error is None else []
    if len(fds) == 1:
        _give(made, fds.pop())
    elif not made.done():
        lacking = UnavailableError("the supervisor", "sent no connection", "see its log")
        made.set_exception(error if error is not None else lacking)
    close_all(fds)


def _give(made: asyncio.Future[int], fd: int) -> None:
    if made.done():
        os.close(fd)
    else:
        made.set_result(fd)


async def connection(made: asyncio.Future[int]) -> int:
    """Wait for a connection that is under way; it is closed when nobody waits any more. Raises IsolatorError."""
    try:
        return await made
    except asyncio.CancelledError:
        if made.done() and not made.cancelled() and made.exception() is None:
            os.close(made.result())  # it came at that very moment
        raise
