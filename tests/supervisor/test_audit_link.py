"""Links to the audit process: whoever records has a socket to the one that runs now."""

from __future__ import annotations

import asyncio
import os
import socket
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

from isolator.ipc.body import Message, by_op
from isolator.ipc.channel import Channel, pair
from isolator.ipc.messages import AuditHello, AuditReady, NewAuditSocket, RecordSource, ServeMetrics
from isolator.paths import Paths
from isolator.policy.host import HostConfig
from isolator.supervisor.audit_link import AuditLink
from isolator.supervisor.service import ChildProcess, Generation, ServiceSpec


class _Client:
    """The supervisor's own sender."""

    def reconnect(self, sock: socket.socket) -> None:
        sock.close()

    def record(self, record: object) -> None:
        pass


class _Process:
    """A process of a service: the supervisor's end is ``generation``; notes the notifications that come."""

    def __init__(self, name: str) -> None:
        self.ops: asyncio.Queue[str] = asyncio.Queue()
        mine, theirs = pair()
        self.generation = Generation(
            cast(Any, SimpleNamespace(pid=os.getpid())), Channel(mine, name=name), cast(Any, None)
        )
        self.channel = Channel(theirs, name="supervisor")
        for op in (NewAuditSocket.op, RecordSource.op, ServeMetrics.op):
            self.channel.handle(op, self._note)

    async def _note(self, message: Message) -> None:
        self.ops.put_nowait(message.fields["op"])

    def close(self) -> None:
        self.generation.channel.close()
        self.channel.close()


def _service(name: str, process: _Process) -> ChildProcess:
    nobody: Any = None
    service = ChildProcess(ServiceSpec(name, "", 0, 0), nobody, nobody, nobody, nobody)
    service.current, service.starts = process.generation, 1
    service.up.set()
    return service


async def test_process_that_takes_the_place_of_another_gets_the_socket_that_was_made_meanwhile(
    shared_dir: Path,
) -> None:
    """The audit process dies while the host is exchanged: a socket for the process that leaves would be nobody's."""
    paths, old, new, its = Paths.of(shared_dir), _Process("host"), _Process("host"), _Process("audit")
    paths.run.mkdir(parents=True)

    async def hello(_: AuditHello) -> AuditReady:
        return AuditReady(blocked=None, ended=True, runs={})

    its.channel.handle(*by_op(AuditHello.on(hello)).popitem())
    host, audit = _service("host", old), _service("audit", its)
    audit.starts = 2
    link = AuditLink(audit, cast(Any, _Client()), (host,), paths, HostConfig())
    try:
        host.hold()
        await link.introduce(its.generation.channel)
        host.go_on(new.generation)
        assert await asyncio.wait_for(new.ops.get(), 60) == NewAuditSocket.op
        assert old.ops.empty()
    finally:
        for process in (old, new, its):
            process.close()
