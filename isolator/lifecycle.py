"""The life of one plugin's sidecar: start, watch, stop, back off, give up.

States: ``stopped starting running stopping backoff failed disabled pending rejected``. A start is asked for
(``ensure``) by the host when an event waits, or by an operator. Once started it is wanted until it is stopped: a
crash is followed by a restart after a back-off (exponential with jitter); too many crashes in the window and it is
``failed``, kept and shown, until an operator starts it again.

One run at a time, and one task that owns it from the first journal entry to the last group removed. Everything of a
run is named by its run id; nothing is ever recognised by a bare pid.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import random
import secrets
import socket
import stat
import time
from collections import deque
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Protocol

from isolator import store as plugin_store
from isolator.errors import ConfinementError, DeniedError, IsolatorError, UnavailableError
from isolator.layers import network as network_layer
from isolator.layers.netns import Network
from isolator.linux.files import openat2
from isolator.linux.inotify import IN_CREATE, IN_MOVED_TO, Inotify
from isolator.plugin_cage import SOCKET, Environment, plugin_spec
from isolator.sandbox import End, Sandbox, Stdio, Tools
from isolator.state import State

if TYPE_CHECKING:
    from isolator.audit.client import AuditClient
    from isolator.denials import Denials
    from isolator.paths import Paths
    from isolator.policy.model import EffectivePolicy

SOCKET_SECONDS = 10.0
"""A sidecar whose socket is not there this long after its start has failed to start."""


class Surroundings(Protocol):
    """What a plugin's life needs of the supervisor."""

    tools: Tools
    paths: Paths
    audit: AuditClient
    denials: Denials

    async def environment(self, name: str) -> Environment: ...

    async def attach_network(self, run: str, plugin: str, network: network_layer.CageNetwork, policy: Any) -> None: ...

    async def detach_network(self, run: str) -> None: ...

    def run_started(self, plugin: Plugin, pipes: list[int]) -> None: ...

    def run_ended(self, plugin: Plugin, run: str, end: End, *, expected: bool, retry_in: float | None) -> None: ...

    def changed(self, plugin: Plugin) -> None: ...

    def record_resources(self, plugin: Plugin) -> None: ...


@dataclass
class Run:
    """One start of a sidecar."""

    id: str
    sandbox: Sandbox
    directory: int
    """The socket directory: a descriptor of its mount, which is attached nowhere on the host."""
    network: Network
    pipes: list[int]
    """Read ends of stdout and stderr, kept for a host that comes back."""
    watch: Inotify
    loose: list[int]
    """Descriptors that only the start needs."""
    socket_there: asyncio.Event = field(default_factory=asyncio.Event)
    started_at: str = ""
    verdict: str = ""
    """Why the supervisor ended it, when it did; told in place of what the process itself reports."""

    def end(self, why: str) -> None:
        """Kill the whole cage at once, for a reason."""
        self.verdict = self.verdict or why
        if self.sandbox.started:
            self.sandbox.leaf.kill()


class Plugin:
    """One registered plugin, and its run if it has one."""

    def __init__(
        self,
        around: Surroundings,
        registration: plugin_store.Registration,
        effective: EffectivePolicy | None,
        argv: list[str],
        version: str,
        *,
        error: str = "",
    ) -> None:
        self.registration, self.effective, self.argv, self.version = registration, effective, argv, version
        self.state = "rejected" if effective is None else ("stopped" if registration.enabled else "disabled")
        self.error = error
        self.run: Run | None = None
        self.restarts = 0
        self.manifest: dict[str, Any] = {}
        self._around = around
        self._crashes: deque[float] = deque()
        self._task: asyncio.Task[None] | None = None
        self._changed = asyncio.Condition()
        self._wanted = False
        self._hurry = asyncio.Event()

    @property
    def name(self) -> str:
        return self.registration.name

    # --- what others ask -------------------------------------------------------------------------------------

    async def ensure(self, reason: str) -> Run:
        """The running run; starts one if there is none, waits for a start or a back-off in progress."""
        if self.state in ("disabled", "rejected", "pending"):
            raise DeniedError(f"plugin {self.name}", self.error or self.state, _REMEDIES[self.state].format(self.name))
        if self.state == "failed":
            if reason != "operator":
                raise IsolatorError(f"plugin {self.name}", self.error, f"isolator plugin start {self.name}")
            self._crashes.clear()
        if reason == "operator":
            self._hurry.set()
        if self.state == "stopping" and self._task is not None:
            await asyncio.wait([self._task])
        if self._task is None or self._task.done():
            self._wanted = True
            self.error = ""
            self._set("starting")
            self._task = asyncio.create_task(self._live(reason), name=f"plugin {self.name}")
        async with self._changed:
            await self._changed.wait_for(lambda: self.state not in ("starting", "backoff", "stopping"))
        if self.state != "running" or self.run is None:
            raise UnavailableError(
                f"plugin {self.name}", self.error or f"is {self.state}", "see 'isolator plugin show'"
            )
        return self.run

    async def stop(self, reason: str) -> None:
        """Stop the run and want none; returns when everything of it is gone."""
        self._wanted = False
        self._hurry.set()
        run = self.run
        if run is not None and self.effective is not None and self.state in ("starting", "running"):
            self._set("stopping")
            await run.sandbox.stop(self.effective.restart.stop_grace)
        if self._task is not None:
            await asyncio.wait([self._task])

    async def connect(self, run_id: str, deadline: float) -> socket.socket:
        """A connection to the sidecar's socket, made for the host, which could not reach it itself."""
        run = self.run
        if run is None or run.id != run_id:
            raise UnavailableError(f"plugin {self.name}", "that run has ended", "ask again")
        end = asyncio.get_running_loop().time() + deadline
        pause = 0.001
        while True:
            if self.run is not run:
                raise UnavailableError(f"plugin {self.name}", "it ended while being connected to", "ask again")
            try:
                return self._connect_once(run)
            except (FileNotFoundError, ConnectionRefusedError, BlockingIOError) as error:
                # Bound but not yet listening, or its backlog of one is full: no event tells when that changes.
                if asyncio.get_running_loop().time() + pause > end:
                    why = f"its socket does not accept connections ({error.strerror})"
                    raise UnavailableError(f"plugin {self.name}", why, "see 'isolator plugin logs'") from None
                await asyncio.sleep(pause)
                pause = min(pause * 2, 0.05)

    def _connect_once(self, run: Run) -> socket.socket:
        fd = openat2(run.directory, SOCKET, os.O_PATH | os.O_NOFOLLOW)
        try:
            info = os.fstat(fd)
            if not stat.S_ISSOCK(info.st_mode) or info.st_uid != self.registration.uid:
                self._around.audit.record(
                    "fs.denied", plugin=self.name, run=run.id, path=SOCKET, why="not a socket of the plugin's own"
                )
                raise DeniedError(
                    f"plugin {self.name}", "its socket was replaced by something else", "nothing was sent"
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
                raise DeniedError(f"plugin {self.name}", "its socket is a link", "nothing was sent") from None
            raise
        finally:
            os.close(fd)

    # --- the task that owns a run ----------------------------------------------------------------------------

    async def _live(self, reason: str) -> None:
        while self._wanted:
            run_id, end, problem = await self._one_run(reason)
            expected = not self._wanted
            retry = None if expected else self._after_crash(problem or _describe(end))
            if end is not None:
                self._around.run_ended(self, run_id, end, expected=expected, retry_in=retry)
            if retry is None:
                break
            self._hurry.clear()
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._hurry.wait(), retry)
            if self._wanted:
                self.restarts += 1
                self._set("starting")
                reason = "restart after a crash"
        if self.state not in ("failed", "disabled", "rejected"):
            self._set("stopped")

    def _after_crash(self, why: str) -> float | None:
        """Note a crash; returns the seconds to wait, or None when there were too many."""
        assert self.effective is not None
        limits = self.effective.restart
        now = time.monotonic()
        self._crashes.append(now)
        while self._crashes and now - self._crashes[0] > limits.window:
            self._crashes.popleft()
        count = len(self._crashes)
        if count >= limits.crashes:
            self.error = f"{why}; {count} crashes in {limits.window / 60:g} minutes"
            self._set("failed")
            self._around.audit.record("plugin.failed", plugin=self.name, reason=self.error)
            return None
        self.error = why
        self._set("backoff")
        pause: float = min(limits.backoff_max, limits.backoff_min * 2 ** (count - 1))
        return pause * random.uniform(0.8, 1.2)

    async def _one_run(self, reason: str) -> tuple[str, End | None, str]:
        """Build one cage, watch it to its end, take everything down: (run id, its end, what kept it from starting)."""
        run: Run | None = None
        run_id = secrets.token_hex(5)
        try:
            await self._around.audit.writable()
            run = self.run = await self._prepare(run_id)
            await run.sandbox.start()
            self._started(run, reason)
            end = await self._watch(run)
            self._record_end(run, end)
            return run_id, end, ""
        except (IsolatorError, OSError) as error:
            why = str(error) if isinstance(error, IsolatorError) else f"{error.filename or 'start'}: {error.strerror}"
            self._around.audit.record("plugin.crashed", plugin=self.name, run=run_id, cause="did not start", reason=why)
            return run_id, None, why
        finally:
            self.run = None
            if run is not None:
                await self._take_down(run)

    async def _prepare(self, run_id: str) -> Run:
        effective, around = self.effective, self._around
        assert effective is not None
        prepared = asyncio.create_task(asyncio.to_thread(network_layer.prepare, effective.network, prefix=self.name))
        owned: list[int] = []
        network: Network | None = None
        try:
            environment = await around.environment(self.name)
            state = State(around.paths.state, self.name, around.tools.journal)
            spec = plugin_spec(self.registration, effective, self.argv, around.paths, run_id, environment, state, owned)
            network = Network(await prepared)
            await around.attach_network(run_id, self.name, network.network, effective.network)
            pipes, writers = _log_pipes()
            directory = spec.mounts["/run/isolator/plugin"]
            owned.remove(directory)
            watch = Inotify()
            watch.watch(f"/proc/self/fd/{directory}", IN_CREATE | IN_MOVED_TO)
            null = os.open("/dev/null", os.O_RDONLY | os.O_CLOEXEC)
            owned += [null, *writers]
            sandbox = Sandbox(spec, around.tools, Stdio(null, *writers), network)
            loose, owned = owned, []
            return Run(run_id, sandbox, directory, network, pipes, watch, loose)
        except BaseException:
            if network is None:
                with contextlib.suppress(Exception):
                    network = Network(await prepared)
            if network is not None:
                network.release()
            raise
        finally:
            _close(owned)

    def _started(self, run: Run, reason: str) -> None:
        from isolator.audit.client import utc_now
        from isolator.ledger import not_enforced

        effective, spec = self.effective, run.sandbox.spec
        assert effective is not None
        run.started_at = utc_now()
        _close(run.loose)
        audit = self._around.audit
        audit.record(
            "plugin.started",
            plugin=self.name,
            run=run.id,
            urgent=True,
            reason=reason,
            pid=run.sandbox.pid,
            uid=spec.uid,
            cgroup=str(run.sandbox.leaf.unified),
            digest=self.registration.digest,
            binary_sha256=self.registration.binary_sha256 or None,
            policy_sha256=effective.digest(),
            env=sorted(spec.env),
            milliseconds=run.sandbox.steps,
            degraded=not_enforced(),
        )
        if run.sandbox.listener >= 0:
            self._around.denials.watch(
                run.sandbox.listener,
                lambda denied: audit.record(
                    "syscall.denied",
                    plugin=self.name,
                    run=run.id,
                    happened_ns=denied.last_ns,
                    since_ns=denied.first_ns,
                    call=denied.call,
                    count=denied.count,
                ),
            )
            run.sandbox.listener = -1
        self._set("running")
        self._around.run_started(self, run.pipes)

    async def _watch(self, run: Run) -> End:
        """Wait for the end; a sidecar that does not make its socket in time is ended."""
        loop = asyncio.get_running_loop()
        loop.add_reader(run.watch.fileno(), self._look_for_socket, run)
        self._look_for_socket(run)
        drift = network_layer.watch(run.network.network)
        loop.add_reader(drift, self._ruleset_changed, run, drift)
        waiting = asyncio.create_task(run.sandbox.wait())
        try:
            there = asyncio.create_task(run.socket_there.wait())
            await asyncio.wait({waiting, there}, timeout=SOCKET_SECONDS, return_when=asyncio.FIRST_COMPLETED)
            there.cancel()
            if not run.socket_there.is_set() and not waiting.done():
                assert self.effective is not None
                await run.sandbox.stop(self.effective.restart.stop_grace)
                run.verdict = run.verdict or f"no socket in {SOCKET_SECONDS:g} s"
            end = await waiting
            return replace(end, cause=run.verdict) if run.verdict else end
        finally:
            loop.remove_reader(run.watch.fileno())
            loop.remove_reader(drift)
            drift.close()
            waiting.cancel()

    def _ruleset_changed(self, run: Run, drift: socket.socket) -> None:
        """Somebody touched the cage's ruleset: it still leads nowhere but loopback, but the promise is broken."""
        with contextlib.suppress(BlockingIOError):
            while drift.recv(65536):
                pass
        try:
            assert self.effective is not None
            network_layer.confirm(run.network.network, self.effective.network)
        except ConfinementError as error:
            self._around.audit.record("net.denied", plugin=self.name, run=run.id, rule="ruleset-changed", why=error.why)
            run.end("its network rules were changed")

    def _look_for_socket(self, run: Run) -> None:
        run.watch.read()
        with contextlib.suppress(OSError):
            os.close(openat2(run.directory, SOCKET, os.O_PATH | os.O_NOFOLLOW))
            run.socket_there.set()

    def _record_end(self, run: Run, end: End) -> None:
        self._around.record_resources(self)
        self._around.audit.record(
            "plugin.crashed" if self._wanted else "plugin.stopped",
            plugin=self.name,
            run=run.id,
            exit_code=end.exit_code,
            signal=end.signal,
            cause=end.cause,
            oom_kills=end.events.oom_kills,
            task_denials=end.events.task_denials,
            uptime=round(end.uptime, 3),
        )

    async def _take_down(self, run: Run) -> None:
        _close(run.loose)
        await run.sandbox.release()
        with contextlib.suppress(UnavailableError):
            await self._around.detach_network(run.id)
        run.watch.close()
        _close([run.directory, *run.pipes])

    def _set(self, state: str) -> None:
        self.state = state
        self._around.changed(self)
        asyncio.get_running_loop().create_task(self._notify()).add_done_callback(lambda t: t.exception())

    async def _notify(self) -> None:
        async with self._changed:
            self._changed.notify_all()


_REMEDIES = {
    "disabled": "isolator plugin enable {0}",
    "rejected": "correct it and run 'isolator plugin update {0}'",
    "pending": "isolator plugin approve {0}",
}


def _describe(end: End | None) -> str:
    if end is None:
        return "did not start"
    if end.cause in ("exit", "signal"):
        return f"exit code {end.exit_code}" if end.signal is None else f"killed by signal {end.signal}"
    return end.cause


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


def _close(fds: list[int]) -> None:
    while fds:
        os.close(fds.pop())
