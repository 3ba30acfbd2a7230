"""One run of a sidecar: its cage, its socket directory, its log pipes, its network, from preparation to the last trace.

``Plugin`` in ``lifecycle.py`` decides when there is a run and what follows it; here is how one is built, watched and
taken down. Everything of a run is named by its run id; nothing is ever recognised by a bare pid.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import socket
import stat
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Protocol

from isolator.audit.schema import FsDenied, NetDenied
from isolator.audit.snapshots import OF_PROCESSES, snapshot
from isolator.cage.cage import Cage, Stdio
from isolator.cage.processes import CageExit
from isolator.cage.runtime import CageRuntime
from isolator.errors import ConfinementError, DeniedError, UnavailableError
from isolator.layers.network import namespace as network_layer
from isolator.layers.user import plugin_gid
from isolator.linux.files import openat2
from isolator.policy.denial import DenialRule
from isolator.supervisor.cage_spec import SOCKET, Environment, plugin_spec
from isolator.volume.volume import Volume

if TYPE_CHECKING:
    from isolator.audit.client import AuditClient
    from isolator.layers.seccomp.notifier import SeccompNotifier
    from isolator.paths import Paths
    from isolator.policy.model import EffectivePolicy
    from isolator.registration.store import Registration
    from isolator.supervisor.socket_watch import SocketWatch

SOCKET_SECONDS = 10.0
"""A sidecar whose socket is not there this long after its start has failed to start."""
STEADY_SECONDS = 1.0
"""A new version whose socket has been there for so long is taken to be up."""


class RunSurroundings(Protocol):
    """What a run needs of the supervisor."""

    runtime: CageRuntime
    paths: Paths
    audit: AuditClient
    denials: SeccompNotifier
    sockets: SocketWatch

    async def may_start(self) -> None: ...

    async def last_words(self, name: str, run: str) -> list[str]: ...

    async def environment(self, name: str) -> Environment: ...

    async def attach_network(self, run: str, plugin: str, network: network_layer.CageNetwork, policy: Any) -> None: ...

    async def detach_network(self, run: str) -> None: ...


@dataclass
class Run:
    """One start of a sidecar."""

    id: str
    plugin: str
    effective: EffectivePolicy
    cage: Cage
    directory: int
    """The socket directory: a descriptor of its mount, which is attached nowhere on the host."""
    pipes: list[int]
    """Read ends of stdout and stderr, kept for a host that comes back."""
    loose: list[int]
    """Descriptors that only the start needs."""
    around: RunSurroundings
    socket_there: asyncio.Event = field(default_factory=asyncio.Event)
    started_at: str = ""
    figures: dict[str, Any] = field(default_factory=dict)
    """What it used when it was last looked at."""
    over: bool = False
    """Its first process has ended; what is left of the others is about to."""
    verdict: str = ""
    """Why the supervisor ended it, when it did; told in place of what the process itself reports."""

    def end(self, why: str) -> None:
        """Kill the whole cage at once, for a reason."""
        self.verdict = self.verdict or why
        if self.cage.started:
            self.cage.kill()

    def detect_drift(self) -> str:
        """What somebody changed about the running cage's groups; empty when it is as it was made."""
        return self.cage.detect_drift() if self.cage.started else ""

    def look(self) -> dict[str, Any]:
        """What it uses now, or came to; of processes that have ended meanwhile, what they had when last looked at."""
        leaf = self.cage.leaf
        now = snapshot(leaf.folders(), [] if self.over else leaf.processes())
        before = {} if now["processes"] else {key: self.figures[key] for key in OF_PROCESSES if key in self.figures}
        self.figures = {**before, **now}
        return self.figures

    async def watch(
        self, halt: asyncio.Event, *, steady: Callable[[], None], leave: Callable[[], Awaitable[None]]
    ) -> CageExit:
        """Wait for the end; a sidecar that does not make its socket in time is ended.

        It is stopped when ``halt`` is set, after ``leave``, in which those who speak with it end their conversation.
        ``steady`` is called when the socket has been there for ``STEADY_SECONDS``.
        """
        loop = asyncio.get_running_loop()
        watched = self.around.sockets.add(self.directory, self._look_for_socket)
        self._look_for_socket()
        drift = network_layer.watch(self.cage.network)
        loop.add_reader(drift, self._ruleset_changed, drift)
        waiting = asyncio.create_task(self.cage.wait())
        there = asyncio.create_task(self.socket_there.wait())
        stopping = asyncio.create_task(self._stop_when(halt, leave))
        try:
            await asyncio.wait({waiting, there}, timeout=SOCKET_SECONDS, return_when=asyncio.FIRST_COMPLETED)
            self.around.sockets.remove(watched)
            if self.socket_there.is_set():
                await asyncio.wait({waiting}, timeout=STEADY_SECONDS)
                if not waiting.done():
                    steady()
            elif not waiting.done():
                await self.cage.stop(self.effective.restart.stop_grace)
                self.verdict = self.verdict or f"no socket in {SOCKET_SECONDS:g} s"
            end = await waiting
            self.over = True
            return replace(end, cause=self.verdict) if self.verdict else end
        finally:
            self.around.sockets.remove(watched)
            loop.remove_reader(drift)
            drift.close()
            for task in (there, stopping, waiting):
                task.cancel()

    async def _stop_when(self, halt: asyncio.Event, leave: Callable[[], Awaitable[None]]) -> None:
        await halt.wait()
        try:
            await leave()
        except Exception as error:  # whatever it was, the run is stopped
            context = {"message": f"{self.plugin} was stopped without a leave", "exception": error}
            asyncio.get_running_loop().call_exception_handler(context)
        self.look()
        await self.cage.stop(self.effective.restart.stop_grace)

    async def connect(self, uid: int, deadline: float, alive: Callable[[], bool]) -> socket.socket:
        """A connection to the sidecar's socket, made for the host, which could not reach it itself."""
        end = asyncio.get_running_loop().time() + deadline
        pause = 0.001
        while True:
            if not alive():
                raise UnavailableError(f"plugin {self.plugin}", "it ended while being connected to", "ask again")
            try:
                return self._connect_once(uid)
            except (FileNotFoundError, ConnectionRefusedError, BlockingIOError) as error:
                # Bound but not yet listening, or its backlog of one is full: no event tells when that changes.
                if asyncio.get_running_loop().time() + pause > end:
                    why = f"its socket does not accept connections ({error.strerror})"
                    raise UnavailableError(f"plugin {self.plugin}", why, "see 'isolator plugin logs'") from None
                await asyncio.sleep(pause)
                pause = min(pause * 2, 0.05)

    def _connect_once(self, uid: int) -> socket.socket:
        fd = openat2(self.directory, SOCKET, os.O_PATH | os.O_NOFOLLOW)
        try:
            info = os.fstat(fd)
            if not stat.S_ISSOCK(info.st_mode) or info.st_uid != uid:
                denied = FsDenied(path=SOCKET, count=1, why="not a socket of the plugin's own")
                self.around.audit.record(denied, plugin=self.plugin, run=self.id)
                raise DeniedError(
                    f"plugin {self.plugin}", "its socket was replaced by something else", "nothing was sent"
                )
            connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
            connection.setblocking(False)
            try:
                # Through the descriptor that was just checked: the name may mean something else by now.
                connection.connect(f"/proc/self/fd/{fd}")
            except BaseException:
                connection.close()
                raise
            return connection
        except OSError as error:
            if error.errno in (errno.ELOOP, errno.EXDEV):
                raise DeniedError(f"plugin {self.plugin}", "its socket is a link", "nothing was sent") from None
            raise
        finally:
            os.close(fd)

    async def take_down(self) -> None:
        """Everything of the run is removed; idempotent where it matters: after a start that failed half-way too."""
        close_all(self.loose)
        await self.cage.release()
        with contextlib.suppress(UnavailableError):
            await self.around.detach_network(self.id)
        close_all([self.directory, *self.pipes])

    def _look_for_socket(self) -> None:
        with contextlib.suppress(OSError):
            os.close(openat2(self.directory, SOCKET, os.O_PATH | os.O_NOFOLLOW))
            self.socket_there.set()

    def _ruleset_changed(self, drift: socket.socket) -> None:
        """Somebody touched the cage's ruleset: it still leads nowhere but loopback, but the promise is broken."""
        with contextlib.suppress(BlockingIOError):
            while drift.recv(65536):
                pass
        try:
            network_layer.confirm(self.cage.network, self.effective.network)
        except ConfinementError as error:
            denied = NetDenied(rule=DenialRule.RULESET_CHANGED, why=error.why)
            self.around.audit.record(denied, plugin=self.plugin, run=self.id)
            self.end("its network rules were changed")


async def prepare_run(
    around: RunSurroundings, registration: Registration, effective: EffectivePolicy, argv: list[str], run_id: str,
    environment: Environment,
) -> Run:  # fmt: skip
    """Everything of a run but the cage itself; raises IsolatorError or OSError, and nothing of it is left then."""
    name = registration.name
    owned: list[int] = []
    try:
        state = Volume(around.paths.state, name, around.runtime.journal)
        files = effective.filesystem
        if files.state and not state.ready(files.state):
            # Formatting, checking and resizing take their time; nothing else of the daemon waits for them.
            gid = plugin_gid(registration.user, registration.uid)
            owner = {"uid": registration.uid, "gid": gid}
            os.close(await asyncio.to_thread(state.open, size=files.state, inodes=files.state_inodes, **owner))
        spec = plugin_spec(registration, effective, argv, around.paths, run_id, environment, state, owned)

        async def hand_over(made: network_layer.CageNetwork) -> None:
            await around.attach_network(run_id, name, made, effective.network)

        pipes, writers = _log_pipes()
        null = os.open("/dev/null", os.O_RDONLY | os.O_CLOEXEC)
        directory = spec.mounts["/run/isolator/plugin"]
        cage = Cage(spec, around.runtime, Stdio(null, *writers), handover=hand_over)
        run = Run(run_id, name, effective, cage, directory, pipes, [], around)
        owned.remove(directory)
        run.loose, owned = [*owned, null, *writers], []
        return run
    finally:
        close_all(owned)


def close_all(fds: list[int]) -> None:
    """Close descriptors and forget them."""
    while fds:
        os.close(fds.pop())


def _log_pipes() -> tuple[list[int], list[int]]:
    """Pipes for stdout and stderr: read ends, and write ends opened read-write.

    A write end alone would give the plugin EPIPE when the reader, the host, dies.
    """
    readers, writers = [], []
    for _ in range(2):
        read, write = os.pipe2(os.O_CLOEXEC)
        writers.append(os.open(f"/proc/self/fd/{write}", os.O_RDWR | os.O_CLOEXEC))
        os.close(write)
        os.set_blocking(read, False)
        readers.append(read)
    return readers, writers
