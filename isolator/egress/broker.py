"""All cages of one broker, and the operations that the supervisor calls on them (docs/internals.md, S → B)."""

from __future__ import annotations

import asyncio
import os
import socket

from isolator.audit.client import AuditClient
from isolator.egress.cage import Cage, Shared
from isolator.egress.hostaddr import HostAddresses
from isolator.egress.relay import Scratch
from isolator.egress.resolver import HostResolvers
from isolator.errors import UsageError
from isolator.ipc import Message
from isolator.policy.model import NetworkPolicy

SOCKETS = 5


class Broker:
    """Holds the cages by run. ``close`` ends them all."""

    def __init__(self, audit: AuditClient) -> None:
        self.cages: dict[str, Cage] = {}
        self.audit = audit
        self._host = HostAddresses()
        self._shared = Shared(audit, self._host, HostResolvers(), Scratch())
        self._ticker = asyncio.create_task(self._tick())

    async def hello(self, message: Message) -> dict[str, object]:
        """The supervisor's first call; answered when the host's addresses are known."""
        await self._host.watch()
        return {}

    async def attach(self, message: Message) -> dict[str, object]:
        """Take over the five sockets of a run and serve it; a run that is attached already is replaced."""
        if len(message.fds) < SOCKETS:
            raise UsageError("cage.attach", f"{len(message.fds)} descriptors instead of {SOCKETS}")
        run = str(message.fields["run"])
        policy = NetworkPolicy.model_validate(message.fields["policy"])
        cage = Cage(run, str(message.fields["plugin"]), policy, self._shared)
        await self._drop(run)
        fds, message.fds = message.fds, []
        sockets = [socket.socket(fileno=fd) for fd in fds[:SOCKETS]]
        for fd in fds[SOCKETS:]:
            os.close(fd)
        self.cages[run] = cage
        await cage.start(sockets)
        return {}

    async def detach(self, message: Message) -> dict[str, object]:
        """Close a run's listeners and flows; its ``net.closed`` records are sent when this answers."""
        await self._drop(str(message.fields["run"]))
        return {}

    async def audit_source(self, message: Message) -> dict[str, object]:
        """Go on recording to a new audit process."""
        if message.fds:
            self.audit.replace(socket.socket(fileno=message.fds.pop(0)))
        return {}

    async def close(self) -> None:
        """End every cage."""
        self._ticker.cancel()
        for run in list(self.cages):
            await self._drop(run)
        self._host.close()

    async def _drop(self, run: str) -> None:
        cage = self.cages.pop(run, None)
        if cage is not None:
            await cage.close()

    async def _tick(self) -> None:
        while True:
            await asyncio.sleep(1)
            for cage in list(self.cages.values()):
                cage.tick()
