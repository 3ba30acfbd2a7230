"""The cages of one broker, and the operations that the supervisor calls on them (docs/internals.md, S → B)."""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
from dataclasses import replace
from functools import lru_cache, partial

from isolator.audit.client import AuditClient
from isolator.broker.host_addresses import HostAddresses
from isolator.broker.nat64 import Nat64
from isolator.broker.outbound import CageState, Outbound
from isolator.broker.relay import Scratch
from isolator.broker.resolver import HostResolvers
from isolator.broker.shared import Shared
from isolator.errors import UsageError
from isolator.ipc import messages
from isolator.ipc.body import Body
from isolator.ipc.channel import Channel
from isolator.ipc.fence import Fence
from isolator.ipc.formats import Formats
from isolator.ipc.succession import Departure, SenderState, Succession
from isolator.ipc.tasks import essential
from isolator.policy.destinations import Rules
from isolator.policy.model import NetworkPolicy

SOCKETS = 5
"""Sockets of a cage's own: TCP v4, TCP v6, DNS UDP, DNS TCP, NFLOG."""
SETTLE, SETTLE_BEAT = 2.0, 0.005
"""Seconds for requests under way to end before the cages are handed on, and between two looks at that."""
FLUSH = 2.0
"""Seconds for the last records of a run to reach the audit process."""


class BrokerState(Body):
    """Everything that a broker knows, on its way to another that takes its place.

    Whoever changes it, or a type in it, in whatever way, makes the next format of it.
    """

    audit: SenderState
    cages: tuple[CageState, ...]


FORMATS = Formats(BrokerState, 1)


@lru_cache(maxsize=256)
def _rules(plugin: str, policy: str) -> Rules:
    """The rules of a policy, as JSON, kept for the plugin's next run; not another's: they remember what was asked."""
    return Rules(NetworkPolicy.model_validate(json.loads(policy)))


class Broker:
    """The cages by run. ``close`` ends them all. Sockets inside cages come from ``supervisor``."""

    def __init__(self, audit: AuditClient, supervisor: Channel) -> None:
        self.audit, self._supervisor = audit, supervisor
        self.succession = Succession(FORMATS)
        self._cages: dict[str, Outbound] = {}
        self._fences: dict[str, Fence] = {}
        """By plugin."""
        self._host = HostAddresses()
        resolvers = HostResolvers()
        self._nat64 = Nat64(resolvers)
        self._shared = Shared(audit, self._host, resolvers, self._nat64, Scratch())
        self._ticker = essential(self._shared.ticks.run(), "ticks of the broker")

    async def hello(self, request: messages.BrokerHello) -> None:
        """The supervisor's first call; answered when the host's addresses are known."""
        audit_first = request.config.get("audit", {}).get("disk_full", "stop") == "stop"
        self._shared = replace(self._shared, audit_first=audit_first)
        self._fences = {plugin: Fence(until) for plugin, until in request.fences.items()}
        await self._host.watch()
        if request.parts:
            state, descriptors = self.succession.unpack(request.parts)
            with descriptors:
                self.audit.take_over(state.audit, descriptors)
                for one in state.cages:
                    fetch = partial(self._sockets, one.run)
                    fence = self._fence(one.plugin)
                    self._cages[one.run] = Outbound.taken_over(one, fence, self._shared, fetch, descriptors)

    async def leave(self, _: messages.Leave) -> messages.Left:
        """Hand every cage on to another broker: its sockets, its connections, and those that are not decided yet."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(SETTLE):
                while self._supervisor.serves_beside({messages.Leave.op}):  # noqa: ASYNC110 # each is answered soon
                    await asyncio.sleep(SETTLE_BEAT)
        self._ticker.cancel()
        departure = Departure()
        cages, self._cages = list(self._cages.values()), {}
        states = [await cage.pass_on(departure) for cage in cages]
        state = BrokerState(audit=self.audit.pass_on(departure), cages=tuple(states))
        return messages.Left(parts=await self.succession.send(state, departure, self._supervisor))

    async def attach(self, request: messages.AttachCage, fds: list[int]) -> None:
        """Take over the sockets of a run and serve it; a run that is attached already is replaced.

        Five of the cage's own, then a listener of the host's for each of the policy's ``listen`` rules.
        """
        rules = _rules(request.plugin, json.dumps(request.policy))
        expected = SOCKETS + len(rules.policy.listen)
        if len(fds) != expected:
            raise UsageError(request.op, f"{len(fds)} descriptors instead of {expected}")
        run = request.run
        await self._drop(run)
        sockets = [socket.socket(fileno=fd) for fd in fds]
        fds.clear()
        fetch, fence = partial(self._sockets, run), self._fence(request.plugin)
        self._cages[run] = Outbound(run, request.plugin, rules, fence, self._shared, fetch, sockets)

    async def fence(self, request: messages.FencePlugin) -> None:
        """Move the deadline of a plugin."""
        self._fence(request.plugin).move(request.until)
        if request.until is None and all(cage.plugin != request.plugin for cage in self._cages.values()):
            del self._fences[request.plugin]

    def _fence(self, plugin: str) -> Fence:
        return self._fences.setdefault(plugin, Fence())

    async def detach(self, request: messages.DetachCage) -> None:
        """Close a run's listeners and flows; its ``net.closed`` records are sent when this answers."""
        await self._drop(request.run)
        with contextlib.suppress(TimeoutError):  # without an audit process they wait for the next one
            async with asyncio.timeout(FLUSH):
                await self.audit.flushed()

    async def audit_source(self, _: messages.NewAuditSocket, fds: list[int]) -> None:
        """Switch to a new audit process."""
        self.audit.reconnect(socket.socket(fileno=fds.pop()))

    async def close(self) -> None:
        """End every cage."""
        self._ticker.cancel()
        for run in list(self._cages):
            await self._drop(run)
        await self._nat64.close()
        self._host.close()

    async def _sockets(self, run: str, count: int, version: int) -> list[socket.socket]:
        """Request unconnected sockets inside a run's network; raises IsolatorError."""
        answer = await self._supervisor.ask_fds(messages.CageSockets(run=run, count=count, version=version), timeout=5)
        return [socket.socket(fileno=fd) for fd in answer.fds]

    async def _drop(self, run: str) -> None:
        outbound = self._cages.pop(run, None)
        if outbound is not None:
            await outbound.close()
