"""Three machines with daemons and three with servers of NATS, in a network whose ways can be cut."""

from __future__ import annotations

import asyncio
import contextlib
import json
import shutil
import subprocess
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from host.client.client import Client
from host.cluster.access import STREAM
from host.cluster.log import LogUnavailableError
from host.cluster.nats import Access, NatsLog, addresses
from isolator.errors import IsolatorError
from isolator.linux import netns
from tests.support.nats_servers import Place, Server, nats_servers
from tests.support.platforms import Platform
from tests.support.routed import Machine, Network, network
from tests.support.timeouts import seconds
from tests.system.daemon import Daemon, daemon, wait_for

HOSTS = 3
_CLUSTER = """
[cluster]
name = "{name}"
servers = [{servers}]
tls = false
credentials = "{secret}"
"""


@dataclass(frozen=True)
class Host:
    """A daemon of the cluster, by its name there, and its machine."""

    name: str
    daemon: Daemon
    machine: Machine

    def status(self) -> dict[str, Any]:
        """The answer to ``cluster.status``; empty while there is none."""
        with contextlib.suppress(IsolatorError), Client(self.daemon.root, timeout=seconds(5)) as client:
            return client.call("cluster.status")
        return {}

    def has_sent_all(self) -> bool:
        """Whether the log has every event that it has accepted."""
        found = self.status()
        return bool(found and not found["outbox"]["events"])


@dataclass(frozen=True)
class Site:
    """The whole of it; ``secrets`` are USER:PASSWORD of the servers' users, by name, ``admin`` among them."""

    network: Network
    hosts: Sequence[Host]
    servers: Sequence[Server]
    secrets: dict[str, str]
    emitting: dict[str, Platform] = field(default_factory=dict)
    """The platforms, by their hosts' names."""

    @property
    def roots(self) -> dict[str, Path]:
        """The daemons' roots, by name."""
        return {host.name: host.daemon.root for host in self.hosts}

    @property
    def server_machines(self) -> list[Machine]:
        """The machines of the servers, in their order."""
        return self.network.machines[HOSTS:]

    def log(self, host: str) -> NatsLog:
        """The cluster's log as a host reads it; works in the network of a machine alone."""
        user, _, password = self.secrets[host].partition(":")
        urls = addresses([server.listens for server in self.servers], tls=False)
        return NatsLog(Access(urls, user, password, inbox=f"_ISO.{host}"))

    def add(self, plugin: Path) -> None:
        """Have a plugin, with the policy beside its folder, on every host."""
        for host in self.hosts:
            policies = host.daemon.root / "etc/isolator/policies"
            policies.mkdir(parents=True, exist_ok=True)
            shutil.copy(plugin.with_suffix(".toml"), policies)
            host.daemon.cli("plugin", "add", str(plugin), "--yes")

    def emits_nothing(self, host: Host) -> contextlib.AbstractContextManager[object]:
        """A time in which a host is given no event."""
        platform = self.emitting.get(host.name)
        return platform.silent() if platform is not None else contextlib.nullcontext()

    def replicas_are_current(self) -> bool:
        """Whether every server has all that the log has."""
        info = netns.in_network(self.hosts[0].machine.fd, lambda: asyncio.run(_info(self.log("h1"))))
        found = (info.get("cluster") or {}).get("replicas") or []
        return len(found) == HOSTS - 1 and all(one.get("current") and not one.get("offline") for one in found)

    def until_quiet(self, patience: float) -> None:
        """Wait until every host is a member without a problem and has sent all that it accepted."""
        for host in self.hosts:

            def is_quiet(host: Host = host) -> bool:
                found = host.status()
                return bool(found and found["member"] and not found["problems"] and not found["outbox"]["events"])

            wait_for(
                is_quiet,
                patience,
                lambda host=host: f"{host.name} is no quiet member: {host.status() or host.daemon.log}",
            )


async def _info(log: NatsLog) -> dict[str, Any]:
    """The stream as its leader describes it; empty while none does."""
    try:
        with contextlib.suppress(LogUnavailableError):
            found: dict[str, Any] = json.loads((await log._ask(f"$JS.API.STREAM.INFO.{STREAM}", b"")).data)
            return found
        return {}
    finally:
        await log.close()


@contextlib.contextmanager
def site(folder: Path, host_toml: str, disk: str = "200MB") -> Iterator[Site]:
    """Daemons that are members of one cluster on three servers. ``disk`` is how much each server may keep."""
    with contextlib.ExitStack() as stack:
        joined = stack.enter_context(network(2 * HOSTS))
        machines, apart = joined.machines[:HOSTS], joined.machines[HOSTS:]
        hosts = [
            Host(f"h{at}", stack.enter_context(daemon(host_toml=host_toml, network=machine.fd, start=False)), machine)
            for at, machine in enumerate(machines, 1)
        ]
        users = folder / "users"
        first = hosts[0].daemon
        first.cli("cluster", "users", "--dir", str(users), *(host.name for host in hosts))
        places = [Place(machine.address, machine.enter) for machine in apart]
        more = (users / "users.conf").read_text()
        servers = stack.enter_context(
            nats_servers(folder / "nats", HOSTS, first_port=4222, more=more, disk=disk, places=places)
        )
        listens = [server.listens for server in servers]
        _make_log(first, machines[0], listens, users / "admin.secret", disk)
        for at, host in enumerate(hosts):
            _configure(host, listens[at:] + listens[:at], (users / f"{host.name}.secret").read_bytes())
            host.daemon.start(seconds(90))
        secrets = {path.stem: path.read_text().strip() for path in users.glob("*.secret")}
        made = Site(joined, hosts, servers, secrets)
        made.until_quiet(seconds(60))
        yield made


def _make_log(d: Daemon, machine: Machine, servers: Sequence[str], admin: Path, disk: str) -> None:
    most = str(int(disk.removesuffix("MB")) * 800_000)
    words = [word for server in servers for word in ("--server", server)]
    subprocess.run(
        [*machine.enter, "isolator", "--root", d.root, "cluster", "init", *words, "--no-tls", "--max-bytes", most,
         "--credentials", admin],
        check=True, capture_output=True, text=True,
    )  # fmt: skip


def _configure(host: Host, servers: Sequence[str], secret: bytes) -> None:
    etc = host.daemon.root / "etc/isolator"
    (path := etc / "cluster.secret").touch(0o600)
    path.write_bytes(secret)
    quoted = ", ".join(f'"{server}"' for server in servers)
    with (etc / "host.toml").open("a") as file:
        file.write(_CLUSTER.format(name=host.name, servers=quoted, secret=path))
