"""First bytes of one cage's connections, compared with the names that they were opened for (``guard``, ``gate``)."""

from __future__ import annotations

import asyncio
from functools import partial

from isolator.broker import guard
from isolator.broker.flow import Flow
from isolator.broker.gate.gate import Gate, GateState
from isolator.broker.gate.looking import Looking
from isolator.broker.guard import Denied
from isolator.broker.sniff import Hello
from isolator.ipc.fence import Fence
from isolator.linux.boottime import boottime
from isolator.linux.readable import receive, resolve
from isolator.policy.denial import DenialRule
from isolator.policy.model import NetworkPolicy

FIRST_BYTES = 15.0
"""Seconds for a client to send its first bytes where they are compared before anything passes, or to end a request."""


class FirstBytes:
    """Makes the gates of one cage's connections, and reads what has to be compared before a connection is joined."""

    def __init__(self, policy: NetworkPolicy, fence: Fence) -> None:
        self._policy, self._fence = policy, fence
        self._looking = Looking()

    def gate(self, flow: Flow) -> Gate:
        """The gate of a connection to a name."""
        return Gate(partial(self._judge, flow), strict=guard.speaks_first(flow.port), work=self._looking)

    def gate_again(self, flow: Flow, state: GateState) -> Gate:
        """The gate of a connection that another broker has carried."""
        return Gate.taken_over(state, partial(self._judge, flow), self._looking)

    def _judge(self, flow: Flow, hello: Hello) -> None:
        assert flow.name is not None
        rule = guard.objection(
            hello, flow.name, flow.port, allow_no_sni=self._policy.allow_no_sni, allow_ech=self._policy.allow_ech
        )
        if rule is not None:
            raise Denied(rule, asked=list(hello.names[:4]))

    async def read(self, flow: Flow, gate: Gate) -> bytes:
        """Read until the gate lets bytes pass; returns these; raises Denied or OSError."""
        unread = [flow.first] if flow.first else []
        while True:
            try:
                async with asyncio.timeout(FIRST_BYTES):
                    return await self._until_passing(flow, gate, unread)
            except TimeoutError:
                if not self._fence.closed_since(boottime() - FIRST_BYTES):
                    # To pass on half of the compared bytes after a while would be a way round the comparison.
                    raise Denied(DenialRule.INCOMPLETE if flow.first else DenialRule.SILENT) from None

    async def _until_passing(self, flow: Flow, gate: Gate, unread: list[bytes]) -> bytes:
        """Read; ``unread``: bytes that another broker has read."""
        first = b""
        while not gate.passing:
            if self._looking.spent or self._looking.over:
                turn = asyncio.get_running_loop().create_future()
                self._looking.turn(partial(resolve, turn))
                await turn
            again = bool(unread)
            part = unread.pop() if again else await receive(flow.client, self._looking.piece)
            if not part:
                if flow.first:
                    raise Denied(DenialRule.INCOMPLETE)
                return b""
            flow.first += b"" if again else part
            try:
                first = bytes(gate.feed(part))
            finally:
                gate.charge()
            if gate.pause:
                await asyncio.sleep(gate.pause)
        return first
