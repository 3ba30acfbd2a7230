"""A pretend internet, a pretend host and real cages, all in network namespaces of this process.

    internet ns  93.184.216.34, 1.2.3.4 …, 169.254.169.254, 10.9.9.9   DNS, HTTP, TLS, echo servers
        | veth
    host ns      45.0.0.2/24, gateway 45.0.0.1; the broker runs here, as an unprivileged user
    cage ns      made by ``isolator.layers.network.namespace.prepare``; clients run here, as another unprivileged user

Servers are threads of the test whose sockets were made inside the internet namespace. Nothing leaves the machine:
neither namespace has an interface other than ``lo`` and the veth between them.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from isolator.broker.hardening import filter_file
from isolator.ipc.channel import Channel, Message, pair
from isolator.ipc.messages import BrokerHello, Leave, StatePart
from isolator.ipc.succession import Passage
from isolator.layers.network import namespace as network
from isolator.linux import netns
from isolator.policy.model import NetworkPolicy
from tests.support.internet_servers import (
    GATEWAY,
    GATEWAY6,
    HOST,
    HOST6,
    INSIDE6,
    METADATA,
    OTHER,
    PRIVATE,
    WEB,
    WEB6,
    Internet,
    run_in,
)

BROKER_UID, CLIENT_UID = 64901, 64902
PRELUDE = """
import socket, ssl, time, urllib.request, errno, sys, struct
CA = 'CA_FILE'
def name_of(e):
    return errno.errorcode.get(getattr(e, 'errno', None) or 0, type(e).__name__)
def attempt(f, *a, **k):
    try:
        return f(*a, **k)
    except OSError as e:
        e = getattr(e, 'reason', e)
        return e.args[0] if isinstance(e, str) else name_of(e)
def get(url, **k):
    context = ssl.create_default_context(cafile=CA)
    request = urllib.request.Request(url, **k)
    return urllib.request.urlopen(request, timeout=10, context=context).read().decode()
def tcp(host, port, timeout=5):
    return socket.create_connection((host, port), timeout)
"""
"""Helpers of every client; ``CA_FILE`` is replaced by the pretend authority's certificate."""


@dataclass
class PretendInternet:
    """Namespaces, servers and a directory that every user can read; shared by the tests of a module."""

    directory: Path
    internet: Internet
    host_fd: int

    def python(self, *arguments: str) -> list[str]:
        """A command that runs this interpreter with the packages in sight, for any user."""
        boot = (
            f"import sys, runpy; sys.path.insert(0, {str(self.directory)!r}); "
            "module = sys.argv.pop(1); runpy.run_module(module, run_name='__main__', alter_sys=True)"
        )
        return [sys.executable, "-I", "-c", boot, *arguments]


@contextlib.contextmanager
def pretend_internet() -> Iterator[PretendInternet]:
    """Build everything, and remove it again whatever happens."""
    directory = Path(tempfile.mkdtemp(prefix="isolator-egress-"))
    directory.chmod(0o755)
    shutil.copy(Path(__file__).parents[1] / "broker/weakened.py", directory)
    (directory / "resolv.conf").write_text(f"nameserver {network.RESOLVER}\noptions timeout:3 attempts:1\n")
    (directory / "host-resolv.conf").write_text(f"nameserver {WEB}\n")
    internet = Internet(directory)
    host_fd = netns.in_new_network(netns.current_network)
    try:
        run_in(host_fd, "ip", "link", "add", "up0", "type", "veth", "peer", "name", "down0",
               "netns", f"/proc/{os.getpid()}/fd/{internet.fd}")  # fmt: skip
        run_in(host_fd, "ip", "link", "set", "lo", "up")
        run_in(internet.fd, "ip", "link", "set", "lo", "up")
        run_in(host_fd, "ip", "addr", "add", f"{HOST}/24", "dev", "up0")
        run_in(host_fd, "ip", "addr", "add", f"{HOST6}/64", "dev", "up0", "nodad")
        run_in(internet.fd, "ip", "addr", "add", f"{GATEWAY}/24", "dev", "down0")
        run_in(internet.fd, "ip", "addr", "add", f"{GATEWAY6}/64", "dev", "down0", "nodad")
        run_in(host_fd, "ip", "link", "set", "up0", "up")
        run_in(internet.fd, "ip", "link", "set", "down0", "up")
        for address in (WEB, OTHER, METADATA, PRIVATE):
            run_in(internet.fd, "ip", "addr", "add", f"{address}/32", "dev", "lo")
        for address in (WEB6, *INSIDE6):
            run_in(internet.fd, "ip", "-6", "addr", "add", f"{address}/128", "dev", "lo", "nodad")
        run_in(host_fd, "ip", "route", "add", "default", "via", GATEWAY)
        run_in(host_fd, "ip", "-6", "route", "add", "default", "via", GATEWAY6)
        internet.start()
        internet.serve_host(host_fd)
        yield PretendInternet(directory, internet, host_fd)
    finally:
        with contextlib.suppress(AttributeError):
            internet.stop()
        os.close(host_fd)
        shutil.rmtree(directory)


@dataclass
class BrokerProcess:
    """A running broker and the supervisor's end of its channel; ``records`` are those that it sent to the trail."""

    pretend: PretendInternet
    process: asyncio.subprocess.Process
    channel: Channel
    audit: socket.socket
    records: list[dict[str, Any]] = field(default_factory=list)
    acknowledge: bool = True
    gather: float = 0.0
    """Seconds from one commit to the next, if they are read and acknowledged as the writer does: once a commit."""
    cages: dict[str, CageNet] = field(default_factory=dict)
    fences: dict[str, float] = field(default_factory=dict)
    """Deadlines that the next process is told of."""
    _owed: asyncio.TimerHandle | None = None

    @classmethod
    async def start(cls, pretend: PretendInternet, *, off: Sequence[str] = ()) -> BrokerProcess:
        """Start it in the host namespace, without any privilege; ``off`` names checks it runs without (weakened.py)."""
        audit, audit_theirs = pair()
        process, channel = await _spawn(
            pretend, "weakened" if off else "isolator.broker.service", *off, audit=audit_theirs
        )
        audit_theirs.close()
        broker = cls(pretend, process, channel, audit)
        channel.handle("cage.sockets", broker._sockets)
        audit.setblocking(False)
        asyncio.get_running_loop().add_reader(audit, broker._record)
        await channel.call("hello", root="/", config={}, timeout=20)
        return broker

    async def renew(self) -> None:
        """Put another process in the place of this one, as the supervisor does; it goes on with everything."""
        process, channel = await _spawn(self.pretend, "isolator.broker.service", audit=None)
        channel.handle("cage.sockets", self._sockets)
        await channel.call("alive", timeout=20)
        passage = Passage(channel)
        op, handler = StatePart.on_fds(passage.part)
        self.channel.handle(op, handler)
        left = await self.channel.ask(Leave(), timeout=10)
        assert left.parts == passage.parts > 0, left
        await channel.ask(BrokerHello(root="/", config={}, parts=left.parts, fences=self.fences), timeout=20)
        self.channel.close()
        await self.process.wait()
        self.process, self.channel = process, channel

    def _record(self) -> None:
        """Read every packet that has come; off the loop at the end of the stream."""
        with contextlib.suppress(BlockingIOError, ConnectionError):
            while packet := self.audit.recv(200_000):
                self.records += [json.loads(line) for line in packet.splitlines()]
                if self.acknowledge and not self.gather:
                    self._acknowledge()
            asyncio.get_running_loop().remove_reader(self.audit)
        if self.gather and self._owed is None:
            loop = asyncio.get_running_loop()
            loop.remove_reader(self.audit)
            self._owed = loop.call_later(self.gather, self._commit, len(self.records))

    def _commit(self, before: int) -> None:
        """Read again what has come since ``before`` records were there; nothing: be woken by the next."""
        self._record()
        if self.acknowledge:
            self._acknowledge()
        loop, self._owed = asyncio.get_running_loop(), None
        if len(self.records) > before:
            self._owed = loop.call_later(self.gather, self._commit, len(self.records))
        else:
            loop.add_reader(self.audit, self._record)

    def _acknowledge(self) -> None:
        with contextlib.suppress(OSError):
            self.audit.send(json.dumps({"acked": len(self.records)}).encode())

    async def quiet(self, seconds: float = 0.5) -> None:
        """Wait until no record has come for some time: everything that was open has ended and is recorded."""
        while True:
            seen = len(self.records)
            await asyncio.sleep(seconds)
            if len(self.records) == seen:
                return

    async def detach(self, run: str) -> None:
        """End a run and read its last records, which the broker sends before it answers."""
        await self.channel.call("cage.detach", run=run, timeout=5)
        self._record()

    async def new_audit(self) -> None:
        """Replace the audit process, as the supervisor does when it died; its records are counted afresh."""
        loop = asyncio.get_running_loop()
        loop.remove_reader(self.audit)
        self.audit.close()
        self.records.clear()
        self.acknowledge = True
        self.audit, theirs = pair()
        self.audit.setblocking(False)
        loop.add_reader(self.audit, self._record)
        await self.channel.call("audit.source", fds=[theirs.fileno()], timeout=5)
        theirs.close()

    async def _sockets(self, message: Message) -> Message:
        """The supervisor's part of a connection that comes in."""
        cage = self.cages[message.fields["run"]]
        fds = network.connectors(cage.network, message.fields["count"], version=message.fields["version"])
        return Message({}, fds)

    async def wait_for(self, type: str, /, timeout: float = 10, **fields: Any) -> dict[str, Any]:
        """The data of the first record of a type with these fields; fails with all records when none comes."""
        end = asyncio.get_running_loop().time() + timeout
        while asyncio.get_running_loop().time() < end:
            for record in self.records:
                data = record["data"]
                if record["type"] == type and all(data.get(key) == value for key, value in fields.items()):
                    return dict(data)
            await asyncio.sleep(0.02)
        raise AssertionError(f"no {type} with {fields} among {self.records}")

    async def stop(self) -> None:
        """Close the channel and wait for the process to end by itself."""
        self.channel.close()
        try:
            async with asyncio.timeout(10):
                code = await self.process.wait()
        except TimeoutError:
            self.process.kill()
            await self.process.wait()
            raise
        if self._owed is not None:
            self._owed.cancel()
        asyncio.get_running_loop().remove_reader(self.audit)
        self.audit.close()
        assert code == 0 or code < 0, f"the broker ended with {code}"


async def _spawn(
    pretend: PretendInternet, module: str, *arguments: str, audit: socket.socket | None
) -> tuple[asyncio.subprocess.Process, Channel]:
    """A broker process in the host namespace, without any privilege, and our end of its channel."""
    ours, theirs = pair()
    program = filter_file(pretend.directory / "cache")
    inherited = {"channel": theirs.fileno(), "filter": program} | ({"audit": audit.fileno()} if audit else {})
    process = await asyncio.create_subprocess_exec(
        "nsenter", f"--net=/proc/{os.getpid()}/fd/{pretend.host_fd}",
        "unshare", "--mount", "sh", "-c",
        f"mount --bind {pretend.directory}/host-resolv.conf /etc/resolv.conf && exec \"$@\"", "sh",
        "setpriv", f"--reuid={BROKER_UID}", f"--regid={BROKER_UID}", "--clear-groups",
        "--bounding-set=-all", "--inh-caps=-all", "--no-new-privs",
        *pretend.python(module, *arguments, *(w for name, fd in inherited.items() for w in (f"--{name}-fd", str(fd)))),
        pass_fds=list(inherited.values()),
    )  # fmt: skip
    theirs.close()
    os.close(program)
    return process, Channel(ours, name="broker")


@dataclass
class CageNet:
    """A cage's network attached to a broker, and clients inside it."""

    pretend: PretendInternet
    broker: BrokerProcess
    network: network.CageNetwork
    policy: NetworkPolicy
    run: str

    @classmethod
    async def attach(cls, broker: BrokerProcess, policy: NetworkPolicy, run: str = "r1") -> CageNet:
        """Prepare a network and hand its sockets to the broker, as the supervisor does."""
        made = await asyncio.to_thread(network.prepare, policy)
        cage = cls(broker.pretend, broker, made, policy, run)
        await cage.hand_over(broker)
        return cage

    async def hand_over(self, broker: BrokerProcess) -> None:
        """Give the sockets to a broker and close ours."""
        self.broker = broker
        broker.cages[self.run] = self
        fields = {"run": self.run, "plugin": "tester", "policy": self.policy.model_dump(mode="json")}
        outside = netns.in_network(self.pretend.host_fd, lambda: network.host_listeners(self.policy))
        await broker.channel.call("cage.attach", fds=[*self.network.sockets, *outside], timeout=5, **fields)
        network.close_sockets(self.network)
        for fd in outside:
            os.close(fd)

    async def client(self, code: str, timeout: float = 30) -> str:
        """Run Python code inside, as an unprivileged user with the cage's resolv.conf; returns its output."""
        return await run_client(self.pretend, self.network.netns_fd, "resolv.conf", code, timeout)

    async def detach(self) -> None:
        """End the cage's attachment and free the network."""
        with contextlib.suppress(Exception):
            await self.broker.channel.call("cage.detach", run=self.run, timeout=5)
        network.release(self.network)


async def run_client(pretend: PretendInternet, fd: int, resolv: str, code: str, timeout: float = 30) -> str:
    """Run Python code in a network namespace, as an unprivileged user with a resolv.conf; returns its output."""
    process = await asyncio.create_subprocess_exec(
        "nsenter", f"--net=/proc/{os.getpid()}/fd/{fd}",
        "unshare", "--mount", "sh", "-c",
        f"mount --bind {pretend.directory}/{resolv} /etc/resolv.conf && exec \"$@\"", "sh",
        "setpriv", f"--reuid={CLIENT_UID}", f"--regid={CLIENT_UID}", "--clear-groups",
        "--bounding-set=-all", "--inh-caps=-all", "--no-new-privs",
        sys.executable, "-I", "-c", PRELUDE.replace("CA_FILE", str(pretend.directory / "ca.pem")) + code,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    try:
        async with asyncio.timeout(timeout):
            out, err = await process.communicate()
    except (TimeoutError, asyncio.CancelledError):
        process.kill()
        await process.wait()
        raise
    assert process.returncode == 0, err.decode()
    return out.decode().strip()


__all__ = ["WEB", "BrokerProcess", "CageNet", "PretendInternet", "pretend_internet"]
