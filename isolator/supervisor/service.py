"""The daemon's unprivileged processes: start, watch, start again.

Each service (audit, broker, host) runs as a system user of its own with no groups, no capabilities, an empty bounding
set and no_new_privs, in a cgroup leaf of its own, so that whatever it did, one write ends it. The channel to the
supervisor is inherited; when it closes, the service ends.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import logging
import os
import re
import signal
import socket
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeVar

from isolator.base.pacing import Backoff
from isolator.errors import UnavailableError, UsageError
from isolator.ipc.body import Handler, Request
from isolator.ipc.channel import ALIVE, Channel, pair
from isolator.ipc.messages import ServiceEntry
from isolator.ipc.tasks import Tasks, report
from isolator.layers.cgroup.leaf import Leaf
from isolator.layers.cgroup.subtree import Subtree
from isolator.linux.child import Child, ended
from isolator.linux.descriptors import FdSet, close_all
from isolator.recovery.journal import Entry, Journal
from isolator.supervisor import alive
from isolator.supervisor.alarms import ServiceHealth
from isolator.supervisor.zygote import Zygote, Zygotes

if TYPE_CHECKING:
    from isolator.ipc.handover import ServiceState

logger = logging.getLogger(__name__)

T = TypeVar("T")

_BACKOFF_FIRST, _BACKOFF_LAST = 0.1, 5.0
"""Seconds: pauses between starts that fail."""
_LONGEST_AWAY = 1.0
"""Seconds before one that was up and died is started again, however often that happens: callers wait for it."""
_STEADY_SECONDS = 30.0
_UP_SECONDS = 30.0


@dataclass(frozen=True)
class ServiceSpec:
    """Module and user of a service."""

    name: str
    module: str
    uid: int
    gid: int


@dataclass
class Generation:
    """One process of a service. While another takes its place two are alive, each in a leaf of its own."""

    process: Child
    channel: Channel
    leaf: Leaf

    @property
    def entry(self) -> str:
        """Name of its leaf in the journal."""
        return self.leaf.unified.name


Introduce = Callable[[Channel], Awaitable[None]]
Succeed = Callable[[], Callable[[Channel, int], Awaitable[None]]]
"""Called when a process is to leave: takes note of what that one knows, and returns what says hello to the new one, to
which that many parts of state were passed."""


@dataclass(frozen=True)
class Ways:
    """How a service is started, and its successor."""

    introduce: Introduce
    """Says hello to a process that has begun."""
    handlers: Mapping[str, Handler] = field(default_factory=dict)
    """Serve the requests of each process."""
    inherit: Callable[[], dict[str, int]] = dict
    """Descriptors that a process gets, by name; they are closed here."""
    succeed: Succeed | None = None
    """Introduces a process that goes on with the state of another; None: this service hands nothing on."""
    succession: Callable[[], dict[str, int]] = dict
    """Descriptors that a process inherits which takes the place of another, in place of those."""
    succeeded: Callable[[], None] = lambda: None
    """Called once a process serves that has taken the place of another."""


async def _no_introduction(_: Channel) -> None:
    """A process that is only to end."""


class ChildProcess:
    """One service. ``channel`` is None before its first start and closed between two processes."""

    def __init__(
        self, spec: ServiceSpec, zygotes: Zygotes, subtree: Subtree, journal: Journal, health: ServiceHealth
    ) -> None:
        self.spec, self.zygotes = spec, zygotes
        self._health = health
        self.current: Generation | None = None
        """The process that serves, or served last."""
        self.starts = 0
        """Starts, without those of processes that took the place of another."""
        self._alive: list[Generation] = []
        """The processes that are not cleared away: of an exchange that is given up there may be two."""
        self.generations = 0
        """Processes so far, by which their leaves are numbered."""
        self.up = asyncio.Event()
        """Set while the service answers."""
        self.ended = ""
        """How the process before ended."""
        self.changing = asyncio.Lock()
        """Held while one process takes the place of another."""
        self.blame = ""
        """Why an exchange has failed, which ended the process."""
        self.kept = ""
        """Why the last exchange has failed, and the process that was to leave goes on."""
        self._adopted: Generation | None = None
        self.begun = False
        """A process was started or adopted, or will be as soon as it can."""
        self.ways = Ways(_no_introduction)
        self._subtree, self._journal = subtree, journal
        self._waiting: list[tuple[Request[Any], list[int]]] | None = None
        """Notifications for the process that takes the place of another; None: they are sent at once."""
        self._tasks = Tasks()
        self._stopping = False

    async def start(self, ways: Ways) -> None:
        """Start the service for the first time (a failure is the caller's) and keep it running."""
        await self.begin(ways)
        await self.introduce()

    async def begin(self, ways: Ways) -> None:
        """Start the first process, which loads its modules, and then waits to be introduced."""
        self.ways, self.begun = ways, True
        await self._fork()

    def need(self) -> None:
        """Start the service, whose ``ways`` are known, unless that was begun; as after a crash, until it is up.

        One that was stopped stays so: nobody would end it.
        """
        if not self.begun and not self._stopping:
            self.begun = True
            self._tasks.keep(f"watch over {self.spec.name}", self._keep)

    async def introduce(self) -> None:
        """Say hello to the process that has begun, and keep the service running; a failure is the caller's."""
        await self._introduce()
        self._tasks.keep(f"watch over {self.spec.name}", self._keep)

    async def _fork(self) -> None:
        self.starts += 1
        async with self.zygotes.ready() as zygote:
            self.current = await self.spawn(zygote, self.ways.inherit())

    async def _introduce(self) -> None:
        assert self.current is not None
        await self.ways.introduce(self.current.channel)
        self.up.set()

    def adopt(self, before: ServiceState, ways: Ways) -> None:
        """Keep the process running that is there since before this process's exec.

        One that cannot be taken over is ended, and another is started as after a crash.
        """
        self.ways, self.begun = ways, True
        self.starts, self.generations = before.starts, before.generations
        own = re.fullmatch(rf"service\.{self.spec.name}\.\d+", before.leaf) is not None
        leaf = before.leaf if own else f"service.{self.spec.name}.{self.generations}"
        try:
            if not own:  # others' processes may be in there
                raise UsageError(f"the state of {self.spec.name}", f"{before.leaf!r} is no leaf of its own")
            end = socket.socket(fileno=before.channel.socket)
            channel = Channel(end, ways.handlers, name=self.spec.name, before=before.channel)
        except Exception as error:  # whatever it was, the other processes go on
            report(asyncio.get_running_loop(), f"take-over of {self.spec.name}", error)
            end, other = pair()
            other.close()
            channel, self.blame = Channel(end, name=self.spec.name), f"it was not taken over: {error}"
        self.current = Generation(Child(before.pid), channel, Leaf(self._subtree.unified / leaf))
        self._alive.append(self.current)
        self._adopted = self.current
        self.up.set()
        self._tasks.keep(f"watch over {self.spec.name}", self._keep)

    def give_up(self, why: str) -> None:
        """End the process that runs, and start another as after a crash."""
        self.blame = why
        if self.current is not None:
            self.current.channel.close()

    @property
    def as_before(self) -> bool:
        """Whether the process is the one of before this process's exec."""
        return self._adopted is not None and self.current is self._adopted

    @property
    def outdated(self) -> bool:
        """Whether it is that one, or the one after it does not serve yet."""
        return self.as_before or (self._adopted is not None and not self.up.is_set())

    @property
    def unsettled(self) -> str:
        """Why it cannot be handed over at this moment, in words; empty when it can."""
        channel = self.channel
        changing = self.changing.locked() or len(self._alive) > 1
        if changing or channel is None or not self.up.is_set() or channel.closed.is_set():
            return f"the start of {self.spec.name}"
        return channel.unsettled

    def hand_over(self) -> ServiceState:
        """The state of the process that runs, before an exec, when it is settled."""
        from isolator.ipc.handover import ServiceState

        assert not self.unsettled and self.current is not None
        return ServiceState(
            name=self.spec.name, pid=self.current.process.pid, starts=self.starts, generations=self.generations,
            leaf=self.current.entry, channel=self.current.channel.hand_over(),
        )  # fmt: skip

    async def stop(self) -> None:
        """Close the channel, wait 5 s for the process to end, then kill it. Harmless before ``start``."""
        self._stopping = True
        async with self.changing:
            await self._tasks.close()
            self.up.clear()
            if self.current is not None:
                await self.retire(self.current)
                self.current = None
            for left in list(self._alive):
                await self.discard(left)

    async def wait_up(self) -> Channel:
        """Wait until the service answers; raises UnavailableError when it does not come up."""
        try:
            async with asyncio.timeout(_UP_SECONDS):
                await self.up.wait()
        except TimeoutError:
            why = f"did not come up in {_UP_SECONDS:g} s"
            raise UnavailableError(self.spec.name, why, "see the daemon's log") from None
        assert self.channel is not None
        return self.channel

    @property
    def running(self) -> bool:
        """Whether a process serves, or leaves and may still answer."""
        there = self.channel is not None and not self.channel.closed.is_set()
        return there and (self.up.is_set() or self._waiting is not None)

    async def present(self) -> Channel | None:
        """The channel, once no process is being exchanged for another: closed between two, None before the first."""
        async with self.changing:
            return self.channel

    def tell(self, request: Request[Any], *, fds: Sequence[int] = ()) -> None:
        """Notify the process; if another is taking its place, that one. Silently dropped when there is none."""
        if self._waiting is not None:
            self._waiting.append((request, [os.dup(fd) for fd in fds]))
        elif self.channel is not None:
            self.channel.tell(request, fds=fds)

    async def first_answer(self, work: Awaitable[T], generation: Generation | None = None) -> T:
        """Wait for the answer to hello while the process makes progress; raises UnavailableError."""
        generation = generation or self.current
        assert generation is not None
        return await alive.answered(work, generation.process.pid, self.spec.name)

    @property
    def channel(self) -> Channel | None:
        """The channel to the process that serves, or served last."""
        return self.current.channel if self.current is not None else None

    @property
    def pid(self) -> int | None:
        """Pid of the present process, or of the last."""
        return self.current.process.pid if self.current is not None else None

    def entry(self) -> ServiceEntry:
        """Describe the service for listings."""
        return ServiceEntry(
            name=self.spec.name, pid=self.pid, up=self.up.is_set(), starts=self.starts, ended=self.ended
        )

    # --- one process in the place of another: see reload/exchange.py -----------------------------------------------

    def hold(self) -> None:
        """Keep what is to be told to the service until ``go_on``: its process leaves."""
        self.up.clear()
        self._waiting = []

    def go_on(self, generation: Generation | None) -> None:
        """Have that process serve from now on, and tell it what waited; None: none does, and what waited is dropped."""
        waiting, self._waiting = self._waiting or [], None
        if generation is not None:
            self.current = generation
            self.up.set()
        for request, fds in waiting:
            if generation is not None:
                generation.channel.tell(request, fds=fds)
            close_all(fds)
        if generation is not None:
            self.ways.succeeded()

    async def spawn(self, zygote: Zygote, inherited: dict[str, int]) -> Generation:
        """Start a process, which waits for its hello, with the descriptors; they are closed here."""
        spec = self.spec
        with FdSet(inherited.values()) as given:
            mine, theirs = pair()
            inherited = {"channel": given.add(theirs.detach()), **inherited}
            self.generations += 1
            leaf = Leaf(self._subtree.unified / f"service.{spec.name}.{self.generations}", on_v2=self._subtree.on_v2)
            process: Child | None = None
            try:
                self._journal.record(Entry(leaf.unified.name, "service", tuple(map(str, leaf.folders()))))
                leaf.create()
                leaf.prefer()
                process = await zygote.fork(spec, inherited)
                (leaf.unified / "cgroup.procs").write_text(str(process.pid))
            except BaseException:
                mine.close()
                if process is not None:
                    process.kill()
                    process.wait()
                leaf.remove()
                self._journal.forget(leaf.unified.name)
                raise
        generation = Generation(process, Channel(mine, self.ways.handlers, name=spec.name), leaf)
        self._alive.append(generation)
        return generation

    async def retire(self, generation: Generation) -> None:
        """Close the channel to a process, wait 5 s for it to end, then kill it."""
        generation.channel.close()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(5):
                await ended(generation.process)
        await self.discard(generation)

    async def discard(self, generation: Generation) -> None:
        """Kill a process, and remove every trace of it."""
        generation.channel.close()
        generation.leaf.kill()
        await ended(generation.process)
        await asyncio.to_thread(generation.leaf.wait_empty, 5.0)
        generation.leaf.remove()
        self._journal.forget(generation.entry)
        self._alive = [other for other in self._alive if other is not generation]

    async def _keep(self) -> None:
        deaths, failures = Backoff(_BACKOFF_FIRST, _LONGEST_AWAY), Backoff(_BACKOFF_FIRST, _BACKOFF_LAST)
        loop = asyncio.get_running_loop()
        if self.current is None:
            await self._come_up(0.0, failures)
        while not self._stopping:
            started = loop.time()
            generation = self.current
            assert generation is not None
            ask = functools.partial(generation.channel.call, ALIVE)
            silent = await alive.until_silent(
                generation.channel.closed, ask, generation.process.pid, self.spec.name
            )  # fmt: skip
            async with self.changing:  # else one that leaves would pass for one that died
                if self.current is not generation:
                    continue
                if silent is not None:
                    self._health.hangs(self.spec.name, silent)
                self.up.clear()
                await self.discard(generation)
            self.ended = self.blame or (silent.why if silent is not None else _how(generation.process.returncode))
            self.blame = ""
            self._health.ended(self.spec.name, self.ended, hung=silent is not None)
            logger.warning("%s ended (%s); starting it again", self.spec.name, self.ended)
            if loop.time() - started > _STEADY_SECONDS:
                deaths.reset()
            await self._come_up(deaths.next(), failures)

    async def _come_up(self, pause: float, failures: Backoff) -> None:
        """Start a process after a pause, again until one is up; there is none, or the one before is cleared away."""
        before = self.current
        while True:
            await asyncio.sleep(pause)
            try:
                await self._fork()
                await self._introduce()
                failures.reset()
                self._health.is_up(self.spec.name)
                return
            except Exception as error:  # whatever it was, the service must come back; the next try is paced
                self._health.does_not_start(self.spec.name, error)
                if self.current is not None and self.current is not before:
                    await self.discard(self.current)
                pause = failures.next()


def _how(code: int | None) -> str:
    if code is None:
        return "unknown"
    return f"killed by {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
