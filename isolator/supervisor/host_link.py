"""The host process, which learns of plugins and runs, and knows the plugins' config.

A host that is away misses nothing: the next one gets every plugin with ``hello`` and every run after it.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

from isolator.audit.client import AuditClient
from isolator.cage.processes import CageExit
from isolator.errors import IsolatorError, UnavailableError
from isolator.ipc import messages
from isolator.ipc.body import Handler, R, Request, WithFds, by_op
from isolator.ipc.channel import MAX_PACKET, Channel
from isolator.linux.descriptors import FdSet
from isolator.linux.memfd import read_sealed
from isolator.paths import Paths
from isolator.policy.host import HostConfig
from isolator.supervisor.alarms import Alarms
from isolator.supervisor.cage_spec import host_api_folder
from isolator.supervisor.control_door import ControlDoor
from isolator.supervisor.kept import check_host, tables
from isolator.supervisor.listener import listen
from isolator.supervisor.service import ChildProcess

DRAIN_SECONDS = 3.0
"""Time in which the host drains a run that is to stop; the host itself allows less."""
GIVE_UP_SECONDS = 8.0
"""Time in which the host gives its plugins to other hosts; the host itself allows less."""
_MAX_FILES = 8 << 20
"""Bytes of the files of one plugin's config, as JSON."""
_ENVIRONMENT_SECONDS = 10.0
_STDERR_TAIL_SECONDS = 1.0
"""The end of a run is recorded without its stderr rather than later."""


class HostLink:
    """The host process."""

    def __init__(
        self, process: ChildProcess, paths: Paths, config: HostConfig, alarms: Alarms, audit: AuditClient
    ) -> None:
        self.process, self.door = process, ControlDoor(paths, config, audit)
        self._paths, self._config, self._alarms = paths, config, alarms
        self.deadlines: Callable[[], dict[str, float]] = dict
        """Returns those of plugins that are bound to one."""
        alarms.on_change = lambda lines: self._tell(messages.AlarmsChanged(alarms=lines))

    @property
    def tables(self) -> int:
        """Version of the tables in its database; 0 where that cannot be read."""
        return tables(self._paths.host_database)

    def handlers(self) -> dict[str, Handler]:
        """Requests of the host that are about itself."""
        return by_op(messages.RaiseAlarm.on(self._raise_alarm), messages.ShutOut.on(self.door.shut))

    async def hello(self, channel: Channel, entries: Sequence[messages.PluginEntry]) -> None:
        """Say hello to a new host: it gets every plugin and a fresh listener on the control socket."""
        settings = self._settings()
        with self.door.listen() as listener:
            hello = self._hello(channel, entries, settings, self._alarms.lines, listener=listener.fileno())
            await self.process.first_answer(hello)

    def succeed(
        self, entries: Callable[[], Sequence[messages.PluginEntry]]
    ) -> Callable[[Channel, int], Awaitable[None]]:
        """Return what says hello to a host that takes the place of one that knows the plugins of now.

        It gets the plugins, too, that the other one adds as it leaves: their requests in flight, and connections, are
        passed to it, and would be closed for want of a plugin.
        """
        settings, alarms, known = self._settings(), self._alarms.lines, entries()
        names = {entry.name for entry in known}

        async def introduce(channel: Channel, parts: int) -> None:
            added = [entry for entry in entries() if entry.name not in names]
            await self._hello(channel, [*known, *added], settings, alarms, parts=parts)

        return introduce

    async def _hello(
        self, channel: Channel, entries: Sequence[messages.PluginEntry], settings: dict[str, Any],
        alarms: tuple[str, ...], *, listener: int = -1, parts: int = 0,
    ) -> None:  # fmt: skip
        check_host(self._paths)
        plugins: tuple[messages.PluginEntry, ...] | None = tuple(entries)
        encoded = json.dumps([entry.to_json() for entry in entries]).encode()
        with FdSet() as owned:
            fds = [listener] if listener >= 0 else []
            if len(encoded) > MAX_PACKET // 2:
                plugins = None
                fds.append(owned.add(os.memfd_create("plugins", os.MFD_CLOEXEC)))
                with os.fdopen(os.dup(fds[-1]), "wb") as file:
                    file.write(encoded)
            hello = messages.HostHello(
                root=str(self._paths.root), config=settings, plugins=plugins,
                fresh=self.process.starts == 1, alarms=alarms, parts=parts, fences=self.deadlines(),
            )  # fmt: skip
            await channel.ask(hello, fds=fds)

    def _settings(self) -> dict[str, Any]:
        """What a host is told of host.toml. The alarms that it is told beside that are those of afterwards."""
        config: dict[str, Any] = self._config.model_dump(mode="json")
        cluster = self._config.cluster
        if cluster is not None and cluster.credentials:
            from isolator.supervisor.cluster_files import credentials_of

            alarm = "credentials of [cluster]"
            try:
                config["cluster"]["secret"] = credentials_of(cluster)
                self._alarms.settle(alarm, 0.0)
            except IsolatorError as error:  # the host does without the cluster until it is there
                self._alarms.raise_(alarm, str(error))
        return config

    async def give_up(self) -> None:
        """Let the host give its plugins to other hosts of the cluster; returns in bounded time, whatever becomes of it.

        Nothing of them may run any more.
        """
        if self._config.cluster is not None and self.process.running and self.process.channel is not None:
            with contextlib.suppress(IsolatorError):
                await self.process.channel.ask(messages.GiveUp(), timeout=GIVE_UP_SECONDS)

    def serve_callers(self) -> None:
        """Have a host that took another's place serve callers, now that it knows all that the other one knew."""
        self._tell(messages.ServeCallers())

    def plugin_changed(self, entry: messages.PluginEntry) -> None:
        """Tell the host of a plugin's new state."""
        self._tell(messages.PluginChanged(plugin=entry))

    def plugin_turned(self, turned: messages.PluginTurned) -> None:
        """Tell the host of a plugin's new state alone."""
        self._tell(turned)

    def plugin_removed(self, name: str) -> None:
        """Tell the host that a plugin exists no more."""
        self._tell(messages.PluginChanged(removed=name))

    async def environment(self, name: str) -> messages.Environment:
        """Return a plugin's config, once the host is up; raises IsolatorError."""
        answer = await self._ask(messages.GetEnvironment(name=name), _ENVIRONMENT_SECONDS)
        with FdSet(answer.fds):
            if not answer.body.apart:
                return answer.body
            try:
                files = json.loads(read_sealed(answer.fds[0], _MAX_FILES))
            except (IndexError, OSError, ValueError, RecursionError) as error:
                raise IsolatorError(f"config of {name}", f"the host sent no files: {error}", "see its log") from None
        return messages.Environment.from_json(
            {**answer.body.to_json(), "files": files, "apart": False}, messages.GetEnvironment.op
        )

    def listen(self, name: str, uid: int) -> socket.socket:
        """Listen for a plugin's calls of the host API, before its program begins, whose first act one may be."""
        return listen(host_api_folder(self._paths, name) / "host.sock", mode=0o600, owner=uid, backlog=16)

    def run_started(self, name: str, run: str, pid: int, pipes: Sequence[int], listener: int) -> None:
        """Give the host the log pipes of a run and a fresh listener of ``listen``; they stay the caller's."""
        self._tell(messages.RunStarted(name=name, run=run, pid=pid), fds=[*pipes, listener])

    async def drain(self, name: str, run: str, reason: str) -> None:
        """Let the host drain a run before a stop: it sends nothing new, waits for replies, sends ``shutdown``.

        Returns within ``DRAIN_SECONDS``, whatever becomes of the host; an exchange of its process does not count.
        """
        if self.process.running:
            with contextlib.suppress(IsolatorError):
                await self._ask(messages.DrainRun(name=name, run=run, reason=reason), DRAIN_SECONDS)

    def run_ended(
        self, name: str, run: str, end: CageExit, *, origin: messages.Origin, state: messages.PluginState,
        expected: bool, retry_in: float | None,
    ) -> None:  # fmt: skip
        """Tell the host how a run ended."""
        ended = messages.RunEnded(
            name=name, run=run, exit_code=end.exit_code, signal=end.signal, cause=end.cause, origin=origin,
            expected=expected, uptime=end.uptime, state=state, retry_in=retry_in,
        )  # fmt: skip
        self._tell(ended)

    def invocation_begun(self, begun: messages.InvocationBegun, fds: Sequence[int]) -> None:
        """Tell the host of an invocation for which the one before it has asked; the descriptors stay the caller's."""
        self._tell(begun, fds)

    def invocation_ended(self, ended: messages.InvocationEnded) -> None:
        """Tell the host how an invocation ended."""
        self._tell(ended)

    async def stderr_tail(self, name: str, run: str) -> tuple[str, ...]:
        """Return the last lines of an ended run's stderr, redacted; none when the host is away, but by an exchange."""
        if not self.process.running:
            return ()
        try:
            return (await self._ask(messages.GetStderrTail(name=name, run=run), _STDERR_TAIL_SECONDS)).body.stderr
        except IsolatorError:
            return ()

    async def _ask(self, request: Request[R], seconds: float) -> WithFds[R]:
        """Ask the process that serves, which has that long to answer; if it leaves, the one that takes its place.

        One that is about to leave waits for what callers have asked for, and that may wait for this answer: so it is
        asked for as long as it answers. Raises as ``Channel.ask``.
        """
        while True:
            channel = self.process.channel if self.process.running else await self.process.wait_up()
            assert channel is not None
            try:
                return await channel.ask_fds(request, timeout=seconds)
            except UnavailableError:
                if await self.process.present() is channel:
                    raise

    async def _raise_alarm(self, request: messages.RaiseAlarm) -> None:
        self._alarms.raise_("host's own", request.line)
        self._alarms.settle("host's own")

    def _tell(self, request: Request[None], fds: Sequence[int] = ()) -> None:
        self.process.tell(request, fds=fds)
