"""The daemon's unprivileged processes: start, watch, start again.

Each service (audit, broker, host) runs as a system user of its own with no groups, no capabilities, an empty bounding
set and no_new_privs, in a cgroup leaf of its own, so that whatever it did, one write ends it. The channel to the
supervisor is inherited; when it closes, the service ends.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import subprocess
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field

from isolator.ipc.channel import Channel, Handler, pair
from isolator.layers.cgroup.leaf import Leaf
from isolator.layers.cgroup.subtree import Subtree
from isolator.linux.unprivileged import service_command
from isolator.recovery.journal import Entry, Journal

_BACKOFF_FIRST, _BACKOFF_LAST = 0.1, 5.0
_STEADY_SECONDS = 30.0


@dataclass(frozen=True)
class ServiceSpec:
    """What a service is: its module, its user, and what it can ask of the supervisor."""

    name: str
    module: str
    uid: int
    gid: int
    handlers: Mapping[str, Handler] = field(default_factory=dict)


class ChildProcess:
    """One service, started again whenever it dies. ``on_up`` introduces it to the others each time."""

    def __init__(
        self,
        spec: ServiceSpec,
        subtree: Subtree,
        journal: Journal,
        *,
        on_up: Callable[[ChildProcess], Awaitable[None]],
        inherit: Callable[[], dict[str, int]] = dict,
        log: Callable[[str], None] = lambda _: None,
    ) -> None:
        self.spec = spec
        self.channel: Channel | None = None
        self.starts = 0
        self.up = asyncio.Event()
        """Set while the service answers."""
        self.ended = ""
        """How it ended the last time."""
        self._subtree, self._journal = subtree, journal
        self._on_up, self._inherit, self._log = on_up, inherit, log
        self._process: subprocess.Popen[bytes] | None = None
        self._leaf: Leaf | None = None
        self._task: asyncio.Task[None] | None = None
        self._stopping = False

    async def start(self) -> None:
        """Start it for the first time (a failure is the caller's) and keep it running."""
        await self._launch()
        self._task = asyncio.create_task(self._keep(), name=f"service {self.spec.name}")

    async def stop(self) -> None:
        """Close its channel, wait 5 s for its end, then kill it."""
        self._stopping = True
        if self._task is not None:
            self._task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._task
        self.up.clear()
        if self.channel is not None:
            self.channel.close()
        if self._process is not None:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(5):
                    await _ended(self._process)
        await self._clear()

    @property
    def pid(self) -> int | None:
        """Its pid, for resource figures."""
        return self._process.pid if self._process is not None else None

    async def _launch(self) -> None:
        spec = self.spec
        leaf = Leaf(self._subtree.unified / f"service.{spec.name}")
        self._journal.record(Entry(f"service.{spec.name}", "service", tuple(map(str, leaf.folders()))))
        leaf.create(None)
        self._leaf = leaf
        mine, theirs = pair()
        inherited = {"channel": theirs.fileno(), **self._inherit()}
        command = service_command(spec.module, spec.uid, spec.gid, inherited)
        try:
            self._process = subprocess.Popen(
                command, pass_fds=list(inherited.values()), stdin=subprocess.DEVNULL, cwd="/",
                env={"PATH": "/usr/sbin:/usr/bin:/sbin:/bin", "LANG": "C.UTF-8"}, start_new_session=True, umask=0o027,
            )  # fmt: skip
        finally:
            for fd in inherited.values():
                if fd == theirs.fileno():
                    theirs.close()
                else:
                    os.close(fd)
        (leaf.unified / "cgroup.procs").write_text(str(self._process.pid))
        self.channel = Channel(mine, self.spec.handlers, name=spec.name)
        self.starts += 1
        await self._on_up(self)
        self.up.set()

    async def _keep(self) -> None:
        backoff = _BACKOFF_FIRST
        loop = asyncio.get_running_loop()
        while not self._stopping:
            started = loop.time()
            assert self.channel is not None and self._process is not None
            await self.channel.closed.wait()
            self.up.clear()
            await self._clear()
            self.ended = _how(self._process.returncode)
            self._log(f"{self.spec.name} ended ({self.ended}); starting it again")
            if loop.time() - started > _STEADY_SECONDS:
                backoff = _BACKOFF_FIRST
            while True:
                await asyncio.sleep(backoff)
                backoff = min(backoff * 2, _BACKOFF_LAST)
                try:
                    await self._launch()
                    break
                except Exception as error:  # whatever it was, the service must come back; the next try is paced
                    self._log(f"{self.spec.name} did not start: {error}")
                    await self._clear()

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


async def _ended(process: subprocess.Popen[bytes]) -> None:
    if process.poll() is not None:
        return
    loop = asyncio.get_running_loop()
    fd = os.pidfd_open(process.pid)
    ready: asyncio.Future[None] = loop.create_future()
    loop.add_reader(fd, lambda: None if ready.done() else ready.set_result(None))
    try:
        await ready
    finally:
        loop.remove_reader(fd)
        os.close(fd)
    process.wait()


def _how(code: int | None) -> str:
    if code is None:
        return "unknown"
    return f"killed by {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
