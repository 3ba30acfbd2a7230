"""A log in memory, with the faults that servers and networks have."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Callable

from host.cluster.clock import Clock
from host.cluster.log import Entered, Facts, LogFullError, LogRefusedError, LogUnavailableError

_created = itertools.count(1)


class Servers:
    """The servers of a cluster, as one list of messages. Faults are attributes, which tests set."""

    def __init__(self, clock: Clock) -> None:
        self.clock = clock
        self.messages: list[Entered] = []
        self.created = f"log {next(_created)}"
        self.trimmed = 0
        """How many messages at the beginning are gone."""
        self.wrong: tuple[str, ...] = ()
        self.behind: tuple[str, ...] = ()
        self.full = self.quorum_lost = False
        self.woken: set[asyncio.Event] = set()
        self.answers: dict[str, list[tuple[MemoryLog, Callable[[bytes], bytes | None]]]] = {}

    def put(self, subject: str, body: bytes) -> None:
        """Append a message, whoever wrote it."""
        self.messages.append(Entered(len(self.messages) + 1, self.clock.wall(), subject, body))
        for one in self.woken:
            one.set()

    def lose_tail(self, count: int) -> None:
        """Lose the newest messages, as after a power cut."""
        del self.messages[-count:]


class MemoryLog:
    """The log as one host reaches it."""

    def __init__(self, servers: Servers, clock: Clock) -> None:
        self.servers, self.clock = servers, clock
        self.cut = self.refused = self.loses_answers = self.closed = False
        self.lag = 0
        """By how many messages the servers' leader, which has just been elected, says that the log is shorter."""
        self.keeps: Callable[[str], bool] = lambda _: True
        """Whether a message that this host sends arrives."""
        self.sees: Callable[[Entered], Entered] = lambda entered: entered
        """A message as this host's server has it."""
        self.sent = 0
        self._woken = asyncio.Event()
        servers.woken.add(self._woken)

    async def append(self, subject: str, body: bytes) -> None:
        await self._reach()
        if self.servers.full:
            raise LogFullError("insufficient resources")
        if self.servers.quorum_lost or not self.keeps(subject):
            await self._no_answer()
        self.sent += 1
        self.servers.put(subject, body)
        if self.loses_answers:
            await self._no_answer()

    async def after(self, place: int) -> Entered | None:
        await self._reach()
        newer = self.servers.messages[max(place, self.servers.trimmed) :]
        return self.sees(newer[0]) if newer else None

    async def wait(self, seconds: float) -> None:
        await self.clock.event(self._woken, seconds)

    async def facts(self) -> Facts:
        await self._reach()
        servers = self.servers
        first = servers.trimmed + 1
        last, versions = len(servers.messages) - self.lag, ("2.10.26",) * 3
        return Facts(first, last, servers.created, 3, versions, wrong=servers.wrong, behind=servers.behind)

    async def ask(self, subject: str, body: bytes) -> bytes:
        await self._reach()
        for log, handler in self.servers.answers.get(subject, []):
            answer = None if log.cut or log.closed else handler(body)
            if answer is not None:
                return answer
        raise LogUnavailableError("no other host answers")

    def answer(self, subject: str, handler: Callable[[bytes], bytes | None]) -> None:
        self.servers.answers.setdefault(subject, []).append((self, handler))

    async def close(self) -> None:
        self.closed = True
        self.servers.woken.discard(self._woken)

    async def _reach(self) -> None:
        await asyncio.sleep(0)
        if self.refused:
            raise LogRefusedError("Authorization Violation")
        if self.cut:
            await self._no_answer()

    async def _no_answer(self) -> None:
        await self.clock.sleep(1.0)
        raise LogUnavailableError("no answer within 1 s")
