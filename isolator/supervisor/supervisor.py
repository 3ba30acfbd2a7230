"""The supervisor: root, small, the one process that decides; it parses only manifests and policies.

Starts in this order and stops in the reverse: the lock on the root (a second daemon is refused), what an earlier one
left is cleared, the launcher, the registered plugins are known (they start when an event wants them), then audit,
broker and host with their users, then files are watched. Anything that dies is started again; running sidecars stay,
except when the launcher dies: it is what ends cages if this process is killed, so the runs it cloned are ended and
come back under a new one.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import platform
import shutil
import sys
import time
from collections.abc import Callable
from typing import Any

import isolator
from isolator.audit.client import AWAY, AuditClient
from isolator.audit.schema import AuditGap, HostStarted, HostStopped, PluginStopped, Resources
from isolator.cage.processes import CageExit
from isolator.cage.runtime import CageRuntime
from isolator.errors import IsolatorError
from isolator.ipc.channel import Handler, Message
from isolator.launcher.client import Launcher
from isolator.layers.cgroup.subtree import open_subtree
from isolator.layers.ledger import EVERY_LAYER, ledger, missing, optional_controllers
from isolator.layers.network import namespace as network_layer
from isolator.layers.seccomp.notifier import SeccompNotifier
from isolator.paths import Paths
from isolator.policy.host import HostConfig, without_trail
from isolator.policy.model import NetworkPolicy
from isolator.recovery import daemon as recovery
from isolator.recovery.journal import Entry, Journal
from isolator.registration.registrar import Registrar
from isolator.supervisor.cage_spec import Environment
from isolator.supervisor.lifecycle import Plugin
from isolator.supervisor.plugins import PluginTable
from isolator.supervisor.policy_watch import PolicyWatch
from isolator.supervisor.services import Services
from isolator.supervisor.socket_watch import SocketWatch
from isolator.supervisor.updates import Updates
from isolator.volume import volume
from isolator.volume.volume import Volume


class Supervisor:
    """One daemon. ``start`` returns when it accepts commands; ``stop`` when nothing of it is left."""

    runtime: CageRuntime
    audit: AuditClient
    denials: SeccompNotifier
    sockets: SocketWatch
    registrations: PluginTable

    def __init__(self, paths: Paths, config: HostConfig, *, log: Callable[[str], None]) -> None:
        self.paths, self.config = paths, config
        self._log = log
        self._services: Services | None = None
        self._stack = contextlib.AsyncExitStack()
        self._snapshots: asyncio.Task[None] | None = None
        self._alarmed = False

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
        journal.record(Entry("subtree", "subtree", tuple(map(str, subtree.folders()))))
        stack.callback(journal.forget, "subtree")
        stack.callback(subtree.remove)
        self.runtime = CageRuntime(Launcher(), journal, subtree, keep_warm=True)
        stack.callback(self._close_launcher)
        stack.callback(asyncio.create_task(self._keep_launcher(), name="launcher").cancel)
        stack.push_async_callback(self.runtime.pool.close)
        self.denials = SeccompNotifier()
        stack.callback(self.denials.close)
        self.sockets = SocketWatch()
        stack.callback(self.sockets.close)
        self.audit = AuditClient(None)
        self.audit.on_blocked = self._trail_blocked
        stack.callback(self.audit.close)
        registrar = Registrar(paths, self.config)
        recovered = registrar.recover(lambda name: Volume(paths.state, name, journal).remove())
        for line in recovered:
            self._log(line)
        self.registrations = PluginTable(self, registrar, self._log)
        self.registrations.load()
        self._services = Services(paths, self.config, self.runtime, self.audit, self, self._log)
        on_trial = await Updates(self.registrations).hold_trials()
        await self._services.start()
        self.runtime.pool.begin(EVERY_LAYER)
        if cleared or not self._services.ended:
            why = "the daemon before did not end by itself; what its processes had not handed over is lost"
            self.audit.record(AuditGap(count=None, why=why))
        Updates(self.registrations).judge_again(on_trial)
        self.audit.record(
            HostStarted(
                version=isolator.__version__,
                kernel=platform.release(),
                python=platform.python_version(),
                ledger=[control.to_json() for control in ledger(volume.check)],
                config=self.config.source,
                config_sha256=self.config.digest(),
                cleared=[*(f"{left.kind} {left.name}" for left in cleared), *recovered],
            )
        )
        self._record_dead(cleared)
        self._snapshots = asyncio.create_task(self._take_snapshots(), name="snapshots")
        stack.callback(PolicyWatch(self.registrations).close)
        await self.registrations.discovery.start()

    def _record_dead(self, cleared: list[recovery.Leftover]) -> None:
        """Each start on record has its end: of the runs that were found here, and of those that a reboot took along."""
        ends = dict.fromkeys(self._running().unended.items(), "found dead: the machine went down")
        for left in cleared:
            if left.kind == "cage":
                plugin, _, run = left.name.rpartition(".")
                ends[run, plugin] = "found dead: the daemon was killed"
        for (run, plugin), cause in ends.items():
            self.audit.record(PluginStopped(cause=cause), plugin=plugin, run=run)

    async def stop(self) -> None:
        """Stop every plugin, then the services in reverse, and remove what was made."""
        if self._snapshots is not None:
            self._snapshots.cancel()
        started = time.monotonic()
        if self._services is not None:
            await self.registrations.close()
            await self._services.stop(("host", "broker"))
            if self._services.started("audit"):
                self.audit.record(HostStopped(seconds=round(time.monotonic() - started, 3)))
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(5):
                        await self.audit.durable()
                await self._services.stop(("audit",))
        await self._stack.aclose()

    def _remove_run_folder(self) -> None:
        self.paths.control_socket.unlink(missing_ok=True)
        self.paths.metrics_socket.unlink(missing_ok=True)
        shutil.rmtree(self.paths.run / "hostapi", ignore_errors=True)
        with contextlib.suppress(OSError):
            self.paths.run.rmdir()

    def _close_launcher(self) -> None:
        self.runtime.launcher.close()  # whichever it is by then

    async def _keep_launcher(self) -> None:
        while True:
            await self.runtime.launcher.closed.wait()
            self._log("the launcher has died; starting it and its cages again")
            self.runtime.launcher.close()
            for plugin in self.plugins.values():
                if plugin.run is not None:
                    plugin.run.end("the launcher died")
            self.runtime.launcher = Launcher()

    # --- what a plugin's life needs (lifecycle.Surroundings, registrations.Daemon) ----------------------------

    @property
    def plugins(self) -> dict[str, Plugin]:
        """The registered plugins by name."""
        return self.registrations.plugins

    def entries(self) -> list[dict[str, Any]]:
        """Every plugin as the host sees it."""
        return self.registrations.entries()

    def handlers(self) -> dict[str, Handler]:
        """Everything that the host may ask."""
        return {
            **self.registrations.handlers(),
            **Updates(self.registrations).handlers(),
            "ledger": self._on_ledger,
        }

    async def may_start(self) -> None:
        """Wait while the trail cannot be written, unless ``host.toml`` has chosen otherwise."""
        if self.config.audit.disk_full == "stop":
            await self.audit.writable()

    async def environment(self, name: str) -> Environment:
        """A plugin's config, from the host."""
        return await self._running().environment(name)

    async def attach_network(
        self, run: str, plugin: str, network: network_layer.CageNetwork, policy: NetworkPolicy
    ) -> None:
        """Hand a cage's listeners to the broker."""
        await self._running().attach_network(run, plugin, network, policy)

    async def detach_network(self, run: str) -> None:
        """The cage is gone: the broker closes its listeners and flows."""
        await self._running().detach_network(run)

    async def last_words(self, name: str, run: str) -> list[str]:
        """What a run wrote to stderr last."""
        return await self._running().last_words(name, run)

    def run_started(self, plugin: Plugin, pipes: list[int]) -> None:
        """Tell the host of a run."""
        self._running().run_started(plugin, pipes)

    async def run_stopping(self, plugin: Plugin, run: str, reason: str) -> None:
        """Let the host take leave of a run that is about to be stopped."""
        await self._running().run_stopping(plugin, run, reason)

    def run_ended(self, plugin: Plugin, run: str, end: CageExit, *, expected: bool, retry_in: float | None) -> None:
        """Tell the host how a run ended."""
        self._running().run_ended(plugin, run, end, expected=expected, retry_in=retry_in)

    def changed(self, plugin: Plugin) -> None:
        """A plugin's state changed."""
        self.tell_host("plugin.changed", plugin=self.registrations.entry(plugin))

    def tell_host(self, op: str, /, **fields: Any) -> None:
        """Tell the host; nothing when it is away."""
        self._running().tell_host(op, **fields)

    def _running(self) -> Services:
        assert self._services is not None
        return self._services

    def _trail_blocked(self, why: str | None) -> None:
        if why == AWAY:
            return  # between two writers, which is told as such
        if why is not None:
            self._alarmed = True
            self._log(f"ALARM: {why}; {without_trail(self.config.audit.disk_full)}")
        elif self._alarmed:
            self._alarmed = False
            self._log("the audit trail can be written again")

    async def _on_ledger(self, message: Message) -> dict[str, Any]:
        return {"ledger": [control.to_json() for control in ledger(volume.check)]}

    async def _take_snapshots(self) -> None:
        interval = self.config.audit.snapshot_interval
        while True:
            await asyncio.sleep(interval)
            for plugin in self.plugins.values():
                if plugin.run is not None and plugin.state == "running":
                    self.record_resources(plugin)
                    changed = plugin.run.detect_drift()
                    if changed:
                        self._log(f"plugin {plugin.name} is started anew: {changed}")
                        plugin.run.end("its control groups were changed")

    def record_resources(self, plugin: Plugin) -> None:
        """One ``resources`` record of a plugin's run."""
        if plugin.run is not None and plugin.run.cage.started:
            self.audit.record(Resources(**plugin.run.look()), plugin=plugin.name, run=plugin.run.id)


def _check_reachable(paths: Paths) -> None:
    """The unprivileged processes must be able to walk to their folders."""
    for folder in (*reversed(paths.root.parents), paths.root):
        if folder.exists() and not folder.stat().st_mode & 0o001:
            raise IsolatorError(
                f"root {paths.root}", f"the daemon's unprivileged processes cannot enter {folder}",
                f"chmod o+x {folder}, or choose a --root elsewhere",
            )  # fmt: skip


def log_line(text: str) -> None:
    """One line of the daemon's own log, on stderr."""
    print(f"isolator: {text}", file=sys.stderr, flush=True)
