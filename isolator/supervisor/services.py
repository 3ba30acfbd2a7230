"""The daemon's unprivileged processes, introduced to each other: audit, broker, host.

They start in this order and stop in the reverse. Each gets a channel to the supervisor and (but for audit itself) a
source socket of its own to the audit process; whoever dies is started again and introduced anew: to audit come new
source sockets, to the broker the listeners of every cage that runs, to the host the plugins, their log pipes and the
listeners of their host API. What is said is in docs/internals.md.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import json
import os
import socket
import stat
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, Protocol

from isolator.audit.client import AuditClient
from isolator.audit.schema import AuditGap
from isolator.broker.hardening import filter_file
from isolator.cage.processes import CageExit
from isolator.cage.runtime import CageRuntime
from isolator.errors import IsolatorError, NotFoundError
from isolator.ipc.channel import MAX_PACKET, Channel, Handler, Message, pair
from isolator.layers.network import namespace as network_layer
from isolator.layers.user import add_service_user
from isolator.paths import Paths
from isolator.policy.host import HostConfig
from isolator.policy.model import NetworkPolicy
from isolator.supervisor.cage_spec import Environment, host_api_folder
from isolator.supervisor.lifecycle import Plugin
from isolator.supervisor.service import ChildProcess, ServiceSpec

HOST_MODULE = "host.service"
"""Named, never imported: ``isolator`` does not know what the host is made of."""
LEAVE_SECONDS = 3.0
"""How long a run that is to stop waits for the host to take leave of it; the host itself allows less."""
MAX_CONNECTORS = 16
"""Sockets of a cage's network that the broker gets at a time."""


_LAST_WORDS_SECONDS = 1.0
"""The end of a run is recorded without its last words rather than later."""


class Known(Protocol):
    """What the services are told about: the plugins and what was found."""

    @property
    def plugins(self) -> dict[str, Plugin]: ...

    def entries(self) -> list[dict[str, Any]]: ...

    def handlers(self) -> dict[str, Handler]: ...


class Services:
    """The services of one daemon."""

    def __init__(
        self, paths: Paths, config: HostConfig, runtime: CageRuntime, audit: AuditClient, known: Known,
        log: Callable[[str], None],
    ) -> None:  # fmt: skip
        self._paths, self._config, self._runtime, self._audit = paths, config, runtime, audit
        self._known, self._log = known, log
        self.ended = True
        """Whether the trail tells, as far as could be seen, that the daemon before had stopped."""
        self._services: dict[str, ChildProcess] = {}
        self._audit_ends: dict[str, socket.socket] = {}
        self._audit_starts: dict[str, int] = {}
        """By source: which start of the audit process its socket was made for."""
        self._attached: dict[str, tuple[str, network_layer.CageNetwork, NetworkPolicy]] = {}
        self.unended: dict[str, str] = {}
        """By run that an earlier daemon began and whose end is on no record, its plugin."""

    async def start(self) -> None:
        """Make their users and folders, and start them; returns when the host accepts commands."""
        paths = self._paths
        users = {
            name: add_service_user(paths.named(f"isolator-{user}"), comment=f"Isolator {name}")
            for name, user in (("audit", "audit"), ("broker", "net"), ("host", "host"))
        }
        for folder, name, group, mode in (
            (paths.audit_lib, "audit", "audit", 0o700),
            # The trail's files get the folder's group: the host can show them to those who may see them.
            (paths.audit_log, "audit", "host", 0o2755),
            (paths.host_lib, "host", "host", 0o700),
            (paths.plugin_log, "host", "host", 0o755),
        ):
            folder.mkdir(parents=True, exist_ok=True)
            os.chown(folder, users[name][0], users[group][1])
            folder.chmod(mode)
        _let_read(paths.audit_log, users["audit"][0], users["host"][1])
        for name, module, ops, up in (
            ("audit", "isolator.audit.service", {}, self._audit_up),
            ("broker", "isolator.broker.service", {"cage.sockets": self._on_cage_sockets}, self._broker_up),
            ("host", HOST_MODULE, self._known.handlers(), self._host_up),
        ):
            spec = ServiceSpec(name, module, *users[name], ops)
            service = ChildProcess(
                spec, self._runtime.subtree, self._runtime.journal, on_up=up, log=self._log,
                inherit=(dict if name == "audit" else functools.partial(self._inherit, name)),
            )  # fmt: skip
            self._services[name] = service
            await service.start()

    async def stop(self, names: Iterable[str]) -> None:
        """Stop these, in this order; those that were never started are passed over."""
        for name in names:
            if name in self._services:
                await self._services[name].stop()

    def started(self, name: str) -> bool:
        """Whether a service was ever started."""
        return name in self._services

    def tell_host(self, op: str, /, *, fds: Iterable[int] = (), **fields: Any) -> None:
        """Tell the host; nothing when it is away, as it is told everything when it is back."""
        host = self._services.get("host")
        if host is not None and host.channel is not None:
            host.channel.notify(op, fds=list(fds), **fields)

    # --- introductions -----------------------------------------------------------------------------------------

    def _hello(self) -> dict[str, Any]:
        return {"root": str(self._paths.root), "config": self._config.model_dump(mode="json")}

    def _inherit(self, source: str) -> dict[str, int]:
        inherited = {"audit": self._audit_end(source)}
        return inherited | {"filter": filter_file(self._paths.cache)} if source == "broker" else inherited

    def _audit_end(self, source: str) -> int:
        """The sending end of a new source socket; the other end goes to the audit process."""
        mine, theirs = pair()
        old = self._audit_ends.pop(source, None)
        if old is not None:
            old.close()
        self._audit_ends[source] = mine
        audit = self._services["audit"]
        self._audit_starts[source] = audit.starts
        if audit.channel is not None:
            audit.channel.notify("source", fds=[theirs.fileno()], name=source)
        theirs.close()
        return os.dup(mine.fileno())

    async def _audit_up(self, service: ChildProcess) -> None:
        assert service.channel is not None
        answer = await service.channel.call("hello", timeout=20, **self._hello())
        if service.starts == 1:
            self.unended = {str(run): str(plugin) for run, plugin in answer.fields.get("runs", {}).items()}
        self._audit.reconnect(socket.socket(fileno=self._audit_end("supervisor")))
        listener = self._metrics_listener()
        service.channel.notify("metrics", fds=[listener.fileno()])
        listener.close()
        for name in ("broker", "host"):
            other = self._services.get(name)
            if other is not None and other.up.is_set():
                self._new_audit_end(other)
        if service.starts > 1:
            self._audit.record(AuditGap(count=0, why="the audit process ended and was started again"))
        else:
            self.ended = answer.fields.get("ended") is not False

    def _note_end(self, service: ChildProcess) -> None:
        """A sender that comes back: how many records the one before had made and not sent, nobody knows."""
        if service.starts > 1:
            why = f"the {service.spec.name} process ended ({service.ended}); what it had not handed over is lost"
            self._audit.record(AuditGap(count=None, why=why, source=service.spec.name))

    def _new_audit_end(self, other: ChildProcess) -> None:
        assert other.channel is not None
        fd = self._audit_end(other.spec.name)
        other.channel.notify("audit.source", fds=[fd])
        os.close(fd)

    def _catch_up_with_audit(self, service: ChildProcess) -> None:
        """A service that was just coming up when the audit process was started again was not told of it then.

        Nothing may be awaited after this: ``up`` is set next, and from then on ``_audit_up`` tells it.
        """
        audit = self._services["audit"]
        if audit.up.is_set() and audit.starts != self._audit_starts[service.spec.name]:
            self._new_audit_end(service)

    async def _broker_up(self, service: ChildProcess) -> None:
        assert service.channel is not None
        await service.channel.call("hello", timeout=20, **self._hello())
        self._note_end(service)
        for run, (plugin, network, policy) in list(self._attached.items()):
            try:
                sockets = await asyncio.to_thread(network_layer.reopen, network, policy)
                await self._hand_over(service.channel, run, sockets)
            except IsolatorError as error:
                if service.channel.closed.is_set():
                    raise
                # A port was taken while the broker was away, or the cage is just ending: the others go on.
                self._log(f"plugin {plugin}: {error}")
                owner = self._known.plugins.get(plugin)
                if owner is not None and owner.run is not None and owner.run.id == run:
                    owner.run.end(str(error))
        self._catch_up_with_audit(service)

    async def _hand_over(self, broker: Channel, run: str, sockets: list[int]) -> None:
        """Give the broker a cage's sockets and the host's listeners for it; ours are closed, whatever happens.

        A kept copy would let connects hang, instead of being refused, when the broker dies.
        """
        plugin, _, policy = self._attached[run]
        fds = list(sockets)
        try:
            fds += network_layer.host_listeners(policy)
            await broker.call(
                "cage.attach", fds=fds, run=run, plugin=plugin, policy=policy.model_dump(mode="json"), timeout=10
            )
        finally:
            for fd in fds:
                os.close(fd)

    async def _host_up(self, service: ChildProcess) -> None:
        assert service.channel is not None
        listener = self._control_listener()
        fds = [listener.detach()]
        plugins: list[dict[str, Any]] | None = self._known.entries()
        encoded = json.dumps(plugins).encode()
        if len(encoded) > MAX_PACKET // 2:
            plugins = None
            fds.append(os.memfd_create("plugins", os.MFD_CLOEXEC))
            with os.fdopen(os.dup(fds[-1]), "wb") as file:
                file.write(encoded)
        try:
            fresh = service.starts == 1
            await service.channel.call("hello", fds=fds, plugins=plugins, fresh=fresh, timeout=30, **self._hello())
        finally:
            for fd in fds:
                os.close(fd)
        self._note_end(service)
        for plugin in self._known.plugins.values():
            if plugin.run is not None and plugin.state == "running":
                self._announce(service, plugin, plugin.run.pipes)
        self._catch_up_with_audit(service)

    def _control_listener(self) -> socket.socket:
        """A fresh listener on the control socket; all may connect, the caller's uid decides what it may do."""
        path = self._paths.control_socket
        path.unlink(missing_ok=True)
        return _listen(path, mode=0o666, owner=0, backlog=1024)  # for as long as the host has not set its own

    def _metrics_listener(self) -> socket.socket:
        """Where Prometheus figures are read without a TCP port; root's alone."""
        self._paths.metrics_socket.unlink(missing_ok=True)
        return _listen(self._paths.metrics_socket, mode=0o600, owner=0, backlog=16)

    # --- what a plugin's life needs ----------------------------------------------------------------------------

    async def environment(self, name: str) -> Environment:
        """Ask the host for a plugin's config."""
        host = self._services["host"]
        async with asyncio.timeout(30):
            await host.up.wait()
        assert host.channel is not None
        answer = (await host.channel.call("run.environment", name=name, timeout=10)).fields
        return Environment(dict(answer.get("env", {})), dict(answer.get("files", {})))

    async def attach_network(
        self, run: str, plugin: str, network: network_layer.CageNetwork, policy: NetworkPolicy
    ) -> None:
        """Hand the cage's listeners to the broker and give up our copies: a kept one would make connects hang."""
        broker = self._services["broker"]
        async with asyncio.timeout(30):
            await broker.up.wait()
        assert broker.channel is not None
        self._attached[run] = (plugin, network, policy)
        sockets, network.sockets = network.sockets, []
        try:
            await self._hand_over(broker.channel, run, sockets)
        except BaseException:
            self._attached.pop(run, None)
            broker.channel.notify("cage.detach", run=run)  # it may have taken it over and only answered too late
            raise

    async def detach_network(self, run: str) -> None:
        """The cage is gone: the broker closes its listeners and flows."""
        if self._attached.pop(run, None) is not None and self._services["broker"].channel is not None:
            await self._services["broker"].channel.call("cage.detach", run=run, timeout=10)

    async def _on_cage_sockets(self, message: Message) -> Message:
        """Sockets for connections that come in from outside; only for cages whose policy has any."""
        attached = self._attached.get(str(message.fields.get("run")))
        if attached is None or not attached[2].listen:
            raise NotFoundError("cage.sockets", "no such run, or nothing may be forwarded into it")
        count = min(max(int(message.fields.get("count", 1)), 1), MAX_CONNECTORS)
        version = 6 if message.fields.get("version") == 6 else 4
        fds = await asyncio.to_thread(network_layer.connectors, attached[1], count, version=version)
        return Message({}, fds)

    def run_started(self, plugin: Plugin, pipes: list[int]) -> None:
        """Tell the host of a run; it gets the log pipes and the listener of the plugin's host API."""
        self._announce(self._services["host"], plugin, pipes)

    async def run_stopping(self, plugin: Plugin, run: str, reason: str) -> None:
        """Let the host take leave of a run: it sends it nothing more, and ``shutdown`` to one that speaks it."""
        host = self._services["host"]
        if host.channel is not None:
            with contextlib.suppress(IsolatorError):  # the run is stopped whatever becomes of the host
                await host.channel.call("run.stopping", name=plugin.name, run=run, reason=reason, timeout=LEAVE_SECONDS)

    def run_ended(self, plugin: Plugin, run: str, end: CageExit, *, expected: bool, retry_in: float | None) -> None:
        """Tell the host how a run ended."""
        self.tell_host(
            "run.ended", name=plugin.name, run=run, exit_code=end.exit_code, signal=end.signal, cause=end.cause,
            expected=expected, uptime=end.uptime, state=plugin.state, retry_in=retry_in,
        )  # fmt: skip

    async def last_words(self, name: str, run: str) -> list[str]:
        """What an ended run wrote to stderr last, redacted, as the host read it; nothing when the host is away."""
        host = self._services["host"]
        if host.channel is None or not host.up.is_set():
            return []
        try:
            answer = await host.channel.call("run.last_words", name=name, run=run, timeout=_LAST_WORDS_SECONDS)
        except IsolatorError:
            return []
        return [str(line) for line in answer.fields.get("stderr", ())]

    def _announce(self, host: ChildProcess, plugin: Plugin, pipes: list[int]) -> None:
        if host.channel is None or plugin.run is None:
            return
        path = host_api_folder(self._paths, plugin.name) / "host.sock"
        path.unlink(missing_ok=True)
        listener = _listen(path, mode=0o600, owner=plugin.registration.uid, backlog=16)
        try:
            host.channel.notify(
                "run.started", fds=[*pipes, listener.fileno()], name=plugin.name, run=plugin.run.id,
                pid=plugin.run.cage.pid,
            )  # fmt: skip
        finally:
            listener.close()


def _let_read(folder: Path, owner: int, group: int) -> None:
    """Give the files of an earlier version's trail the group that new ones get."""
    for path in folder.glob("audit*.jsonl"):
        with contextlib.suppress(OSError):
            fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
            try:
                status = os.fstat(fd)
                # Root works in a folder of somebody else's: only on what is plainly that user's own.
                if stat.S_ISREG(status.st_mode) and (status.st_uid, status.st_nlink) == (owner, 1):
                    os.fchown(fd, -1, group)
            finally:
                os.close(fd)


def _listen(path: Path, *, mode: int, owner: int, backlog: int) -> socket.socket:
    """A listening Unix socket at ``path``, however long the path is, with its final owner and mode."""
    folder = os.open(path.parent, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        previous = os.umask(0o177)
        try:
            listener.bind(f"/proc/self/fd/{folder}/{path.name}")
        finally:
            os.umask(previous)
        os.chown(path, owner, -1)
        os.chmod(path, mode)
        listener.listen(backlog)
        return listener
    finally:
        os.close(folder)
