"""The supervisor: root, small, the one process that decides; it parses only manifests and policies.

Starts in this order and stops in the reverse: the lock on the root (a second daemon is refused), leftovers of an
earlier daemon are cleared, the registered plugins are read (they start when an event wants them), the launcher, then
audit, broker and host with their users, then files are watched. Launcher and broker are for cages: where no plugin is
registered and no user may run anything they start with the first that does. Anything that dies is started again;
running sidecars stay, except when the launcher dies: it is what ends cages if this process is killed, so the runs it
cloned are ended and come back under a new one.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import sys
import time
from collections.abc import AsyncIterator, Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import isolator
from isolator.audit import schema
from isolator.audit.client import AWAY, AuditClient
from isolator.cage.runtime import CageRuntime
from isolator.cage.tcp_memory import keep_tcp_memory
from isolator.errors import IsolatorError
from isolator.ipc.tasks import Tasks
from isolator.launcher.client import Launcher
from isolator.layers.cgroup.subtree import open_subtree
from isolator.layers.ledger import check_in_a_copy, ledger, missing, optional_controllers
from isolator.layers.seccomp.notifier import SeccompNotifier
from isolator.linux.child import Child, ended
from isolator.linux.files import remove_tree
from isolator.linux.priority import go_first
from isolator.paths import Paths
from isolator.policy.host import HostConfig, without_trail
from isolator.recovery import daemon as recovery
from isolator.recovery.journal import Entry, Journal
from isolator.registration.registrar import Registrar
from isolator.supervisor import alive
from isolator.supervisor.alarms import Alarms, ServiceHealth
from isolator.supervisor.background import Background
from isolator.supervisor.fences import Fences
from isolator.supervisor.folders import own_folder
from isolator.supervisor.handlers import Handlers
from isolator.supervisor.plugins import PluginTable
from isolator.supervisor.policy_watch import PolicyWatch
from isolator.supervisor.reloads import Reloads
from isolator.supervisor.rest import Rest
from isolator.supervisor.run import Run, RunContext
from isolator.supervisor.services import HOST_MODULE, Services
from isolator.supervisor.snapshots import keep_snapshots
from isolator.supervisor.socket_watch import SocketWatch
from isolator.supervisor.tickets import Tickets
from isolator.supervisor.updates import Updates
from isolator.supervisor.zygote import Zygotes
from isolator.volume import volume
from isolator.volume.volume import Volume

if TYPE_CHECKING:
    from isolator.ipc.handover import DaemonState
    from isolator.supervisor.runners.run import RunnerRun
    from isolator.supervisor.runners.runners import Runners

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Daemon:
    """The parts of a running daemon that a reload hands over."""

    runtime: CageRuntime
    notifier: SeccompNotifier
    services: Services
    table: PluginTable
    runners: Runners | None
    tickets: Tickets
    alarms: Alarms
    rest: Rest
    reloads: Reloads
    fences: Fences


@contextlib.asynccontextmanager
async def running_daemon(
    paths: Paths,
    config: HostConfig,
    exchange: asyncio.Event,
    zygotes: Zygotes,
    *,
    progress: Callable[[str], None] = lambda step: None,
    before: DaemonState | None = None,
    host_module: str = HOST_MODULE,
) -> AsyncIterator[Daemon]:
    """A daemon that accepts commands; nothing of it is left when the context is left.

    ``exchange`` is set by whoever wants the processes of the services exchanged; ``zygotes`` make them. ``progress`` is
    called with each step of the start as it begins. ``before``: the state of the daemon that this process was before
    its exec; that goes on.
    Raises IsolatorError with one clear line when this host or this root cannot carry a daemon.
    """
    if before is None:
        check_host(paths, config)
    async with contextlib.AsyncExitStack() as stack:
        _make_folders(paths)
        journal = Journal(paths.journal, locked=before.journal if before is not None else -1)
        stack.callback(_remove_run_folder, paths)
        stack.callback(journal.close)
        restored = _finish_restore(paths) if before is None else None
        cleared: list[recovery.Leftover] = []
        kept_by: Launcher | None = None
        hanging: list[Child] = []
        optional = optional_controllers(config.may_degrade)
        if before is None:
            progress("clearing what an earlier daemon left")
            cleared = recovery.clear(paths, journal)
            for left in cleared:
                line = f"cleared what an earlier daemon left: {left.kind} {left.name} {left.detail}"
                logger.info("%s", line.rstrip())
            subtree = open_subtree(paths.named("isolator"), optional=optional)
            journal.record(Entry("subtree", "subtree", tuple(map(str, subtree.folders()))))
        else:
            from isolator.supervisor.reload import adopt
            from isolator.supervisor.reload.adoption import Adoption

            hanging = adopt.end_unnamed_children(before)
            subtree = adopt.subtree(before.subtree, optional)
            kept_by = adopt.launcher(before)
            if kept_by is not None:
                stack.callback(kept_by.close)
        if "cpu" not in subtree.on_v2:  # where it is, the services' groups have a greater weight: Leaf.prefer
            go_first()
        stack.callback(journal.forget, "subtree")
        stack.callback(subtree.remove)
        runtime = CageRuntime(None, journal, subtree, keep_warm=True)
        stack.callback(runtime.stop_watching)
        stack.push_async_callback(runtime.close)
        notifier = SeccompNotifier()
        stack.callback(notifier.close)
        sockets = SocketWatch()
        stack.callback(sockets.close)
        audit = AuditClient(None)
        trail_alarm = _TrailAlarm(config.audit.disk_full)
        audit.on_blocked, audit.on_alarm = trail_alarm.blocked, trail_alarm.short
        stack.callback(audit.close)
        registrar = Registrar(paths, config)
        recovered = []
        if before is None:
            recovered = registrar.recover(lambda name: Volume(paths.state, name, journal).remove())
            for line in recovered:
                logger.info("%s", line)
        alarms = Alarms()
        stack.callback(alarms.close)
        health = ServiceHealth(alarms, audit)
        loop = asyncio.get_running_loop()
        loop.set_exception_handler(health.work_failed)
        stack.callback(loop.set_exception_handler, None)
        services = Services(paths, config, runtime, audit, health, zygotes, host_module)
        context = RunContext(
            paths, runtime, audit, services.host, services.broker, sockets, notifier,
            wait_for_trail=config.audit.disk_full == "stop", rest=(rest := Rest()),
            fences=(fences := Fences(audit, services.broker, services.host)),
        )  # fmt: skip
        stack.callback(fences.close)
        table = PluginTable(context, registrar, config.plugin_dirs)
        progress("reading the plugins")
        table.load()
        tasks = Tasks()
        stack.push_async_callback(tasks.close)
        runners = _runners(context, config, before)
        cages = bool(table.plugins) or runners is not None
        if cages:
            runtime.launch()
        for child in hanging:
            tasks.run(f"end of process {child.pid}", ended(child))
        tasks.keep("watch over the launcher", lambda: _keep_launcher(runtime, table, runners, health))
        background = Background(subtree, runtime.journal.leaves)
        if background.possible:
            tasks.keep("background of the cages", lambda: _keep_background(runtime, background))
        stack.push_async_callback(_stop, table, services, audit)
        tickets = Tickets(paths.ticket_socket, config)
        stack.callback(tickets.close)
        updates = Updates(table, context, tickets)
        reloads = Reloads(before.generation if before is not None else 1)
        stack.push_async_callback(reloads.close)
        handlers = Handlers(table, updates, services, reloads, fences).all()
        if before is None:
            on_trial = await updates.hold_trials()
            progress("starting the services")
            tickets.start()
            await services.start(table, handlers, cages=cages)
            table.expect_starts(others=runners is not None)
            if restored is not None:
                audit.record(schema.BackupRestored(**restored))
            elif cleared or not services.audit.found.ended:
                why = "the daemon before did not end by itself; what its processes had not handed over is lost"
                audit.record(schema.AuditGap(count=None, why=why))
            updates.judge_again(on_trial)
            audit.record(
                schema.HostStarted(
                    version=isolator.__version__,
                    kernel=os.uname().release,
                    python=".".join(map(str, sys.version_info[:3])),
                    ledger=[control.to_json() for control in ledger(volume.check)],
                    config=config.source,
                    config_sha256=config.digest(),
                    cleared=[*(f"{left.kind} {left.name}" for left in cleared), *recovered],
                )
            )
            _record_dead(audit, services.audit.found.runs, cleared, restored is not None)
            if restored is not None:
                tasks.run("note of the restore", _forget_restored(audit, paths))
        else:
            alarms.adopt(before.alarms, before.alarm_ends)
            tickets.adopt(before.tickets)
            served = {one.name: one for one in before.services}
            await services.start(table, handlers, served, before.audit)
            services.host.door.adopt(before.control_opens)
            # Until every plugin is as it was, nothing is awaited: what the host asks for would begin a run anew.
            registrar.adopt(before.staged)
            adoption = Adoption(context, before, kept_by) if kept_by is not None else None
            adopted = adoption.plugins(table) if adoption is not None else 0
            fences.go_on()
            if adoption is not None:
                adopted += adoption.runs(runners)
                await adoption.change_launchers(table, runners)
            table.expect_starts(others=runners is not None)
            audit.record(
                schema.DaemonReloaded(
                    from_=before.version,
                    to=isolator.__version__,
                    adopted=adopted,
                    seconds=round(time.monotonic() - before.began, 3),
                    generation=before.generation,
                    config_sha256=config.digest(),
                )
            )
            await services.start_console(served.get("console"))
        if runners is not None:
            stack.push_async_callback(runners.close)
            if before is None or before.runners is None:
                runners.start()
        tasks.keep("snapshots", lambda: keep_snapshots(table, runners, config.audit.snapshot_interval, alarms))
        tasks.keep("memory of TCP", lambda: keep_tcp_memory(lambda: _runs(table, runners)))
        watch = PolicyWatch(table, context, config)
        stack.callback(watch.close)
        if before is not None:
            watch.look()
        await table.discovery.start(before.found if before is not None else ())
        tasks.keep("exchange of services", lambda: _exchange_when(exchange, services))
        if before is not None:
            tasks.run("exchange of the services of before", services.exchange())
        yield Daemon(runtime, notifier, services, table, runners, tickets, alarms, rest, reloads, fences)


def _runs(table: PluginTable, runners: Runners | None) -> list[Run | RunnerRun]:
    """Every run that there is."""
    runs: list[Run | RunnerRun] = [run for plugin in table.plugins.values() for run in plugin.runs]
    return runs + (runners.runs if runners is not None else [])


def _runners(context: RunContext, config: HostConfig, before: DaemonState | None) -> Runners | None:
    """The runs of runners; None, and nothing of it loaded, where nobody has that role, or a run from when it had."""
    if not config.roles.runner and (before is None or before.runners is None):
        return None
    from isolator.supervisor.runners.runners import Runners

    return Runners(context, config)


async def _exchange_when(asked: asyncio.Event, services: Services) -> None:
    """Exchange the services' processes, one after the other, whenever that is asked for."""
    while True:
        await asked.wait()
        asked.clear()
        await services.exchange()


async def _stop(table: PluginTable, services: Services, audit: AuditClient) -> None:
    """Stop every plugin, then the services in reverse; the trail's last record is the daemon's stop."""
    started = time.monotonic()
    await table.close()
    await services.host.give_up()
    if services.console is not None:
        await services.console.process.stop()
    await services.host.process.stop()
    await services.broker.process.stop()
    if services.audit.process.starts:
        audit.record(schema.HostStopped(seconds=round(time.monotonic() - started, 3)))
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(5):
                await audit.durable()
    await services.audit.process.stop()


def check_host(paths: Paths, config: HostConfig) -> None:
    """Raise IsolatorError when this host or this root cannot carry a daemon; changes nothing."""
    if os.geteuid() != 0:
        raise IsolatorError("isolator serve", "it builds cages and has to run as root", "run it with sudo")
    check_in_a_copy()
    lacking = missing(frozenset(config.may_degrade))
    if lacking:
        first = lacking[0]
        raise IsolatorError(f"this host cannot enforce {first.name}", first.reason, first.remedy)
    # The unprivileged processes must be able to walk to their folders.
    for folder in (*reversed(paths.root.parents), paths.root):
        if folder.exists() and not folder.stat().st_mode & 0o001:
            raise IsolatorError(
                f"root {paths.root}", f"the daemon's unprivileged processes cannot enter {folder}",
                f"chmod o+x {folder}, or choose a --root elsewhere",
            )  # fmt: skip


def _make_folders(paths: Paths) -> None:
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
        own_folder(folder, 0o700 if folder == paths.state else 0o755)


def _remove_run_folder(paths: Paths) -> None:
    paths.control_socket.unlink(missing_ok=True)
    paths.metrics_socket.unlink(missing_ok=True)
    paths.ticket_socket.unlink(missing_ok=True)
    paths.run_socket.unlink(missing_ok=True)
    paths.console_socket.unlink(missing_ok=True)
    remove_tree(paths.run / "hostapi", ignore_errors=True)
    with contextlib.suppress(OSError):
        paths.run.rmdir()


def _finish_restore(paths: Paths) -> dict[str, str] | None:
    """Finish a restore that was cut short; returns the note of one that is not on record yet."""
    from isolator.backup import swap

    swap.finish(paths)
    return swap.restored(paths)


async def _forget_restored(audit: AuditClient, paths: Paths) -> None:
    from isolator.backup import swap

    await audit.durable()
    swap.forget_restored(paths)


def _record_dead(
    audit: AuditClient, unended: Mapping[str, str], cleared: list[recovery.Leftover], restored: bool
) -> None:
    """Give each start on record its end: of the runs that were found here, and of those that a reboot took along."""
    why = "found in a backup: it ended after that" if restored else "found dead: the machine went down"
    ends = dict.fromkeys(unended.items(), why)
    for left in cleared:
        if left.kind == "cage":
            plugin, _, run = left.name.rpartition(".")
            ends[run, plugin] = "found dead: the daemon was killed"
    for (run, plugin), cause in ends.items():
        ended = schema.RunEnded if plugin.startswith("_") else schema.PluginStopped  # no plugin's name begins so
        audit.record(ended(cause=cause), plugin=plugin, run=run)


async def _keep_launcher(
    runtime: CageRuntime, table: PluginTable, runners: Runners | None, health: ServiceHealth
) -> None:
    await runtime.launched.wait()
    while True:
        launcher = runtime.launcher
        silent = await alive.until_silent(launcher.closed, launcher.alive, launcher.pid, "launcher")
        if silent is not None:
            health.hangs("launcher", silent)
            launcher.kill()
        logger.error("the launcher has died; starting it and its cages again")
        health.ended("launcher", silent.why if silent is not None else "it died", hung=silent is not None)
        launcher.close()
        for plugin in table.plugins.values():
            for run in plugin.runs:
                run.terminate("the launcher died")
        if runners is not None:
            runners.terminate("the launcher died")
        runtime.launcher = Launcher()
        health.is_up("launcher")


async def _keep_background(runtime: CageRuntime, background: Background) -> None:
    await runtime.launched.wait()
    await background.keep()


class _TrailAlarm:
    """Log lines for a trail that cannot be written, or fills up."""

    def __init__(self, disk_full: str) -> None:
        self._disk_full, self._raised = disk_full, False

    def blocked(self, why: str | None) -> None:
        """Note why the trail cannot be written; None: it can."""
        if why == AWAY:
            return  # between two writers: that is logged as such
        if why is not None:
            self._raised = True
            logger.critical("ALARM: %s; %s", why, without_trail(self._disk_full))
        elif self._raised:
            self._raised = False
            logger.info("the audit trail can be written again")

    def short(self, why: str | None) -> None:
        """Note why the trail will not last as long as it should; None: it will."""
        if why is not None:
            logger.critical("ALARM: %s", why)
        else:
            logger.info("the audit trail lasts as long as it should again")
