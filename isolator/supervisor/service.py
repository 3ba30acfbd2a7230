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
import signal
import socket
import subprocess
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

from isolator.errors import UnavailableError
from isolator.ipc.body import Handler
from isolator.ipc.channel import ALIVE, Channel, pair
from isolator.ipc.messages import ServiceEntry
from isolator.ipc.tasks import Tasks
from isolator.layers.cgroup.leaf import Leaf
from isolator.layers.cgroup.subtree import Subtree
from isolator.linux.child import Child
from isolator.linux.descriptors import close_all
from isolator.linux.readable import readable
from isolator.linux.unprivileged import service_command
from isolator.pacing import Backoff
from isolator.recovery.journal import Entry, Journal
from isolator.supervisor import alive
from isolator.supervisor.alarms import ServiceHealth

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


class ChildProcess:
    """One service. ``channel`` is None before its first start and closed between two processes."""

    def __init__(self, spec: ServiceSpec, subtree: Subtree, journal: Journal, health: ServiceHealth) -> None:
        self.spec = spec
        self._health = health
        self.channel: Channel | None = None
        self.starts = 0
        self.up = asyncio.Event()
        """Set while the service answers."""
        self.ended = ""
        """How the process before ended."""
        self._subtree, self._journal = subtree, journal
        self._process: subprocess.Popen[bytes] | Child | None = None
        self._leaf: Leaf | None = None
        self._tasks = Tasks()
        self._stopping = False

    async def start(
        self,
        introduce: Callable[[Channel], Awaitable[None]],
        *,
        handlers: Mapping[str, Handler] | None = None,
        inherit: Callable[[], dict[str, int]] = dict,
    ) -> None:
        """Start the service for the first time (a failure is the caller's) and keep it running.

        Each process gets the descriptors that ``inherit`` returns by name; they are closed here. ``introduce`` says
        hello to it; ``handlers`` serve its requests.
        """

        async def launch() -> None:
            await self._launch(introduce, handlers or {}, inherit)

        await launch()
        self._tasks.keep(f"watch over {self.spec.name}", lambda: self._keep(launch))

    def adopt(
        self,
        before: ServiceState,
        introduce: Callable[[Channel], Awaitable[None]],
        *,
        handlers: Mapping[str, Handler] | None = None,
        inherit: Callable[[], dict[str, int]] = dict,
    ) -> None:
        """Keep the process running that is there since before this process's exec; the rest as ``start``."""

        async def launch() -> None:
            await self._launch(introduce, handlers or {}, inherit)

        self._process, self.starts = Child(before.pid), before.starts
        self._leaf = Leaf(self._subtree.unified / before.leaf)
        end = socket.socket(fileno=before.channel.socket)
        self.channel = Channel(end, handlers, name=self.spec.name, before=before.channel)
        self.up.set()
        self._tasks.keep(f"watch over {self.spec.name}", lambda: self._keep(launch))

    @property
    def unsettled(self) -> str:
        """Why it cannot be handed over at this moment, in words; empty when it can."""
        if self.channel is None or not self.up.is_set() or self.channel.closed.is_set():
            return f"the start of {self.spec.name}"
        return self.channel.unsettled

    def hand_over(self) -> ServiceState:
        """The state of the process that runs, before an exec, when it is settled."""
        from isolator.ipc.handover import ServiceState

        assert not self.unsettled and self.channel is not None and self._process and self._leaf
        return ServiceState(
            name=self.spec.name, pid=self._process.pid, starts=self.starts, leaf=self._leaf.unified.name,
            channel=self.channel.hand_over(),
        )  # fmt: skip

    async def stop(self) -> None:
        """Close the channel, wait 5 s for the process to end, then kill it. Harmless before ``start``."""
        self._stopping = True
        await self._tasks.close()
        self.up.clear()
        if self.channel is not None:
            self.channel.close()
        if self._process is not None:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(5):
                    await _ended(self._process)
        await self._clear()

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

    async def first_answer(self, work: Awaitable[T]) -> T:
        """Wait for the answer to hello while the process makes progress; raises UnavailableError."""
        assert self._process is not None
        return await alive.answered(work, self._process.pid, self.spec.name)

    @property
    def pid(self) -> int | None:
        """Pid of the present process, or of the last."""
        return self._process.pid if self._process is not None else None

    def entry(self) -> ServiceEntry:
        """Describe the service for listings."""
        return ServiceEntry(
            name=self.spec.name, pid=self.pid, up=self.up.is_set(), starts=self.starts, ended=self.ended
        )

    async def _launch(
        self,
        introduce: Callable[[Channel], Awaitable[None]],
        handlers: Mapping[str, Handler],
        inherit: Callable[[], dict[str, int]],
    ) -> None:
        spec = self.spec
        leaf = Leaf(self._subtree.unified / f"service.{spec.name}")
        self._journal.record(Entry(f"service.{spec.name}", "service", tuple(map(str, leaf.folders()))))
        leaf.create(None)
        self._leaf = leaf
        mine, theirs = pair()
        inherited = {"channel": theirs.detach(), **inherit()}
        command = service_command(spec.module, spec.uid, spec.gid, inherited)
        try:
            self._process = subprocess.Popen(
                command, pass_fds=list(inherited.values()), stdin=subprocess.DEVNULL, cwd="/",
                env=_environment(), start_new_session=True, umask=0o027,
            )  # fmt: skip
        finally:
            close_all(inherited.values())
        (leaf.unified / "cgroup.procs").write_text(str(self._process.pid))
        channel = self.channel = Channel(mine, handlers, name=spec.name)
        self.starts += 1
        await introduce(channel)
        self.up.set()

    async def _keep(self, launch: Callable[[], Awaitable[None]]) -> None:
        deaths, failures = Backoff(_BACKOFF_FIRST, _LONGEST_AWAY), Backoff(_BACKOFF_FIRST, _BACKOFF_LAST)
        loop = asyncio.get_running_loop()
        while not self._stopping:
            started = loop.time()
            assert self.channel is not None and self._process is not None
            ask = functools.partial(self.channel.call, ALIVE)
            silent = await alive.until_silent(self.channel.closed, ask, self._process.pid, self.spec.name)
            if silent is not None:
                self._health.hangs(self.spec.name, silent)
            self.up.clear()
            await self._clear()
            self.ended = silent.why if silent is not None else _how(self._process.returncode)
            self._health.ended(self.spec.name, self.ended, hung=silent is not None)
            logger.warning("%s ended (%s); starting it again", self.spec.name, self.ended)
            if loop.time() - started > _STEADY_SECONDS:
                deaths.reset()
            pause = deaths.next()
            while True:
                await asyncio.sleep(pause)
                try:
                    await launch()
                    failures.reset()
                    self._health.is_up(self.spec.name)
                    break
                except Exception as error:  # whatever it was, the service must come back; the next try is paced
                    self._health.does_not_start(self.spec.name, error)
                    await self._clear()
                    pause = failures.next()

    async def _clear(self) -> None:
        if self.channel is not None:
            self.channel.close()
        if self._leaf is not None:
            self._leaf.kill()
        if self._process is not None:
            await _ended(self._process)
        if self._leaf is not None:
            await asyncio.to_thread(self._leaf.wait_empty, 5.0)
            self._leaf.remove()
            self._journal.forget(f"service.{self.spec.name}")
            self._leaf = None


def _environment() -> dict[str, str]:
    """A service's environment; with it, its lines on standard error have priorities where the journal reads them."""
    journal = {key: value for key, value in os.environ.items() if key == "JOURNAL_STREAM"}
    return {"PATH": "/usr/sbin:/usr/bin:/sbin:/bin", "LANG": "C.UTF-8", **journal}


async def _ended(process: subprocess.Popen[bytes] | Child) -> None:
    if process.poll() is not None:
        return
    fd = os.pidfd_open(process.pid)
    try:
        await readable(fd)
    finally:
        os.close(fd)
    process.wait()


def _how(code: int | None) -> str:
    if code is None:
        return "unknown"
    return f"killed by {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
