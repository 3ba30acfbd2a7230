"""Stage of the demo with several hosts, shared by its steps: machines with daemons and servers, ledger and promises."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from daemon import Daemon, DemoError, Record, Trail
from report import Promise

from host.client.client import Client
from host.cluster.nats import Access, NatsLog, addresses
from isolator.errors import IsolatorError
from isolator.linux import netns
from isolator.paths import Paths
from tests.cluster.outages.history import Folded, History
from tests.support.ledger import COURIER, Ledger
from tests.support.nats_servers import Server
from tests.support.platforms import Platform
from tests.support.routed import Machine, Network, both_ways


@dataclass
class Host:
    """A machine with a daemon and a server. ``life`` is what has to be ended before the daemon can be started anew."""

    name: str
    machine: Machine
    server: Server
    daemon: Daemon
    trail: Trail | None = None
    life: contextlib.ExitStack = field(default_factory=contextlib.ExitStack)

    def start(self) -> None:
        """Start the daemon, and follow its trail."""
        self.life = contextlib.ExitStack()
        self.life.enter_context(self.daemon)
        self.trail = self.life.enter_context(Trail(self.daemon))

    def stop(self) -> None:
        """Stop the daemon as an operator does."""
        self.life.close()

    def records(self, kind: str) -> list[Record]:
        """The records of one type about the plugin, of this life of the daemon and of those before."""
        assert self.trail is not None
        return self.trail.kinds(kind, COURIER.name)

    def emitted(self) -> set[str]:
        """Events that this host has accepted, by its trail."""
        assert self.trail is not None
        return {str(record["event_id"]) for record in self.trail.kinds("event.accepted")}

    def status(self) -> dict[str, Any]:
        """The answer to ``cluster.status``; empty while there is none."""
        with contextlib.suppress(IsolatorError), Client(self.daemon.root, timeout=5) as client:
            return client.call("cluster.status")
        return {}


@dataclass
class Demo:
    """Everything the steps share."""

    root: Path
    net: Network
    hosts: Sequence[Host]
    ledger: Ledger
    secrets: Path
    platforms: Sequence[Platform] = ()
    promises: list[Promise] = field(default_factory=list)
    story: str = ""
    """An event that was accepted on a host that was cut off."""

    def promise(self, text: str, held: bool, evidence: str) -> None:
        self.promises.append(Promise(text, held, evidence))

    def wait(self, condition: Callable[[], object], seconds: float, what: str) -> None:
        """Wait until something is so; raises DemoError."""
        end = time.monotonic() + seconds
        while not condition():
            if time.monotonic() > end:
                raise DemoError(f"{what}: not within {seconds:g} s")
            time.sleep(0.05)  # hosts, servers and a log: no one of them announces it to this process

    @property
    def holder(self) -> Host:
        """The host that has the plugin, as the ledger has it."""
        return next(host for host in self.hosts if host.name == self.ledger.holder)

    def others(self, host: Host) -> list[Host]:
        """The hosts but one."""
        return [one for one in self.hosts if one is not host]

    def apart(self, host: Host) -> contextlib.AbstractContextManager[None]:
        """Cut a machine off from the others, silently; the ledger stays in its reach."""
        return self.net.cut(both_ways([host.machine], [one.machine for one in self.others(host)]))

    def quiet(self, hosts: Sequence[Host]) -> bool:
        """Whether these hosts are members without a problem, and have sent all that they have accepted."""
        found = [host.status() for host in hosts]
        return all(one and one["member"] and not one["problems"] and not one["outbox"]["events"] for one in found)

    @property
    def accepted(self) -> list[str]:
        """The events that the platforms have accepted so far."""
        return [event for platform in self.platforms for event in list(platform.accepted)]

    def history(self, places: Sequence[int] = ()) -> History:
        """The log, read once more from its beginning."""
        host = self.hosts[0]
        user, _, password = (self.secrets / "h1.secret").read_text().strip().partition(":")
        urls = addresses([one.server.listens for one in self.hosts], tls=False)

        async def read() -> History:
            return await History.read(NatsLog(Access(urls, user, password, inbox="_ISO.h1")), places)

        return netns.in_network(host.machine.fd, lambda: asyncio.run(read()))

    def folds(self) -> dict[str, Folded]:
        """The fold of each host, once they have stopped."""
        return {host.name: Folded.of(Paths.of(host.daemon.root).host_database) for host in self.hosts}
