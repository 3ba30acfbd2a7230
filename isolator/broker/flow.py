"""Flows: connections through the broker, in either direction, with their records.

All records of a connection carry the same ``flow``, so that its end belongs to the same event as its beginning. They
carry the time at which it *began* (``happened_ns``), because a record is written only once the other side has answered.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import itertools
import os
import socket
import time
from collections.abc import Callable, Coroutine
from dataclasses import dataclass, field
from functools import partial
from ipaddress import ip_address
from typing import Any, Literal, NotRequired, Self, TypedDict

from isolator.audit.schema import NetClosed, NetConnect, NetDenied
from isolator.broker.gate.gate import Gate, GateState
from isolator.broker.guard import Denied
from isolator.broker.relay import Pipe, PipeState, Scratch, reset, tune
from isolator.broker.turns import Turns
from isolator.broker.virtual import Entry
from isolator.ipc.body import Body
from isolator.ipc.fence import Fence
from isolator.ipc.succession import Departure, Descriptors, to_bytes, to_text
from isolator.ipc.tasks import begun, report
from isolator.policy.addresses import Address

OnEnd = Callable[["Flow", BaseException | None], None]
"""Called with a flow that has ended, and why unless in order: OSError, Denied, CancelledError."""

_session = os.urandom(3).hex()
_numbers = itertools.count(1)


class Endpoint(TypedDict):
    """Fields of a record about one connection."""

    name: str | None
    address: str
    port: int
    direction: NotRequired[Literal["in"]]
    cage_port: NotRequired[int]


class _Way(TypedDict):
    via: NotRequired[str]


class DescribedError(OSError):
    """An OSError whose text says in the trail why the other side could not be reached."""


class FlowState(Body):
    """A connection on its way to another broker."""

    client: int
    server: int
    """-1: it is not decided yet, and is judged anew"""
    address: str
    port: int
    started: float
    name: str | None
    rule: str
    dialled: str | None
    cage_port: int | None
    via: str
    began: int
    id: str
    first: str
    """bytes of the client's that were read and not passed on, as it is not decided"""
    pipes: tuple[PipeState, ...]


@dataclass(eq=False)
class Flow:
    """One connection, from accept to the last record: ``client`` connected, ``server`` was dialled for it."""

    client: socket.socket
    address: Address
    port: int
    started: float
    """On the event loop's clock, in seconds."""
    name: str | None = None
    rule: str = ""
    entry: Entry | None = None
    dialled: Address | None = None
    server: socket.socket | None = None
    cage_port: int | None = None
    """The cage's own port, for a connection that comes in from outside."""
    pipes: list[Pipe] = field(default_factory=list)
    roomy: bool = False
    """Whether its outer buffers may grow (``buffers``)."""
    via: str = ""
    """The proxy that it goes through."""
    recorded: bool = False
    tuned: bool = False
    """Whether the way out has the options of a connection that lasts."""
    left: bool = False
    """It was handed to another broker: nothing is to be closed or recorded here."""
    first: bytes = b""
    """Bytes of the client's that were read before it was decided."""
    before: tuple[PipeState, ...] = ()
    """The pipes of another broker's, which go on here."""
    reason: str = "closed"
    began: int = field(default_factory=time.monotonic_ns)
    id: str = field(default_factory=lambda: f"{_session}.{next(_numbers)}")

    def endpoint(self) -> Endpoint:
        """The fields that every record about this connection has; the address is the far end's."""
        data: Endpoint = {"name": self.name, "address": str(self.dialled or self.address), "port": self.port}
        return data if self.cage_port is None else {**data, "direction": "in", "cage_port": self.cage_port}

    def opened(self) -> NetConnect:
        """The record of a connection that is carried from now on."""
        return NetConnect(**self.endpoint(), **self._way(), verdict="allowed", rule=self.rule, flow=self.id)

    def unreachable(self) -> NetConnect:
        """The record of a connection whose other side could not be reached."""
        return NetConnect(**self.endpoint(), **self._way(), verdict="failed", rule=self.rule, error=self.reason)

    def _way(self) -> _Way:
        return {"via": self.via} if self.via else {}

    def closed(self, now: float) -> NetClosed:
        """The record of the end; bytes count as the plugin sees them."""
        forth, back = (pipe.total for pipe in self.pipes) if self.pipes else (0, 0)
        sent, received = (forth, back) if self.cage_port is None else (back, forth)
        duration = round((now - self.started) * 1000, 3)
        return NetClosed(
            **self.endpoint(), sent=sent, received=received, duration_ms=duration, reason=self.reason, flow=self.id
        )

    def denied(self, rule: str, **found: Any) -> NetDenied:
        """The record of a refusal; ``found``: further fields."""
        return NetDenied(**self.endpoint(), protocol="tcp", verdict="denied", rule=rule, **found)

    def pass_on(self, departure: Departure) -> FlowState:
        """Take it off the loop, and hand it to another broker; one that is not decided goes as it was accepted."""
        if not self.recorded:
            if self.server is not None:
                self.server.close()
            self.name = self.server = self.dialled = None
            self.via, self.rule = "", self.rule if self.cage_port is not None else ""
        return FlowState(
            client=departure.add(self.client.detach()),
            server=departure.add(self.server.detach()) if self.server is not None else -1,
            address=str(self.address),
            port=self.port,
            started=self.started,
            name=self.name,
            rule=self.rule,
            dialled=str(self.dialled) if self.dialled is not None else None,
            cage_port=self.cage_port,
            via=self.via,
            began=self.began,
            id=self.id,
            first=to_text(self.first),
            pipes=tuple(pipe.pass_on() for pipe in self.pipes),
        )

    @classmethod
    def taken_over(cls, state: FlowState, descriptors: Descriptors) -> Self:
        """A connection of another broker's."""
        client = socket.socket(fileno=descriptors.take(state.client))
        server = socket.socket(fileno=descriptors.take(state.server)) if state.server >= 0 else None
        for sock in (client, server):
            if sock is not None:
                sock.setblocking(False)
        return cls(
            client, ip_address(state.address), state.port, state.started, name=state.name, rule=state.rule,
            dialled=ip_address(state.dialled) if state.dialled is not None else None, server=server,
            cage_port=state.cage_port, via=state.via, recorded=server is not None, began=state.began, id=state.id,
            first=to_bytes(state.first), before=state.pipes,
        )  # fmt: skip

    def join_again(
        self, scratch: Scratch, fence: Fence, turns: Turns, on_end: OnEnd, gate: Callable[[GateState], Gate]
    ) -> None:
        """Make the two pipes go on that another broker had; ``gate`` makes a gate of its state."""
        (forth, back), self.before = self.before, ()
        gates = [gate(one.gate) if one.gate is not None else None for one in (forth, back)]
        up, down = self.join(scratch, fence, turns, on_end)
        up.take_over(forth, down, gates[0])
        down.take_over(back, up, gates[1])

    def join(self, scratch: Scratch, fence: Fence, turns: Turns, on_end: OnEnd) -> tuple[Pipe, Pipe]:
        """Make the two pipes, client to server first; neither is started.

        ``on_end`` is called once both have ended, or with the failure of one that has ended or broken off.
        """
        assert self.server is not None
        forth, back = (self.client, self.server), (self.server, self.client)
        up, down = Pipe(*forth, scratch, fence, turns), Pipe(*back, scratch, fence, turns)

        def ended() -> None:
            failure = up.failure or down.failure
            if failure is not None or (up.ended and down.ended):
                on_end(self, failure)

        up.back, down.back, up.on_end, down.on_end = down, up, ended, ended
        self.pipes = [up, down]
        return up, down

    def begin(self, turns: Turns, first: bytes = b"") -> None:
        """Carry from now on; the client's ``first`` bytes, and what either side has sent by now, go out at once."""
        assert self.server is not None
        began, (up, down) = time.thread_time(), self.pipes
        up.carry(first)
        if not down.ended:
            down.carry()
        turns.took_piece(time.thread_time() - began, up.total + down.total)
        up.start()
        down.start()
        if not (up.ended and down.ended):
            self.server.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def tune(self) -> None:
        """Set what matters only to a connection that lasts; most end before."""
        if self.recorded and not self.tuned and self.server is not None:
            self.tuned = True
            with contextlib.suppress(OSError):  # of a connection that has just broken off
                tune(self.server)

    def failed(self, error: BaseException) -> None:
        """Note the error that broke the connection off; who gave it up has said why."""
        if isinstance(error, DescribedError):
            self.reason = str(error)
        elif isinstance(error, OSError):
            self.reason = errno.errorcode.get(error.errno or 0, "failed").lower()

    @property
    def touched(self) -> float:
        """Time of the last byte in either direction, on the event loop's clock."""
        return max([self.started, *(pipe.touched for pipe in self.pipes)])

    def release(self, *, orderly: bool) -> None:
        """Stop the pipes and close both sockets, by a reset unless both ends were ``orderly``; not if it has left."""
        if self.left:
            return
        for pipe in self.pipes:
            pipe.stop()
        for sock in (self.client, self.server):
            if sock is not None:
                sock.close() if orderly else reset(sock)
        if self.entry is not None:
            self.entry.flows -= 1


class FlowTable:
    """The flows of one run in one direction, of which ``limit`` may be open at once.

    ``end`` ends one: it is closed and recorded, and ``remove`` called. ``busy`` is called with the first of several.
    """

    def __init__(self, limit: int, end: OnEnd, busy: Callable[[], None] = lambda: None) -> None:
        self._limit, self._end, self._busy = limit, end, busy
        self._flows: dict[Flow, asyncio.Task[None] | None] = {}
        """With the task that opens it, if it has one."""

    def __len__(self) -> int:
        return len(self._flows)

    @property
    def full(self) -> bool:
        """Whether no further flow may be opened."""
        return len(self._flows) >= self._limit

    def add(self, flow: Flow) -> None:
        """Count a flow that is opened or joined now."""
        if not self._flows:
            self._busy()
        self._flows[flow] = None

    def remove(self, flow: Flow) -> None:
        """Forget a flow that has ended."""
        self._flows.pop(flow, None)

    def open(self, flow: Flow, work: Coroutine[Any, Any, None], *, at_once: bool = False) -> None:
        """Run ``work``, at whose end the flow is joined; whatever it raises ends the flow.

        ``at_once``: begin it in this call, and make a task only where something has to be waited for.
        """
        self.add(flow)
        try:
            rest = begun(work) if at_once else work
        except Exception as error:
            self._failed(flow, error)
        else:
            if rest is not None:
                self._flows[flow] = task = asyncio.get_running_loop().create_task(rest)
                task.add_done_callback(partial(self._opened, flow))

    def tune(self) -> None:
        """Set the options of the flows that have been opened since the last call; to be called once a second."""
        for flow in self._flows:
            flow.tune()

    def end_idle(self, before: float) -> None:
        """End every flow in which nothing has moved since ``before``, on the event loop's clock."""
        for flow in list(self._flows):
            if flow.touched < before:
                self._stop(flow, "idle")

    def end_incomplete(self, before: float) -> None:
        """End every flow whose client has left half a greeting or request unfinished since ``before``."""
        for flow in list(self._flows):
            for pipe in flow.pipes:
                pipe.end_incomplete(before)

    async def close(self) -> None:
        """End every flow, because its cage ended; all their records are written when it returns."""
        tasks = self._tasks()
        for flow in list(self._flows):
            self._stop(flow, "cage ended")
        await asyncio.gather(*tasks, return_exceptions=True)

    async def pass_on(self, departure: Departure) -> tuple[FlowState, ...]:
        """Hand every flow to another broker."""
        tasks = self._tasks()
        undecided = [flow for flow in self._flows if not flow.recorded]
        for flow in undecided:
            flow.left = True
            self._stop(flow, "")
        await asyncio.gather(*tasks, return_exceptions=True)
        states = [flow.pass_on(departure) for flow in [*undecided, *self._flows]]
        self._flows.clear()
        return tuple(states)

    def _tasks(self) -> list[asyncio.Task[None]]:
        """The tasks under way; what has just failed to open is ended here, as its own failure and nobody's doing."""
        for flow, task in list(self._flows.items()):
            if task is not None and task.done():
                self._opened(flow, task)
        return [task for task in self._flows.values() if task is not None]

    def _stop(self, flow: Flow, reason: str) -> None:
        flow.reason = reason
        task = self._flows[flow]
        if task is None:
            self._end(flow, asyncio.CancelledError())
        else:
            task.cancel()

    def _opened(self, flow: Flow, task: asyncio.Task[None]) -> None:
        error = asyncio.CancelledError() if task.cancelled() else task.exception()
        if flow not in self._flows:
            return
        self._flows[flow] = None
        if error is not None:
            self._failed(flow, error)

    def _failed(self, flow: Flow, error: BaseException) -> None:
        if flow in self._flows:  # else it has ended by itself
            self._end(flow, error)
        if not isinstance(error, OSError | Denied | asyncio.CancelledError):
            report(asyncio.get_running_loop(), "a flow", error)
