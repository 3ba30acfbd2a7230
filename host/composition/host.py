"""The host: everything that serves the platform, composed, and its half of the conversation with the supervisor.

It is built when ``hello`` has come, in this order: database (recovered before anything else), registry, secrets, queue,
dispatch, control socket. The answer to ``hello`` means that commands and events are accepted. The host owns no
privilege and no process: when it dies its supervisor starts another, the sidecars go on running, and accepted events
are still in the queue.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import socket
import sqlite3
from collections.abc import Callable
from typing import TYPE_CHECKING

from host.composition.cluster import accepted_here, cluster_of, new_member, queue_class
from host.composition.handover import HostState
from host.composition.introduction import HostParts, Introduction
from host.control.alarms import Alarms
from host.control.api_verbs import ApiVerbs
from host.control.catalogue_verbs import CatalogueVerbs
from host.control.cluster_verbs import ClusterVerbs
from host.control.config_verbs import ConfigVerbs
from host.control.daemon_verbs import DaemonVerbs, remove_snapshots
from host.control.elsewhere import Elsewhere
from host.control.endpoints import AnyEndpoint
from host.control.event_verbs import EventVerbs
from host.control.follow import TrailStreams
from host.control.mcp_verbs import McpVerbs
from host.control.platform_types import ApiRegister
from host.control.plugin_types import PluginStage
from host.control.plugin_verbs import PluginVerbs
from host.control.registration_verbs import RegistrationVerbs
from host.control.searches import Searches
from host.control.server import ControlServer
from host.database.store import Store, exit_after_failed_sync
from host.delivery.attempts import Attempts
from host.delivery.dispatch import Dispatcher
from host.delivery.gate import DispatchGate
from host.delivery.gauges import Gauges
from host.delivery.health import Watches
from host.delivery.pauses import Pauses
from host.events import Catalogue
from host.fence.fences import Fences
from host.host_api.methods import KeyValue
from host.intake.intake import EventIntake, EventRecords
from host.intake.jobs import Jobs
from host.intake.operational import OperationalEvents
from host.intake.unrecorded import unrecorded
from host.lifecycle.lifecycle import PluginLifecycle
from host.lifecycle.supervisor_link import SupervisorLink
from host.plugins.environments import Environments
from host.plugins.logs import Logs
from host.plugins.registry import Registry, load_event_types
from host.plugins.secrets import ConfigStore
from host.queue.beside_trail import compare
from host.queue.owed import Debts, owed
from host.queue.rows import newest_number
from isolator.audit.client import AuditClient
from isolator.audit.schema import ConfigChanged, DatabaseDamaged
from isolator.errors import IsolatorError
from isolator.ipc import messages
from isolator.ipc.body import Handler, by_op
from isolator.ipc.channel import Channel
from isolator.ipc.succession import Departure, Descriptors, Succession
from isolator.paths import Paths
from isolator.policy.host import HostConfig

ASKED_AGAIN = frozenset({messages.GetEnvironment.op, messages.DrainRun.op, messages.GetStderrTail.op})
"""Requests of the supervisor's, which repeats them if they are broken off."""
SETTLE, SETTLE_BEAT = 2.0, 0.005
"""Seconds for which a host that leaves waits for what it cannot hand on, and between two looks at that."""
OWED = 1.0
"""Seconds for which nothing is sent while records are made that the trail is owed: what they tell of goes on then."""

if TYPE_CHECKING:
    from host.mcp.servers import Servers

_logger = logging.getLogger(__name__)


class Host:
    """The running host. ``before``: the state of another, which has left and whose place this one takes.

    Raises IsolatorError when a folder that it needs cannot be written.
    """

    def __init__(
        self,
        paths: Paths,
        settings: HostConfig,
        channel: Channel,
        audit: AuditClient,
        succession: Succession[HostState],
        before: HostState | None,
        parts: HostParts,
    ) -> None:
        for folder in (paths.host_lib, paths.plugin_log):
            if not folder.is_dir() or not os.access(folder, os.W_OK | os.X_OK):
                raise IsolatorError(str(folder), "is not a folder this process can write", "restart the daemon as root")
        self.left = False
        """Everything was handed on: nothing is to be closed here."""
        self._audit, self._channel, self._succession = audit, channel, succession
        self._servers: Servers | None = None
        """MCP servers, once there is one."""
        link = SupervisorLink(channel, settings.ceiling.limits.start_timeout)
        wait_for_trail = settings.audit.disk_full != "continue"

        database, key = paths.host_database, paths.host_lib / "key"

        def made(db: sqlite3.Connection) -> None:
            if key.exists():
                why = f"{database} is gone"
                _logger.warning("%s, a new one was made: queued events, config and stored values are lost", why)
                Debts.note(db, [owed(ConfigChanged(names=[], lost=True, why=why), None)])

        store = self._store = Store(database, fatal=self._end, made=made)
        debts = self._debts = Debts(store, audit, paths.audit_log)
        remove_snapshots(paths.host_lib)
        config = self._config = ConfigStore(store, key)
        alarms = self._alarms = Alarms(audit, store, settings.audit.disk_full)
        if config.problem is not None:
            _logger.warning("%s", config.problem)
            alarms.note(f"{config.problem}; plugins with config wait")
        catalogue = Catalogue()
        types, damaged = load_event_types(store)
        for event_type in types:
            catalogue.register(event_type)
        if damaged:
            alarms.note(f"{database}: damaged event types: {', '.join(damaged)}; have the platform register them again")
        registry = self._registry = Registry(catalogue, store)

        records = EventRecords(audit.record)
        held = store.read(newest_number)
        compared = compare(paths.audit_log, held)
        alarms.note_missing(compared)
        self._unrecorded = store.read(lambda db: unrecorded(db, compared, accepted_here(db))) if before is None else []
        """Records that the trail may lack."""
        cluster = cluster_of(settings.cluster, store)
        queue = self._queue = queue_class(cluster)(
            store,
            after=max(held, compared.number),
            in_flight={worker.plugin: worker.in_flight for worker in before.workers} if before is not None else None,
            on_accepted=records.accepted,
            on_ready=self._begin_attempts,
            on_expired=records.expired,
        )
        if queue.unreadable:
            damage = f"{queue.unreadable} deliveries are damaged and left alone"
            alarms.note(f"{database}: {damage}; restore it from a backup")
        self._attempts = Attempts(queue, audit, wait_for_trail=wait_for_trail)

        logs = self._logs = Logs(paths.plugin_log, config.redactor)
        fences = self._fences = Fences(channel.tell)
        folder = paths.host_lib / "cluster-folds"
        member = self._member = new_member(cluster, store, queue, registry, catalogue, fences, audit, folder)
        if member is not None:
            alarms.cluster = member.problems
        values = member.values if member is not None else KeyValue(store)
        api = self._api = parts.api(registry, audit, values, logs, config.redactor, fences)
        watches = self._watches = Watches(registry, channel, audit)
        environments = self._environments = Environments(config, registry, audit)
        self._gate = DispatchGate(audit, store, halt_without_audit=wait_for_trail)
        dispatcher = self._dispatcher = Dispatcher(
            supervisor=channel,
            queue=queue,
            attempts=self._attempts,
            gate=self._gate,
            registry=registry,
            catalogue=catalogue,
            audit=audit,
            redactor=config.redactor,
            api=api.call,
            logs=logs,
            source=settings.event_source,
            config=config,
            environment=environments.along,
            serve_invocation=api.serve_invocation,
            end_invocation=api.end_invocation,
            pauses=Pauses(store, debts),
            fences=fences,
            servers=self._load_servers,
            sidecars=parts.sidecars,
        )
        lifecycle = self._lifecycle = PluginLifecycle(
            link=link,
            audit=audit,
            store=store,
            registry=registry,
            config=config,
            queue=queue,
            debts=debts,
            logs=logs,
            api=api,
            dispatcher=dispatcher,
            watches=watches,
            member=member,
        )
        fences.opened, fences.ended = lifecycle.may_act, dispatcher.lost

        intake = EventIntake(catalogue, registry, queue, audit, wait_for_trail=wait_for_trail)
        self._operational = OperationalEvents(paths.audit_log, audit, store, registry, queue, intake)
        self._jobs = Jobs(store, queue, registry, catalogue, debts)
        trail = self._trail = TrailStreams(paths.audit_log, audit)
        searches = self._searches = Searches(paths.audit_log)
        api_verbs = self._api_verbs = ApiVerbs(api)
        registrations = RegistrationVerbs(link, catalogue, registry, config, lifecycle, audit, debts)
        elsewhere = Elsewhere(member.holders) if member is not None else Elsewhere()
        endpoints: list[AnyEndpoint] = [
            *EventVerbs(intake, queue, dispatcher, registry, catalogue, debts, self._jobs).endpoints(),
            *CatalogueVerbs(catalogue, registry, store, member.types if member is not None else None).endpoints(),
            *api_verbs.endpoints(),
            *PluginVerbs(
                link,
                registry,
                config,
                queue,
                dispatcher,
                watches,
                logs,
                alarms,
                member.plugin if member is not None else lambda _: None,
                elsewhere,
            ).endpoints(),
            *registrations.endpoints(),
            *ConfigVerbs(registry, config, lifecycle, debts).endpoints(),
            *DaemonVerbs(link, registry, queue, audit, store, alarms, dispatcher, paths.audit_log).endpoints(),
            *trail.endpoints(),
            *searches.endpoints(),
            *McpVerbs(self._load_servers, registry, elsewhere).endpoints(),
            *ClusterVerbs(lambda: member.node if member is not None else None, registry, alarms.cluster).endpoints(),
        ]
        restore = {ApiRegister.spec.verb: api_verbs.restore, PluginStage.spec.verb: registrations.restore}
        self._control = ControlServer(
            endpoints, settings.role_of, audit.record, restore, debts,
            console=settings.console.uid if settings.console is not None else None, may_call=settings.may_call,
            shut_out=lambda uid: channel.tell(messages.ShutOut(uid=uid)),
        )  # fmt: skip
        self._gauges = Gauges(queue, registry, dispatcher, audit)

    def _load_servers(self) -> Servers:
        if self._servers is None:
            from host.mcp.pins import Pins
            from host.mcp.servers import Servers

            pins, use = Pins(self._store), self._dispatcher.in_use
            self._servers = Servers(
                self._channel, self._registry, self._audit, pins, self._config.redactor, use, self._fences, self._debts
            )
        return self._servers

    def handlers(self) -> dict[str, Handler]:
        """The supervisor's requests and notifications, by op."""
        return by_op(
            messages.PluginChanged.on(self._plugin_changed),
            messages.PluginTurned.on_now(self._lifecycle.turn),
            messages.GetEnvironment.on_now(self._environments.answer),
            messages.RunStarted.on_fds_now(self._run_started),
            messages.DrainRun.on(self._drain_run),
            messages.RunEnded.on_now(self._run_ended),
            messages.InvocationBegun.on_fds_now(self._dispatcher.invocation_begun),
            messages.InvocationEnded.on_now(self._dispatcher.invocation_ended),
            messages.GetStderrTail.on(self._stderr_tail),
            messages.NewAuditSocket.on_fds(self._audit_source),
            messages.AlarmsChanged.on_now(self._alarms_changed),
            messages.ServeCallers.on(self._serve_callers),
            messages.GiveUp.on(self._give_up),
            messages.Leave.on(self._leave),
        )

    async def start(self, introduction: Introduction) -> None:
        """Take over the plugins, accept commands, and start eager plugins."""
        self._begin(introduction)
        for entry in introduction.plugins:
            await self._lifecycle.adopt(entry)
        if any(plugin.mode == "mcp" for plugin in self._registry):
            self._load_servers().end_left(introduction.paths.audit_log)
        if self._member is not None:
            await self._member.start()
        self._jobs.start()
        self._lifecycle.drop_unsettled_values()
        if introduction.listener is not None:
            await self._control.start(introduction.listener)
        if introduction.fresh:
            for plugin in self._registry:
                self._lifecycle.start_if_eager(plugin)

    async def go_on(self, introduction: Introduction, state: HostState, descriptors: Descriptors) -> None:
        """Take over the plugins as another host has left them, its requests in flight, its connections."""
        self._begin(introduction)
        # Before any plugin's line is read, which may be a call of a method that one of the callers serves.
        self._api_verbs.numbers = state.api_calls
        await self._control.take_over(state.control, descriptors)
        self._dispatcher.take_over(state.workers, descriptors)
        for entry in introduction.plugins:
            await self._lifecycle.adopt(entry)
        await self._dispatcher.taken_over()
        if state.mcp is not None:
            from host.mcp.servers import ServersState

            await self._load_servers().take_over(ServersState.from_json(state.mcp, "mcp"), descriptors)
        self._queue.end_lost_requests()
        if self._member is not None:
            await self._member.start()
        self._jobs.start()
        self._lifecycle.drop_unsettled_values()
        self._logs.take_over(state.logs, descriptors)
        await self._api.take_over(state.api, descriptors)
        self._lifecycle.take_over(state.starts)

    def _begin(self, introduction: Introduction) -> None:
        self._fences.adopt(introduction.fences)
        self._alarms.supervisor = introduction.alarms
        unpaid, self._unrecorded = self._unrecorded, []  # they may be very many
        if (finding := self._debts.find(unpaid)) is not None:
            self._gate.hold(finding, OWED)

    async def _give_up(self, _: messages.GiveUp) -> None:
        if self._member is not None and self._member.node is not None:
            left = await self._member.node.stop()
            if left:
                _logger.warning("the cluster's log does not have %d events of this host: they wait for its start", left)

    async def _serve_callers(self, _: messages.ServeCallers) -> None:
        await self._control.begin()

    async def _leave(self, _: messages.Leave) -> messages.Left:
        """Hand everything on to another process; nothing is accepted, sent or read any more once that has begun.

        What cannot be handed on and is likely to end soon is waited for: first, with everything going on, what changes
        something for a caller; then, with nothing new beginning, connects and calls. The database is closed before the
        state is sent, so that it never has two owners.
        """
        if self._store.blocked is not None:
            return messages.Left(refused=f"the database cannot be written: {self._store.blocked}")
        await self._settle(lambda: self._control.changes)
        listener = await self._control.hold()
        await self._api.hold()
        if listener is None:
            raise IsolatorError("the host", "has no control socket yet")
        self._dispatcher.hold()
        if self._servers is not None:
            self._servers.hold()
        await self._settle(lambda: self._unsettled)
        starts = self._lifecycle.pass_on()
        await self._break_connects_off()
        await self._attempts.close()
        await self._store.run(lambda _: None)  # events that were accepted before are in their queues, and answered
        departure = Departure()
        while any(one.replied for one in self._senders):  # noqa: ASYNC110 # a turn or two
            await asyncio.sleep(0)
        # What the supervisor asks from now on, and what is not answered yet, it asks of the successor.
        self._channel.hold()
        self._channel.break_off(ASKED_AGAIN)
        self._api_verbs.hold()
        workers = self._dispatcher.pass_on(departure)
        self._close_own_work()
        await self._watches.close()
        if self._member is not None:
            await self._member.close()
        self._control.drop_debts()
        if not await self._store.close():
            why = f"the outcomes of deliveries could not be written: {self._store.blocked}"
            raise IsolatorError(str(self._store.path), why, "free the disk or the lock")
        while self._servers is not None and self._servers.replied:  # noqa: ASYNC110 # a turn: one has run out of time
            await asyncio.sleep(0)
        mcp = self._servers.pass_on(departure).to_json() if self._servers is not None else None
        logs, api = self._logs.pass_on(departure), self._api.pass_on(departure)
        control = self._control.pass_on(listener, departure)
        self._trail.close()
        self._searches.close()
        audit = self._audit.pass_on(departure)
        state = HostState(
            audit=audit, workers=workers, logs=logs, api=api, api_calls=self._api_verbs.numbers, control=control,
            starts=starts, mcp=mcp,
        )  # fmt: skip
        self.left = True
        return messages.Left(parts=await self._succession.send(state, departure, self._channel))

    @property
    def _unsettled(self) -> bool:
        """Whether something is under way that cannot be handed on and is likely to end soon."""
        others = self._channel.serves_beside({messages.Leave.op, *ASKED_AGAIN})
        return others or self._dispatcher.unsettled or self._api.busy or self._lifecycle.unsettled

    @property
    def _senders(self) -> tuple[Dispatcher | Servers, ...]:
        """Those whose requests sidecars answer."""
        return self._dispatcher, *([self._servers] if self._servers is not None else [])

    async def _settle(self, unsettled: Callable[[], bool]) -> None:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(SETTLE):
                while unsettled():  # noqa: ASYNC110 # a dozen parts, none of which needs an event otherwise
                    await asyncio.sleep(SETTLE_BEAT)

    async def _break_connects_off(self) -> None:
        """Have no connection made for this process any more: simple plugins die of one without a request."""
        with contextlib.suppress(IsolatorError):  # a supervisor of the version before does not know this
            await self._channel.ask(messages.BreakOff())
            while any(one.connecting for one in self._senders):  # noqa: ASYNC110 # each is answered: a turn or two
                await asyncio.sleep(0)

    def _close_own_work(self) -> None:
        """Stop whatever nobody else has asked for."""
        for part in (self._lifecycle, self._gauges, self._operational, self._jobs, self._debts):
            part.close()

    async def close(self) -> None:
        """Stop serving; accepted events stay in the queue."""
        self._close_own_work()
        await self._control.close()
        self._trail.close()
        self._searches.close()
        await self._watches.close()
        if self._servers is not None:
            self._servers.close()
        await self._dispatcher.close()
        await self._attempts.close()
        if self._member is not None:
            await self._member.close()
        self._api.close()
        self._logs.close()
        await self._store.close()

    async def _plugin_changed(self, request: messages.PluginChanged) -> None:
        if request.removed is not None:
            if self._servers is not None:
                self._servers.forget(request.removed)
            await self._lifecycle.forget(request.removed)
        elif request.plugin is not None:
            await self._lifecycle.adopt(request.plugin)

    def _run_started(self, request: messages.RunStarted, fds: list[int]) -> None:
        name, run = request.name, request.run
        stdout, stderr, listener = fds
        fds.clear()
        self._logs.attach(name, run, stdout, stderr)
        self._api.serve(name, run, socket.socket(fileno=listener))
        self._registry.note_run(name, run=run, pid=request.pid, state="running")
        self._dispatcher.run_started(name, run)
        plugin = self._registry.get(name)
        if plugin is not None and plugin.mode == "mcp":
            self._load_servers().run_started(name, run)

    async def _drain_run(self, request: messages.DrainRun) -> None:
        servers = [self._servers.drain(request.name, request.run)] if self._servers is not None else []
        await asyncio.gather(self._dispatcher.drain(request.name, request.run, request.reason), *servers)

    def _run_ended(self, request: messages.RunEnded) -> None:
        name, run = request.name, request.run
        plugin = self._registry.get(name)
        if plugin is not None and plugin.run in (run, None):
            self._registry.note_run(name, run=None, pid=None, state=request.state)
        if self._servers is not None:
            self._servers.run_ended(name, run)
        self._dispatcher.run_ended(name, run, crashed=_is_crash(request))

    async def _stderr_tail(self, request: messages.GetStderrTail) -> messages.StderrTail:
        return messages.StderrTail(stderr=tuple(await self._logs.stderr_tail(request.name, request.run)))

    def _alarms_changed(self, request: messages.AlarmsChanged) -> None:
        self._alarms.supervisor = request.alarms

    def _end(self, why: str) -> None:
        """End this process, which cannot rely on its database; what the trail and the supervisor know of it stays."""
        self._audit.record(DatabaseDamaged(why=why), urgent=True)
        self._channel.tell(messages.RaiseAlarm(line=why))
        exit_after_failed_sync(why)

    def _begin_attempts(self) -> None:
        self._attempts.begin_gathered()
        self._attempts.schedule()

    async def _audit_source(self, _: messages.NewAuditSocket, fds: list[int]) -> None:
        self._audit.reconnect(socket.socket(fileno=fds.pop()))
        self._gauges.repeat()


def _is_crash(ended: messages.RunEnded) -> bool:
    """Whether the run was killed by its own doing: by a signal or for its memory. An exit code is no crash."""
    own = ended.origin == messages.Origin.PLUGIN and not ended.expected
    return own and (ended.signal is not None or ended.cause == messages.OUT_OF_MEMORY)
