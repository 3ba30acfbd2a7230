"""Broker of a cage without a daemon: a process of its own, started when it is needed."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import select
import socket
from collections.abc import AsyncIterator, Callable, Mapping
from typing import TYPE_CHECKING

from isolator.ipc.packet import MAX_FDS, pair, receive_packet
from isolator.linux.descriptors import close_all
from isolator.standalone.records import Records

if TYPE_CHECKING:
    from isolator.ipc.body import WithFds
    from isolator.ipc.channel import Handler
    from isolator.ipc.messages import CageSockets
    from isolator.layers.network.namespace import CageNetwork
    from isolator.paths import Paths
    from isolator.policy.host import HostConfig
    from isolator.policy.model import EffectivePolicy


@contextlib.asynccontextmanager
async def broker_for(
    network: CageNetwork, policy: EffectivePolicy, run: str, paths: Paths, config: HostConfig, records: Records
) -> AsyncIterator[None]:
    """A broker process of its own for one cage, under a free uid; takes over the network's sockets.

    A cage that may reach nothing needs nobody to carry its connections, only somebody to read and record what it was
    refused: its broker, a third of a second of another Python, is started when there is something to read.
    """
    from isolator.layers.network import namespace as network_layer

    outside = network_layer.host_listeners(policy.network)
    sockets, network.sockets = [*network.sockets, *outside], []

    async def inside(request: CageSockets) -> WithFds[None]:
        from isolator.ipc.body import WithFds

        count, version = min(max(request.count, 1), MAX_FDS), 6 if request.version == 6 else 4
        return WithFds(None, network_layer.connectors(network, count, version=version))

    def broker() -> contextlib.AbstractAsyncContextManager[None]:
        from isolator.ipc.body import by_op
        from isolator.ipc.messages import CageSockets

        handlers = by_op(CageSockets.on(inside)) if outside else {}
        return _broker(sockets, policy, run, paths, config, records, handlers)

    lazy = policy.network.mode != "public" and not policy.network.egress
    try:
        async with _when_readable(sockets, broker) if lazy else broker():
            yield
    finally:
        close_all(sockets)


@contextlib.asynccontextmanager
async def _when_readable(
    sockets: list[int], start: Callable[[], contextlib.AbstractAsyncContextManager[None]]
) -> AsyncIterator[None]:
    """Enter ``start`` when any of the sockets becomes readable, at the latest before this context is left."""
    loop = asyncio.get_running_loop()
    # Without IPv6 an unconnected Unix socket stands in for its listener; polled, it would look as if it had ended.
    watched = [fd for fd in sockets if not _is_stand_in(fd)]
    starting: asyncio.Task[None] | None = None
    async with contextlib.AsyncExitStack() as stack:

        async def begin() -> None:
            await stack.enter_async_context(start())

        def wake() -> None:
            nonlocal starting
            if starting is None:
                for fd in watched:
                    loop.remove_reader(fd)
                starting = loop.create_task(begin())

        for fd in watched:
            loop.add_reader(fd, wake)
        try:
            yield
            if starting is None and select.select(watched, (), (), 0)[0]:
                wake()
        finally:
            if starting is not None:
                await starting
            else:
                for fd in watched:
                    loop.remove_reader(fd)


def _is_stand_in(fd: int) -> bool:
    with socket.socket(fileno=os.dup(fd)) as sock:
        return sock.family == socket.AF_UNIX


@contextlib.asynccontextmanager
async def _broker(
    sockets: list[int],
    policy: EffectivePolicy,
    run: str,
    paths: Paths,
    config: HostConfig,
    records: Records,
    handlers: Mapping[str, Handler],
) -> AsyncIterator[None]:
    import subprocess

    from isolator.broker.hardening import filter_file
    from isolator.ipc.channel import Channel
    from isolator.ipc.messages import AttachCage, BrokerHello, DetachCage
    from isolator.layers.user import UidLease
    from isolator.linux.unprivileged import service_command

    lease = UidLease(config.uid_range)
    mine, theirs = pair()
    audit, audit_theirs = pair()
    program = filter_file(paths.cache)
    try:
        inherited = {"channel": theirs.fileno(), "audit": audit_theirs.fileno(), "filter": program}
        command = service_command("isolator.broker.service", lease.uid, lease.uid, inherited)
        process = subprocess.Popen(
            command, pass_fds=list(inherited.values()), stdin=subprocess.DEVNULL, cwd="/",
            env={"PATH": "/usr/sbin:/usr/bin:/sbin:/bin", "LANG": "C.UTF-8"}, start_new_session=True,
        )  # fmt: skip
    finally:
        theirs.close()
        audit_theirs.close()
        os.close(program)
    reader = _Reader(audit, records)
    channel = Channel(mine, handlers, name="broker")
    try:
        await channel.ask(BrokerHello(root=str(paths.root), config=config.model_dump(mode="json")), timeout=20)
        attach = AttachCage(run=run, plugin=policy.plugin, policy=policy.network.model_dump(mode="json"))
        await channel.ask(attach, fds=sockets, timeout=10)
        close_all(sockets)  # a kept copy would let connects hang instead of being refused when the broker dies
        yield
        with contextlib.suppress(Exception):  # it may have died; what it had to say is said
            await channel.ask(DetachCage(run=run), timeout=5)
        reader.drain()
    finally:
        channel.close()
        reader.close()
        await asyncio.to_thread(process.wait)
        lease.release()


class _Reader:
    """Takes the broker's records as the audit process would, and acknowledges them."""

    def __init__(self, sock: socket.socket, records: Records) -> None:
        sock.setblocking(False)
        self._sock, self._records, self._count = sock, records, 0
        asyncio.get_running_loop().add_reader(sock, self.drain)

    def drain(self) -> None:
        """Read what is there."""
        while self._sock.fileno() >= 0:
            try:
                packet, _ = receive_packet(self._sock)
            except BlockingIOError:
                return
            except OSError:
                packet = b""
            if not packet:
                self.close()
                return
            for line in packet.split(b"\n"):
                self._count += 1
                self._records.write(json.loads(line))
            with contextlib.suppress(OSError):
                self._sock.send(json.dumps({"acked": self._count}).encode(), socket.MSG_NOSIGNAL)

    def close(self) -> None:
        if self._sock.fileno() >= 0:
            asyncio.get_running_loop().remove_reader(self._sock)
            self._sock.close()
