"""The supervisor: root, small, the one process that decides; it parses only manifests and policies.

Starts in this order and stops in the reverse: the lock on the root (a second daemon is refused), what an earlier one
left is cleared, the launcher, the users, audit, broker, host, then the registered plugins are known (they start when
an event wants them). Anything that dies is started again; running sidecars stay, except when the launcher dies: it is
what ends cages if this process is killed, so the runs it cloned are ended and come back under a new one.

What it says to the services and they to it is in docs/internals.md.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import os
import platform
import shutil
import socket
import sys
import time
from collections.abc import Callable
from typing import Any

import isolator
from isolator import recovery
from isolator.audit.client import AuditClient
from isolator.denials import Denials
from isolator.egress.hardening import filter_file
from isolator.errors import IsolatorError, NotFoundError, UnavailableError
from isolator.ipc import Channel, Handler, Message, pair
from isolator.journal import Entry, Journal
from isolator.launch.client import Launcher
from isolator.layers import network as network_layer
from isolator.layers.cgroup import open_subtree
from isolator.layers.user import add_service_user
from isolator.ledger import ledger, missing, optional_controllers
from isolator.lifecycle import Plugin
from isolator.paths import Paths
from isolator.plugin_cage import Environment, host_api_folder
from isolator.policy.hostconfig import HostConfig
from isolator.policy.model import NetworkPolicy
from isolator.registrar import Registrar
from isolator.sandbox import End, Tools
from isolator.services import Service, ServiceSpec
from isolator.state import State

HOST_MODULE = "host.serve"
"""Named, never imported: ``isolator`` does not know what the host is made of."""
MAX_CONNECTORS = 16
"""Sockets of a cage's network that the broker gets at a time."""


class Supervisor:
    """One daemon. ``start`` returns when it accepts commands; ``stop`` when nothing of it is left."""

    tools: Tools
    audit: AuditClient
    denials: Denials
    registrar: Registrar

    def __init__(self, paths: Paths, config: HostConfig, *, log: Callable[[str], None]) -> None:
        self.paths, self.config = paths, config
        self._log = log
        self._plugins: dict[str, Plugin] = {}
        self._services: dict[str, Service] = {}
        self._attached: dict[str, tuple[str, network_layer.CageNetwork, NetworkPolicy]] = {}
        self._stack = contextlib.AsyncExitStack()
        self._audit_ends: dict[str, socket.socket] = {}
        self._snapshots: asyncio.Task[None] | None = None

    # --- start and stop --------------------------------------------------------------------------------------

    async def start(self) -> None:
        """Bring everything up; raises with one clear line when this host or this root cannot carry a daemon."""
        if os.geteuid() != 0:
            raise IsolatorError("isolator serve", "it builds cages and has to run as root", "run it with sudo")
        lacking = missing(frozenset(self.config.may_degrade))
        if lacking:
            first = lacking[0]
            raise IsolatorError(f"this host cannot enforce {first.name}", first.reason, first.remedy)
        _check_reachable(self.paths)
        try:
            await self._start()
        except BaseException:
            await self.stop()
            raise

    async def _start(self) -> None:
        paths, stack = self.paths, self._stack
        for folder in (
            paths.etc,
            paths.policies,
            paths.lib,
            paths.plugins,
            paths.state,
            paths.cache,
            paths.run,
            paths.log,
        ):
            folder.mkdir(parents=True, exist_ok=True)
            folder.chmod(0o755)
        paths.state.chmod(0o700)
        journal = Journal(paths.journal)
        stack.callback(self._remove_run_folder)
        stack.callback(journal.close)
        cleared = recovery.clear(paths, journal)
        for left in cleared:
            self._log(f"cleared what an earlier daemon left: {left.kind} {left.name} {left.detail}".rstrip())
        optional = optional_controllers(self.config.may_degrade)
        subtree = open_subtree(paths.named("isolator"), optional=optional)
        journal.make(Entry("subtree", "subtree", tuple(map(str, subtree.folders()))))
        stack.callback(journal.gone, "subtree")
        stack.callback(subtree.remove)
        self.tools = Tools(Launcher(), journal, subtree)
        stack.callback(self._close_launcher)
        stack.callback(asyncio.create_task(self._keep_launcher(), name="launcher").cancel)
        self.denials = Denials()
        stack.callback(self.denials.close)
        self.audit = AuditClient(None)
        stack.callback(self.audit.close)
        self.registrar = Registrar(paths, self.config)
        self.registrar.forget_staged()
        self._load_plugins()
        await self._start_services()
        self.audit.record(
            "host.started",
            version=isolator.__version__,
            kernel=platform.release(),
            python=platform.python_version(),
            ledger=[control.to_json() for control in ledger()],
            config=self.config.source,
            cleared=[f"{left.kind} {left.name}" for left in cleared],
        )
        for left in cleared:
            if left.kind == "cage":
                plugin, _, run = left.name.rpartition(".")
                self.audit.record("plugin.stopped", plugin=plugin, run=run, cause="found dead: the daemon was killed")
        self._snapshots = asyncio.create_task(self._take_snapshots(), name="snapshots")

    async def stop(self) -> None:
        """Stop every plugin, then the services in reverse, and remove what was made."""
        if self._snapshots is not None:
            self._snapshots.cancel()
        started = time.monotonic()
        async with asyncio.TaskGroup() as group:
            for plugin in self._plugins.values():
                group.create_task(plugin.stop("the daemon stops"))
        for name in ("host", "broker"):
            if name in self._services:
                await self._services[name].stop()
        if "audit" in self._services:
            self.audit.record("host.stopped", seconds=round(time.monotonic() - started, 3))
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(5):
                    await self.audit.settled()
            await self._services["audit"].stop()
        await self._stack.aclose()

    def _remove_run_folder(self) -> None:
        self.paths.control_socket.unlink(missing_ok=True)
        shutil.rmtree(self.paths.run / "hostapi", ignore_errors=True)
        with contextlib.suppress(OSError):
            self.paths.run.rmdir()

    def _close_launcher(self) -> None:
        self.tools.launcher.close()  # whichever it is by then

    async def _keep_launcher(self) -> None:
        while True:
            await self.tools.launcher.closed.wait()
            self._log("the launcher has died; starting it and its cages again")
            self.tools.launcher.close()
            for plugin in self._plugins.values():
                if plugin.run is not None:
                    plugin.run.end("the launcher died")
            self.tools.launcher = Launcher()

    def _load_plugins(self) -> None:
        for name in self.registrar.names():
            self._plugins[name] = self._plugin(name)

    def _plugin(self, name: str) -> Plugin:
        loaded = self.registrar.load(name)
        effective = loaded.proposal.effective if loaded.proposal else None
        plugin = Plugin(
            self, loaded.registration, effective, loaded.argv, loaded.registration.version, error=loaded.error
        )
        plugin.manifest = loaded.manifest
        if plugin.error:
            self._log(f"plugin {name} is rejected: {plugin.error}")
        return plugin

    async def _start_services(self) -> None:
        paths, named = self.paths, self.paths.named
        users = {
            name: add_service_user(named(f"isolator-{user}"), comment=f"Isolator {name}")
            for name, user in (("audit", "audit"), ("broker", "net"), ("host", "host"))
        }
        for folder, name, mode in (
            (paths.audit_lib, "audit", 0o700),
            (paths.audit_log, "audit", 0o755),
            (paths.host_lib, "host", 0o700),
            (paths.plugin_log, "host", 0o755),
        ):
            folder.mkdir(parents=True, exist_ok=True)
            folder.chmod(mode)
            os.chown(folder, *users[name])
        handlers: dict[str, Handler] = {
            "run.ensure": self._on_ensure,
            "run.connect": self._on_connect,
            "run.stop": self._on_stop,
            "run.restart": self._on_restart,
            "plugin.stage": self._on_stage,
            "plugin.commit": self._on_commit,
            "plugin.discard": self._on_discard,
            "plugin.remove": self._on_remove,
            "plugin.enable": self._on_enable,
            "plugin.disable": self._on_disable,
            "plugin.rollback": self._on_rollback,
            "plugin.approve": self._on_approve,
            "plugin.status": self._on_status,
            "policy.explain": self._on_explain,
            "ledger": self._on_ledger,
        }
        for name, module, ops, up in (
            ("audit", "isolator.audit.service", {}, self._audit_up),
            ("broker", "isolator.egress.service", {"cage.sockets": self._on_cage_sockets}, self._broker_up),
            ("host", HOST_MODULE, handlers, self._host_up),
        ):
            spec = ServiceSpec(name, module, *users[name], ops)
            service = Service(
                spec, self.tools.subtree, self.tools.journal, on_up=up, log=self._log,
                inherit=(dict if name == "audit" else functools.partial(self._inherit, name)),
            )  # fmt: skip
            self._services[name] = service
            await service.start()

    # --- services --------------------------------------------------------------------------------------------

    def _hello(self) -> dict[str, Any]:
        return {"root": str(self.paths.root), "config": self.config.model_dump(mode="json")}

    def _inherit(self, source: str) -> dict[str, int]:
        inherited = {"audit": self._audit_end(source)}
        return inherited | {"filter": filter_file(self.paths.cache)} if source == "broker" else inherited

    def _audit_end(self, source: str) -> int:
        """The sending end of a new source socket; the other end goes to the audit process."""
        mine, theirs = pair()
        old = self._audit_ends.pop(source, None)
        if old is not None:
            old.close()
        self._audit_ends[source] = mine
        audit = self._services["audit"]
        if audit.channel is not None:
            audit.channel.notify("source", fds=[theirs.fileno()], name=source)
        theirs.close()
        return os.dup(mine.fileno())

    async def _audit_up(self, service: Service) -> None:
        assert service.channel is not None
        await service.channel.call("hello", timeout=20, **self._hello())
        self.audit.replace(socket.socket(fileno=self._audit_end("supervisor")))
        for name in ("broker", "host"):
            other = self._services.get(name)
            if other is not None and other.up.is_set() and other.channel is not None:
                fd = self._audit_end(name)
                other.channel.notify("audit.source", fds=[fd])
                os.close(fd)
        if service.starts > 1:
            self.audit.record("audit.gap", count=0, why="the audit process ended and was started again")

    async def _broker_up(self, service: Service) -> None:
        assert service.channel is not None
        await service.channel.call("hello", timeout=20, **self._hello())
        for run, (plugin, network, policy) in list(self._attached.items()):
            try:
                sockets = await asyncio.to_thread(network_layer.reopen, network, policy)
                await self._hand_over(service.channel, run, sockets)
            except IsolatorError as error:
                if service.channel.closed.is_set():
                    raise
                # A port was taken while the broker was away, or the cage is just ending: the others go on.
                self._log(f"plugin {plugin}: {error}")
                owner = self._plugins.get(plugin)
                if owner is not None and owner.run is not None and owner.run.id == run:
                    owner.run.end(str(error))

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

    async def _host_up(self, service: Service) -> None:
        assert service.channel is not None
        listener = self._control_listener()
        try:
            await service.channel.call(
                "hello", fds=[listener.fileno()], plugins=[self.entry(p) for p in self._plugins.values()], timeout=30,
                **self._hello(),
            )  # fmt: skip
        finally:
            listener.close()
        for plugin in self._plugins.values():
            if plugin.run is not None and plugin.state == "running":
                self._announce(service, plugin, plugin.run.pipes)

    def _control_listener(self) -> socket.socket:
        """A fresh listener on the control socket; all may connect, the caller's uid decides what it may do."""
        path = self.paths.control_socket
        path.unlink(missing_ok=True)
        return _listen(path, mode=0o666, owner=0, backlog=128)

    # --- what a plugin's life needs (lifecycle.Surroundings) -------------------------------------------------

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

    def _announce(self, host: Service, plugin: Plugin, pipes: list[int]) -> None:
        if host.channel is None or plugin.run is None:
            return
        path = host_api_folder(self.paths, plugin.name) / "host.sock"
        path.unlink(missing_ok=True)
        listener = _listen(path, mode=0o600, owner=plugin.registration.uid, backlog=16)
        try:
            host.channel.notify(
                "run.started", fds=[*pipes, listener.fileno()], name=plugin.name, run=plugin.run.id,
                pid=plugin.run.sandbox.pid,
            )  # fmt: skip
        finally:
            listener.close()

    def run_ended(self, plugin: Plugin, run: str, end: End, *, expected: bool, retry_in: float | None) -> None:
        """Tell the host how a run ended."""
        host = self._services["host"]
        if host.channel is not None:
            host.channel.notify(
                "run.ended", name=plugin.name, run=run, exit_code=end.exit_code, signal=end.signal, cause=end.cause,
                expected=expected, uptime=end.uptime, state=plugin.state, retry_in=retry_in,
            )  # fmt: skip

    def changed(self, plugin: Plugin) -> None:
        """A plugin's state changed."""
        host = self._services.get("host")
        if host is not None and host.channel is not None and host.up.is_set():
            host.channel.notify("plugin.changed", plugin=self.entry(plugin))

    def entry(self, plugin: Plugin) -> dict[str, Any]:
        """A plugin as the host and the command line see it."""
        run, registration, effective = plugin.run, plugin.registration, plugin.effective
        return {
            "name": plugin.name,
            "version": plugin.version,
            "digest": registration.digest,
            "state": plugin.state,
            "error": plugin.error,
            "run": run.id if run else None,
            "pid": run.sandbox.pid if run and plugin.state == "running" else None,
            "uid": registration.uid,
            "started_at": run.started_at if run else None,
            "restarts": plugin.restarts,
            "effective": effective.model_dump(mode="json") if effective else None,
            "effective_digest": effective.digest() if effective else None,
            "manifest": plugin.manifest,
            "binary": registration.binary_path or None,
            "previous": list(registration.previous),
        }

    # --- what the host asks ----------------------------------------------------------------------------------

    def _find(self, message: Message) -> Plugin:
        name = str(message.fields.get("name"))
        if name not in self._plugins:
            raise NotFoundError(f"plugin {name}", "no such plugin", "see 'isolator plugin list'")
        return self._plugins[name]

    async def _on_ensure(self, message: Message) -> dict[str, Any]:
        run = await self._find(message).ensure(str(message.fields.get("reason", "event")))
        return {"run": run.id, "pid": run.sandbox.pid}

    async def _on_connect(self, message: Message) -> Message:
        plugin = self._find(message)
        connection = await plugin.connect(str(message.fields["run"]), float(message.fields.get("deadline", 10)))
        return Message({}, [connection.detach()])

    async def _on_stop(self, message: Message) -> dict[str, Any]:
        await self._find(message).stop(str(message.fields.get("reason", "asked")))
        return {}

    async def _on_restart(self, message: Message) -> dict[str, Any]:
        plugin = self._find(message)
        await plugin.stop("restart")
        await plugin.ensure("operator")
        return {}

    async def _on_stage(self, message: Message) -> Message:
        f = message.fields
        staged, proposal = await asyncio.to_thread(
            self.registrar.stage,
            path=f.get("path"), name=f.get("name"), binary=f.get("binary"), hooks=list(f.get("hooks") or []),
            files=f.get("files"),
        )  # fmt: skip
        manifest = os.memfd_create("plugin.json", os.MFD_CLOEXEC)
        os.write(manifest, staged.manifest)
        os.lseek(manifest, 0, os.SEEK_SET)
        return Message(
            {
                "token": staged.token,
                "name": staged.name,
                "digest": staged.digest,
                "synthesised": staged.synthesised,
                "proposal": proposal,
                "registered": staged.name in self._plugins,
            },
            [manifest],
        )

    async def _on_commit(self, message: Message) -> dict[str, Any]:
        token, by = str(message.fields["token"]), message.fields.get("by")
        name = self.registrar.staged_name(token)
        old = self._plugins.get(name)
        was_running = old is not None and old.run is not None
        if old is not None:
            await old.stop("update")
        registration = await asyncio.to_thread(self.registrar.commit, token)
        plugin = self._plugins[name] = self._plugin(name)
        self.audit.record(
            "plugin.updated" if old else "plugin.added",
            plugin=name,
            old=old.registration.digest if old else None,
            new=registration.digest,
            version=registration.version,
            policy_sha256=plugin.effective.digest() if plugin.effective else None,
            who=by,
        )
        if was_running:
            await plugin.ensure("operator")
        return {"plugin": self.entry(plugin)}

    async def _on_discard(self, message: Message) -> dict[str, Any]:
        self.registrar.discard(str(message.fields["token"]))
        return {}

    async def _on_remove(self, message: Message) -> dict[str, Any]:
        plugin = self._find(message)
        await plugin.stop("removed")
        await asyncio.to_thread(State(self.paths.state, plugin.name, self.tools.journal).remove)
        await asyncio.to_thread(self.registrar.remove, plugin.name)
        folder = host_api_folder(self.paths, plugin.name)
        (folder / "host.sock").unlink(missing_ok=True)
        folder.rmdir()
        del self._plugins[plugin.name]
        self.audit.record(
            "plugin.removed", plugin=plugin.name, old=plugin.registration.digest, who=message.fields.get("by")
        )
        return {}

    async def _on_enable(self, message: Message) -> dict[str, Any]:
        return await self._set_enabled(message, enabled=True)

    async def _on_disable(self, message: Message) -> dict[str, Any]:
        return await self._set_enabled(message, enabled=False)

    async def _set_enabled(self, message: Message, *, enabled: bool) -> dict[str, Any]:
        plugin = self._find(message)
        await plugin.stop("disabled")
        self.registrar.set_enabled(plugin.name, enabled=enabled)
        return self._reload(plugin.name)

    async def _on_rollback(self, message: Message) -> dict[str, Any]:
        plugin = self._find(message)
        await plugin.stop("rollback")
        registration = self.registrar.rollback(plugin.name)
        self.audit.record(
            "plugin.rolled_back", plugin=plugin.name, old=plugin.registration.digest, new=registration.digest,
            who=message.fields.get("by"),
        )  # fmt: skip
        return self._reload(plugin.name)

    async def _on_approve(self, message: Message) -> dict[str, Any]:
        plugin = self._find(message)
        registration = await asyncio.to_thread(self.registrar.approve_binary, plugin.name)
        self.audit.record(
            "plugin.approved", plugin=plugin.name, new=registration.binary_sha256, who=message.fields.get("by")
        )
        await plugin.stop("approved")
        return self._reload(plugin.name)

    def _reload(self, name: str) -> dict[str, Any]:
        plugin = self._plugins[name] = self._plugin(name)
        self.changed(plugin)
        return {"plugin": self.entry(plugin)}

    async def _on_status(self, message: Message) -> dict[str, Any]:
        return {"plugins": [self.entry(plugin) for plugin in self._plugins.values()]}

    async def _on_explain(self, message: Message) -> dict[str, Any]:
        return {"proposal": self.registrar.explain(self._find(message).name)}

    async def _on_ledger(self, message: Message) -> dict[str, Any]:
        return {"ledger": [control.to_json() for control in ledger()]}

    async def _take_snapshots(self) -> None:
        interval = self.config.audit.snapshot_interval
        while True:
            await asyncio.sleep(interval)
            for plugin in self._plugins.values():
                if plugin.run is not None and plugin.state == "running":
                    self.record_resources(plugin)

    def record_resources(self, plugin: Plugin) -> None:
        """One ``resources`` record of a plugin's run."""
        from isolator.audit.sources.snapshots import snapshot

        if plugin.run is not None and plugin.run.sandbox.started:
            leaf = plugin.run.sandbox.leaf
            figures = snapshot(leaf.folders(), leaf.processes())
            self.audit.record("resources", plugin=plugin.name, run=plugin.run.id, **figures)


def _check_reachable(paths: Paths) -> None:
    """The unprivileged processes must be able to walk to their folders."""
    for folder in (*reversed(paths.root.parents), paths.root):
        if folder.exists() and not folder.stat().st_mode & 0o001:
            raise IsolatorError(
                f"root {paths.root}", f"the daemon's unprivileged processes cannot enter {folder}",
                f"chmod o+x {folder}, or choose a --root elsewhere",
            )  # fmt: skip


def _listen(path: Any, *, mode: int, owner: int, backlog: int) -> socket.socket:
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


def log_line(text: str) -> None:
    """One line of the daemon's own log, on stderr."""
    print(f"isolator: {text}", file=sys.stderr, flush=True)


__all__ = ["Supervisor", "UnavailableError", "log_line"]
