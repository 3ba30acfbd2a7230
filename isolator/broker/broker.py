"""The cages of one broker, and the operations that the supervisor calls on them (docs/internals.md, S → B)."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from dataclasses import replace
from functools import partial

from isolator.audit.client import AuditClient
from isolator.broker.host_addresses import HostAddresses
from isolator.broker.outbound import Outbound, Shared
from isolator.broker.relay import Scratch
from isolator.broker.resolver import HostResolvers
from isolator.errors import UnavailableError, UsageError
from isolator.ipc.channel import Channel, Message
from isolator.policy.destinations import Rules
from isolator.policy.model import NetworkPolicy

SOCKETS = 5
"""Sockets of a cage's own: TCP v4, TCP v6, DNS UDP, DNS TCP, NFLOG."""
FLUSH = 2.0
"""Seconds for the last records of a run to reach the audit process."""


class Broker:
    """The cages by run. ``close`` ends them all."""

    def __init__(self, audit: AuditClient) -> None:
        self._cages: dict[str, Outbound] = {}
        self.audit = audit
        self._host = HostAddresses()
        self.supervisor: Channel | None = None
        """The channel to request sockets inside cages on; set once it is there."""
        self._shared = Shared(audit, self._host, HostResolvers(), Scratch())
        self._ticker = asyncio.create_task(self._tick())

    async def hello(self, message: Message) -> dict[str, object]:
        """The supervisor's first call; answered when the host's addresses are known."""
        audit_first = message.fields.get("config", {}).get("audit", {}).get("disk_full", "stop") == "stop"
        self._shared = replace(self._shared, audit_first=audit_first)
        await self._host.watch()
        return {}

    async def attach(self, message: Message) -> dict[str, object]:
        """Take over the sockets of a run and serve it; a run that is attached already is replaced.

        Five of the cage's own, then a listener of the host's for each of the policy's ``listen`` rules.
        """
        policy = NetworkPolicy.model_validate(message.fields["policy"])
        expected = SOCKETS + len(policy.listen)
        if len(message.fds) != expected:
            raise UsageError("cage.attach", f"{len(message.fds)} descriptors instead of {expected}")
        run = str(message.fields["run"])
        rules = Rules(policy)
        await self._drop(run)
        fds, message.fds = message.fds, []
        sockets = [socket.socket(fileno=fd) for fd in fds]
        plugin, fetch = str(message.fields["plugin"]), partial(self._sockets, run)
        self._cages[run] = Outbound(run, plugin, rules, self._shared, fetch, sockets)
        return {}

    async def detach(self, message: Message) -> dict[str, object]:
        """Close a run's listeners and flows; its ``net.closed`` records are sent when this answers."""
        await self._drop(str(message.fields["run"]))
        with contextlib.suppress(TimeoutError):  # without an audit process they wait for the next one
            async with asyncio.timeout(FLUSH):
                await self.audit.flushed()
        return {}

    async def audit_source(self, message: Message) -> dict[str, object]:
        """Switch to a new audit process."""
        if message.fds:
            self.audit.reconnect(socket.socket(fileno=message.fds.pop(0)))
        return {}

    async def close(self) -> None:
        """End every cage."""
        self._ticker.cancel()
        for run in list(self._cages):
            await self._drop(run)
        self._host.close()

    async def _sockets(self, run: str, count: int, version: int) -> list[socket.socket]:
        """Unconnected sockets inside a run's network, from the supervisor; raises IsolatorError."""
        if self.supervisor is None:
            raise UnavailableError("the supervisor", "is not there yet", "try again")
        answer = await self.supervisor.call("cage.sockets", run=run, count=count, version=version, timeout=5)
        fds, answer.fds = answer.fds, []
        return [socket.socket(fileno=fd) for fd in fds]

    async def _drop(self, run: str) -> None:
        outbound = self._cages.pop(run, None)
        if outbound is not None:
            await outbound.close()

    async def _tick(self) -> None:
        while True:
            await asyncio.sleep(1)
            for outbound in list(self._cages.values()):
                outbound.tick()
