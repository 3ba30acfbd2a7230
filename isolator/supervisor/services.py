"""The daemon's unprivileged processes, introduced to each other: audit, broker, host, and the console if there is one.

They start in this order, the broker with the first cage to come, and stop in the reverse. Each gets a channel to the
supervisor and (but for audit itself) a source socket of its own to the audit process; whoever dies is started again and
introduced anew: to audit come new source sockets, to the broker the listeners of every cage that runs, to the host the
plugins, their log pipes and the listeners of their host API. The messages are in isolator/ipc/messages.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from isolator.audit.client import AuditClient
from isolator.broker.hardening import filter_file
from isolator.cage.runtime import CageRuntime
from isolator.errors import IsolatorError
from isolator.ipc.body import Handler
from isolator.ipc.channel import Channel
from isolator.ipc.messages import Outdated, ServiceEntry
from isolator.ipc.tasks import report
from isolator.layers.user import add_service_user
from isolator.paths import Paths
from isolator.policy.host import HostConfig
from isolator.supervisor import kept
from isolator.supervisor.alarms import ServiceHealth
from isolator.supervisor.audit_link import AuditLink
from isolator.supervisor.broker_link import BrokerLink
from isolator.supervisor.folders import own_folder
from isolator.supervisor.host_link import HostLink
from isolator.supervisor.plugins import PluginTable
from isolator.supervisor.reload.exchange import exchange
from isolator.supervisor.service import ChildProcess, ServiceSpec, Ways
from isolator.supervisor.zygote import Zygotes

if TYPE_CHECKING:
    from isolator.ipc.handover import AuditState, ServiceState
    from isolator.supervisor.console_link import ConsoleLink

logger = logging.getLogger(__name__)

_START = 19
"""Field of /proc/PID/stat behind the name of the program: its start, in ticks, see proc(5)."""

NOBODY = 65534
HOST_MODULE = "host.service"
"""Named, never imported: ``isolator`` does not know what the host is made of."""
CERTIFYING_HOST = "host.certifying.service"
"""The host of a private daemon of ``isolator certify``: it plays the faults of the protocol."""


def _started_at() -> float:
    """Unix time of this process's start, which an exec leaves as it is."""
    ticks = int(Path("/proc/self/stat").read_bytes().rpartition(b")")[2].split()[_START])
    return time.time() - time.clock_gettime(time.CLOCK_BOOTTIME) + ticks / os.sysconf("SC_CLK_TCK")


class Services:
    """The services of one daemon. Their users and folders are made at once, the processes by ``start``."""

    def __init__(
        self,
        paths: Paths,
        config: HostConfig,
        runtime: CageRuntime,
        client: AuditClient,
        health: ServiceHealth,
        zygotes: Zygotes,
        host_module: str = HOST_MODULE,
    ) -> None:
        kept.check_trail(paths)
        kept.check_host(paths)
        users = _make_users(paths)
        if config.console is not None:
            uid, _ = add_service_user(paths.named("isolator-console"), comment="Isolator console")
            users["console"] = uid, users["host"][1]  # the group that may read the trail, and nothing else
            config = config.with_console(uid)
        _make_folders(paths, users)

        def process(name: str, module: str) -> ChildProcess:
            ids = users.get(name, (NOBODY, NOBODY))
            return ChildProcess(ServiceSpec(name, module, *ids), zygotes, runtime.subtree, runtime.journal, health)

        broker, host = process("broker", "isolator.broker.service"), process("host", host_module)
        audit = process("audit", "isolator.audit.service")
        self.audit = AuditLink(audit, client, (broker, host), paths, config)
        self.broker = BrokerLink(broker, paths, config)
        self.host = HostLink(host, paths, config, health.alarms, client)
        self._paths, self._process, self._zygotes = paths, process, zygotes
        self.exchanging = asyncio.Lock()
        """Held while processes are exchanged, and by a reload: an exchange needs answers that a rest holds back."""
        self.console: ConsoleLink | None = None
        """None, and nothing of it loaded, where there is no ``[console]``, or it could not be started."""
        if config.console is not None:
            from isolator.supervisor.console_link import MODULE, ConsoleLink

            self.console = ConsoleLink(process("console", MODULE), paths, config, config.console, health)

    @property
    def every(self) -> tuple[ChildProcess, ...]:
        """The processes that were begun, in the order of their starts."""
        console = (self.console.process,) if self.console is not None else ()
        known = (self.audit.process, self.broker.process, self.host.process, *console)
        return tuple(process for process in known if process.begun)

    async def start(
        self, table: PluginTable, handlers: Mapping[str, Handler], before: Mapping[str, ServiceState] | None = None,
        links: AuditState | None = None, *, cages: bool = True,
    ) -> None:  # fmt: skip
        """Start the services; returns when the host accepts commands, which ``handlers`` serve.

        Without ``cages`` to come there is no broker until one does (``BrokerLink.need``).

        With the states ``before`` this process's exec, by name, and that of the ``links`` to the audit process, those
        that run go on, the console aside (``start_console``), and nothing is awaited: the host is served from the next
        turn of the loop on.
        """
        audit, broker, host = self.audit, self.broker, self.host

        async def introduce_broker(channel: Channel) -> None:
            await broker.hello(channel)
            audit.note_restart(broker.process)
            await broker.attach_again(channel)
            audit.catch_up(broker.process)

        async def introduce_host(channel: Channel) -> None:
            await table.end_invocations("the host has ended")  # nobody knows their events any more
            await host.hello(channel, table.entries)
            audit.note_restart(host.process)
            for plugin in table.plugins.values():
                plugin.announce()
            audit.catch_up(host.process)

        def inherited_by_broker() -> dict[str, int]:
            return {**self._broker_filter(), "audit": audit.source_end("broker")}

        def inherited_by_host() -> dict[str, int]:
            return {"audit": audit.source_end("host")}

        def host_succeeded() -> None:
            host.serve_callers()
            audit.catch_up(host.process)

        of_audit = Ways(audit.introduce, succeed=lambda: audit.succeed)
        of_broker = Ways(
            introduce_broker, broker.handlers(), inherited_by_broker, lambda: broker.succeed, self._broker_filter,
            lambda: audit.catch_up(broker.process),
        )  # fmt: skip
        of_host = Ways(
            introduce_host, {**handlers, **host.handlers()}, inherited_by_host, lambda: host.succeed(table.entries),
            succeeded=host_succeeded,
        )  # fmt: skip
        broker.process.ways = of_broker
        if before is not None:
            audit.process.adopt(before["audit"], of_audit)
            try:
                assert links is not None
                audit.adopt(links)
            except Exception as error:  # whatever it was: another process gets links of its own
                report(asyncio.get_running_loop(), "take-over of the links to audit", error)
                audit.process.give_up(f"its links were not taken over: {error}")
            if "broker" in before:
                broker.process.adopt(before["broker"], of_broker)
            host.process.adopt(before["host"], of_host)
            return
        async with self._zygotes.ready():  # one for all
            for process, ways in ((audit.process, of_audit), (broker.process, of_broker), (host.process, of_host)):
                if process is not broker.process or cages:
                    await process.begin(ways)  # they load their modules beside each other
            await audit.process.introduce()
            if audit.found.blocked is None:
                kept.note(self._paths.trail_begun)
            if cages:
                await broker.process.introduce()
            await host.process.introduce()
            kept.note(self._paths.database_begun)
            await self.start_console()

    async def start_console(self, before: ServiceState | None = None) -> None:
        """Start the console if there is to be one, or go on with that of ``before`` this process's exec, or end it."""
        if before is not None and self.console is not None:
            self.console.adopt(before)
        elif before is not None:  # host.toml has none any more
            process = self._process("console", "")
            process.adopt(before, process.ways)
            await process.stop()
            self._paths.console_socket.unlink(missing_ok=True)
        elif self.console is not None and not await self.console.start():
            self.console = None

    async def drop_console(self) -> None:
        """Do without a console that does not come up: nobody waits for it, and the next start begins anew."""
        if self.console is not None and not self.console.process.up.is_set():
            await self.console.process.stop()
            self.console = None

    def entries(self) -> tuple[ServiceEntry, ...]:
        """Describe the daemon's processes, this one first."""
        own = ServiceEntry(name="supervisor", pid=os.getpid(), up=True, starts=1, ended="", since=_started_at())
        return own, *(process.entry() for process in self.every)

    def _broker_filter(self) -> dict[str, int]:
        return {"filter": filter_file(self._paths.cache)}

    async def exchange(self) -> None:
        """Put new processes in the places of those that run, one after the other; each failure is logged."""
        async with self.exchanging, contextlib.AsyncExitStack() as stack:
            with contextlib.suppress(IsolatorError, OSError):  # it is begun anew for each, which says what failed
                await stack.enter_async_context(self._zygotes.ready())
            lasting = [process for process in self.every if process.ways.succeed is not None]
            for process in lasting:
                process.kept = ""
            for process in lasting:
                try:
                    await exchange(process)
                except (IsolatorError, OSError) as error:
                    process.kept = str(error)
                    logger.error("%s could not be exchanged: %s", process.spec.name, error)

    def outdated(self) -> tuple[Outdated, ...]:
        """The services that an exec has left as they were, or whose exchange is not over.

        The console is away by itself: that a new one serves is not waited for.
        """
        waited_for = (self.audit.process, self.broker.process, self.host.process)
        return tuple(
            Outdated(name=one.spec.name, refused=one.kept if one.up.is_set() else "")
            for one in self.every
            if one.ways.succeed is not None and (one.outdated if one in waited_for else one.as_before)
        )


def _make_users(paths: Paths) -> dict[str, tuple[int, int]]:
    """Make the services' system users; returns (uid, gid) by service."""
    return {
        name: add_service_user(paths.named(f"isolator-{user}"), comment=f"Isolator {name}")
        for name, user in (("audit", "audit"), ("broker", "net"), ("host", "host"))
    }


def _make_folders(paths: Paths, users: Mapping[str, tuple[int, int]]) -> None:
    for folder, name, group, mode in (
        (paths.audit_lib, "audit", "audit", 0o700),
        # The trail's files get the folder's group: the host can show them to those who may see them.
        (paths.audit_log, "audit", "host", 0o2755),
        (paths.host_lib, "host", "host", 0o700),
        (paths.plugin_log, "host", "host", 0o755),
    ):
        own_folder(folder, mode, users[name][0], users[group][1])
