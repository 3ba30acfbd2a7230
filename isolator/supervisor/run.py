"""One run of a sidecar: its cage, its socket directory, its log pipes, its network, from preparation to the last trace.

``Plugin`` in ``lifecycle/`` decides when there is a run and what follows it; here is how one is built, watched and
taken down. Everything of a run is named by its run id; nothing is ever recognised by a bare pid.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import functools
import os
import socket
from collections.abc import Awaitable, Callable, Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from isolator.audit.schema import NetDenied, SyscallDenied
from isolator.base.pacing import Backoff
from isolator.base.structs import replace
from isolator.cage.cage import Cage
from isolator.cage.processes import CageExit
from isolator.errors import UnavailableError
from isolator.ipc.messages import Origin
from isolator.layers.network import namespace as network_layer
from isolator.linux.descriptors import FdSet
from isolator.policy.denial import DenialRule
from isolator.supervisor import ports, reach
from isolator.supervisor.reach import Identity, identity
from isolator.supervisor.ruleset_watch import watched_ruleset
from isolator.supervisor.sidecar_socket import SidecarSocket
from isolator.supervisor.use import Use
from isolator.volume.volume import Volume

if TYPE_CHECKING:
    from isolator.audit.client import AuditClient
    from isolator.cage.runtime import CageRuntime
    from isolator.ipc.handover import RunState
    from isolator.layers.seccomp.notifier import Denied, SeccompNotifier
    from isolator.paths import Paths
    from isolator.policy.model import EffectivePolicy
    from isolator.supervisor.broker_link import BrokerLink
    from isolator.supervisor.fences import Fences
    from isolator.supervisor.host_link import HostLink
    from isolator.supervisor.rest import Rest
    from isolator.supervisor.socket_watch import SocketWatch

NO_SOCKET = "no socket"
"""First words of the cause of an end that a sidecar's missing socket was."""
NO_ANSWER = "no answer to the first request"
"""The same of one that is spoken to over its standard streams."""
CLOSED_SECONDS = 2.0
"""Time between the end of a sidecar's standard input, which asks it to end, and SIGTERM."""
UNSEEN_SECONDS = 0.2
"""Time until a socket is looked for again, when no descriptor was free for that."""
FROZEN_BEAT = 0.25
"""Seconds between two looks at whether a frozen cage goes on."""
STEADY_SECONDS = 1.0
"""A new version whose socket has been there for so long is taken to be up."""


@dataclass(frozen=True)
class RunContext:
    """The parts of the daemon that runs use."""

    paths: Paths
    runtime: CageRuntime
    audit: AuditClient
    host: HostLink
    broker: BrokerLink
    sockets: SocketWatch
    notifier: SeccompNotifier
    wait_for_trail: bool
    """Start nothing while the trail cannot be written."""
    rest: Rest
    fences: Fences


@dataclass
class Run:
    """One start of a sidecar."""

    id: str
    plugin: str
    effective: EffectivePolicy
    cage: Cage
    place: Identity
    """Identity of the socket directory, whose mount is attached nowhere but in the cage."""
    logs: tuple[int, ...]
    """Inodes of the pipes of stdout and stderr, of which pid 1 of the cage keeps reading ends."""
    kept: FdSet
    """Owner of ``streams``, and of ``pipes`` that pid 1 has not."""
    for_start: FdSet
    """Descriptors that only the start needs: the socket directory and the log pipes, too."""
    context: RunContext
    socket_there: asyncio.Event = field(default_factory=asyncio.Event)
    started_at: str = ""
    began: float = 0.0
    """Loop time of its start."""
    exited: bool = False
    """Its first process has ended; the others are about to."""
    forced_cause: str = ""
    """Why the supervisor ended it, if it did; takes the place of the cause that the process itself reports."""
    origin: Origin = Origin.PLUGIN
    """Whose doing its end is, unless it is stopped."""
    shown: dict[str, tuple[int, int]] = field(default_factory=dict)
    """Device and inode of each path that its policy shows it, as they were at its start."""
    pipes: list[int] = field(default_factory=list)
    """Reading ends of the log pipes, while this process has them."""
    crossing: FdSet = field(default_factory=FdSet)
    """Descriptors that are open for an exec of this process."""
    streams: list[int] = field(default_factory=list)
    """Of a sidecar that the host speaks to over its stdin and stdout: this end of both, sockets."""
    reached: bool = False
    """The host has connected to its socket, or has its streams."""
    port: int | None = None
    """Where on its own loopback it listens, in place of its socket."""
    denials: object = None
    """The notifier's token of its seccomp listener."""
    stopping: bool = False
    """It is to end by itself, and is killed if it does not."""
    _unseen: OSError | None = None
    """Why its socket could not be looked for the last time."""
    _again: asyncio.TimerHandle | None = None
    """The next time then."""
    _frozen_at: float | None = None
    """Loop time at which its cage was frozen, while it is."""
    _frozen_before: float = 0.0
    """Seconds for which it was frozen before that."""

    @property
    def executes(self) -> bool:
        """Whether its program has begun."""
        return self.cage.started and self.cage.processes.started > 0

    @property
    def ending(self) -> bool:
        """Whether it was asked to end, and has not ended."""
        return self.stopping and self.cage.started and not self.cage.processes.ended.is_set()

    @property
    def frozen(self) -> bool:
        """Whether its cage is frozen."""
        return self._frozen_at is not None

    @property
    def frozen_seconds(self) -> float:
        """Seconds for which its cage was frozen, all in all: they count for no time that the plugin has."""
        now = asyncio.get_running_loop().time()
        return self._frozen_before + (now - self._frozen_at if self._frozen_at is not None else 0.0)

    def freeze(self) -> None:
        """Freeze the cage; one that is to stop is killed, as it could not end by itself."""
        if self.stopping:
            self.terminate("stopped at once: it was frozen", self.origin)
            return
        if self._frozen_at is None:
            self._frozen_at = asyncio.get_running_loop().time()
        try:
            self.cage.leaf.freeze()
        except OSError as error:
            self.terminate(f"its cage could not be frozen: {error.strerror}")

    def thaw(self) -> None:
        """Let the cage go on."""
        self._frozen_before, self._frozen_at = self.frozen_seconds, None
        self.cage.leaf.thaw()

    async def first_of(self, signs: Iterable[asyncio.Task[Any]], deadline: float) -> None:
        """Wait for the first of the signs, until that loop time, which is put off while the cage is frozen."""
        while True:
            left = max(0.0, deadline + self.frozen_seconds - asyncio.get_running_loop().time())
            pause = max(left, FROZEN_BEAT) if self.frozen else left
            done, _ = await asyncio.wait(signs, timeout=pause, return_when=asyncio.FIRST_COMPLETED)
            if done or not left:
                return

    def terminate(self, cause: str, origin: Origin = Origin.DAEMON) -> None:
        """Kill the whole cage at once; ``cause`` and ``origin`` are recorded as those of its end."""
        if not self.forced_cause:
            self.forced_cause, self.origin = cause, origin
        if self.cage.started:
            self.cage.kill()

    def detect_drift(self) -> str:
        """Return which of the running cage's control groups somebody has changed, or which entry of /proc has come."""
        return self.cage.detect_drift() if self.cage.started else ""

    def replaced(self) -> tuple[str, ...]:
        """The paths it is shown at which the host has something else by now; blocks while a file system does."""
        return tuple(path for path, known in self.shown.items() if _identity_at(path, known) != known)

    @functools.cached_property
    def use(self) -> Use:
        """What it uses."""
        context = self.context
        state = Volume(context.paths.state, self.plugin, context.runtime.journal)
        return Use(self.cage, state if self.effective.filesystem.state else None)

    def usage(self) -> dict[str, Any]:
        """Return the resources used so far; those of processes that have ended as of the call before."""
        return self.use.look(exited=self.exited)

    async def watch(
        self,
        stop: asyncio.Event,
        *,
        on_ready: Callable[[], None],
        on_steady: Callable[[], None],
        drain: Callable[[], Awaitable[None]],
    ) -> None:
        """Wait for the end, which ``ended`` returns then; a sidecar that does not make its socket in time is ended.

        ``stop`` ends it gracefully, after ``drain``. ``on_ready`` is called when the socket is there, ``on_steady``
        when it has been for ``STEADY_SECONDS``.
        """
        patience = self.effective.restart.start_timeout
        watched = -1
        with contextlib.suppress(FileNotFoundError), self.unix_socket.folder() as folder:  # it may have ended by now
            watched = self.context.sockets.add(folder, self._check_socket)
        self._check_socket()
        polling = asyncio.create_task(self._poll_port(self.port)) if self.port is not None else None
        watching = contextlib.ExitStack()
        waiting = asyncio.create_task(self.cage.processes.ended.wait())
        there = asyncio.create_task(self.socket_there.wait())
        stopping = asyncio.create_task(self._stop_when(stop, drain))
        try:
            watching.enter_context(watched_ruleset(self.cage.network, self.effective.network, self.ruleset_changed))
            await self.first_of({waiting, there}, self.began + patience)
            self.context.sockets.remove(watched)
            if self.socket_there.is_set():
                on_ready()
                await asyncio.wait({waiting}, timeout=STEADY_SECONDS)
                if not waiting.done():
                    on_steady()
            elif not waiting.done():
                cause = f"{NO_ANSWER if self.streams else NO_SOCKET} in {patience:g} s"
                if self._unseen is not None and not self.forced_cause:  # whether it is there nobody knows
                    cause, self.origin = f"its socket cannot be looked for: {self._unseen.strerror}", Origin.DAEMON
                self.forced_cause = self.forced_cause or cause
                await self._stop()
            await waiting
        finally:
            self.context.sockets.remove(watched)
            watching.close()
            for task in (there, stopping, waiting, *([polling] if polling is not None else [])):
                task.cancel()

    async def ended(self) -> CageExit:
        """How the sidecar has ended: it is reaped, and known to nobody else from here on."""
        end = await self.cage.wait()
        self.exited = True
        return replace(end, cause=self.forced_cause) if self.forced_cause else end

    async def _stop_when(self, stop: asyncio.Event, drain: Callable[[], Awaitable[None]]) -> None:
        await stop.wait()
        self.stopping = True
        if self.frozen:
            self._last_look()
            self.freeze()
            return
        try:
            await drain()
        except Exception as error:  # whatever it was, the run is stopped
            context = {"message": f"{self.plugin} was stopped without being drained", "exception": error}
            asyncio.get_running_loop().call_exception_handler(context)
        self._last_look()
        await self._stop()

    def _last_look(self) -> None:
        """Note what it uses while it still runs, if that can be read."""
        with contextlib.suppress(OSError):
            self.usage()

    async def _stop(self) -> None:
        self.stopping = True
        if self.streams:
            with contextlib.suppress(OSError), socket.socket(fileno=os.dup(self.streams[0])) as stdin:
                stdin.shutdown(socket.SHUT_WR)  # also of the host's copy
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self.cage.processes.ended.wait(), CLOSED_SECONDS)
        if not self.cage.processes.ended.is_set():
            await self.cage.stop(self.effective.restart.stop_grace)

    def talk(self) -> list[socket.socket]:
        """Hand out the standard streams, once: nobody else knows what was said; raises UnavailableError."""
        if self.reached:
            raise UnavailableError(f"plugin {self.plugin}", "another host has spoken to this run", "try again")
        self.reached = True
        return [socket.socket(fileno=os.dup(fd)) for fd in self.streams]

    async def connect(self, uid: int, deadline: float, alive: Callable[[], bool]) -> socket.socket:
        """Connect to the sidecar's socket for the host, which could not reach it itself.

        Tries for ``deadline`` seconds and while ``alive``. Raises UnavailableError, or DeniedError when the socket is
        not one of the user ``uid``.
        """
        loop = asyncio.get_running_loop()
        end, backoff = loop.time() + deadline, Backoff(0.001, 0.05)
        while True:
            if not alive():
                raise UnavailableError(f"plugin {self.plugin}", "it ended while being connected to", "tried again")
            try:
                if self.port is None:
                    return self.connect_at_once(uid)
                connection = await ports.connect(self.cage.network, self.port)
                self.reached = True
                return connection
            except (FileNotFoundError, ConnectionRefusedError, BlockingIOError) as error:
                # Bound but not yet listening, or its backlog of one is full: no event tells when that changes.
                pause = backoff.next()
                if loop.time() + pause > end:
                    why = self._unreached(error)
                    raise UnavailableError(f"plugin {self.plugin}", why, "see 'isolator plugin logs'") from None
                await asyncio.sleep(pause)

    def _unreached(self, error: OSError) -> str:
        if self.socket_there.is_set():
            return f"its {self._place} does not accept connections ({error.strerror})"
        passed = asyncio.get_running_loop().time() - self.began
        return f"its {self._place} is not there yet, after {passed:.0f} s of {self.effective.restart.start_timeout:g}"

    @property
    def _place(self) -> str:
        return "socket" if self.port is None else f"listener on port {self.port}"

    async def _poll_port(self, port: int) -> None:
        """Set ``socket_there`` once somebody in the cage listens on the port."""
        if not self.socket_there.is_set():
            await ports.until_listening(self.cage.pid, port)
            self.socket_there.set()

    def release_start(self) -> None:
        """Close what only the start needed: from now on it is reached through the cage."""
        self.for_start.close()
        self.pipes.clear()

    def open_logs(self) -> FdSet:
        """Reading ends of its stdout and stderr for a host, which are the caller's."""
        if self.pipes:
            return FdSet(os.dup(pipe) for pipe in self.pipes)
        return FdSet(reach.open_pipe(self.cage.pid, pipe) for pipe in self.logs)

    @functools.cached_property
    def unix_socket(self) -> SidecarSocket:
        """The sidecar's Unix socket."""
        return SidecarSocket(self.plugin, self.id, self.cage, self.place, self.context.audit)

    def connect_at_once(self, uid: int) -> socket.socket:
        """Connect to the sidecar's Unix socket; raises OSError when that takes longer, and as ``connect``."""
        connection = self.unix_socket.connect(uid)
        self.reached = True
        return connection

    async def take_down(self) -> None:
        """Remove everything of the run; also after a start that failed half-way."""
        self.release_start()
        self.stay()
        await self.cage.release()
        with contextlib.suppress(UnavailableError):
            await self.context.broker.detach(self.id)
        self.kept.close()

    def answer_denied(self, listener: int) -> None:
        """Have its denied calls answered and recorded; ``listener``, which is the notifier's from here on, -1: not."""

        def record(denied: Denied) -> None:
            self.context.audit.record(
                SyscallDenied(call=denied.call, count=denied.count),
                plugin=self.plugin, run=self.id, happened_ns=denied.last_ns, since_ns=denied.first_ns,
            )  # fmt: skip

        if listener >= 0:
            self.denials = self.context.notifier.watch(listener, record)

    def hand_over(self) -> RunState:
        """The state of this run, which is being watched, before an exec, with descriptors that are open until ``stay``.

        The version that comes may be one that holds them for as long as the run lasts.
        """
        from isolator.ipc.handover import RunState

        self.stay()
        stdout, stderr = map(self.crossing.add, self.open_logs().release_all())
        try:
            with self.unix_socket.folder() as folder:
                directory = os.dup(folder)
        except FileNotFoundError:  # it ends at this moment
            directory = reach.empty_folder()
        return RunState(
            id=self.id,
            uid=self.cage.spec.uid,
            gid=self.cage.spec.gid,
            cage=self.cage.hand_over(),
            directory=self.crossing.add(directory),
            stdout=stdout,
            stderr=stderr,
            listener=self.context.notifier.listener_of(self.denials),
            streams=dict(zip(("stdin", "stdout"), self.streams, strict=False)),
            drift=-1,
            started_at=self.started_at,
            began=self.began + self.frozen_seconds,
            forced_cause=self.forced_cause,
            origin=self.origin,
            reached=self.reached,
            ready=self.socket_there.is_set(),
            shown={path: tuple(known) for path, known in self.shown.items()},
            usage=self.use.latest,
            port=self.port,
        )

    def stay(self) -> None:
        """Close what was opened for an exec, which has not come."""
        if self.crossing:
            self.crossing.close()
            network_layer.settle(self.cage.network)

    def _check_socket(self) -> None:
        if self.streams or self.port is not None:
            return
        self._unseen = None
        if self._again is not None:
            self._again.cancel()
        try:
            if self.unix_socket.exists():
                self.socket_there.set()
        except OSError as error:  # its making is told of once
            self._unseen = error
            self._again = asyncio.get_running_loop().call_later(UNSEEN_SECONDS, self._check_socket)

    def ruleset_changed(self, difference: str) -> None:
        """End it: somebody touched its ruleset, which still leads nowhere but loopback, but the promise is broken."""
        denied = NetDenied(rule=DenialRule.RULESET_CHANGED, why=difference)
        self.context.audit.record(denied, plugin=self.plugin, run=self.id)
        self.terminate("its network rules were changed", Origin.OPERATOR)


def _identity_at(path: str, known: Identity) -> Identity | None:
    """Identity of the file there; ``known`` where that cannot be told, as by a file system that is away."""
    try:
        return identity(os.lstat(path))
    except OSError as error:
        return None if error.errno in (errno.ENOENT, errno.ENOTDIR, errno.ELOOP) else known
