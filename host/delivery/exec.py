"""Delivery in the mode ``exec``: for each event the program runs once, in a cage of its own (a *invocation*).

The event is on its standard input, the exit code is the answer, and the last line of its standard output, if it is a
JSON object, the result. The supervisor starts and ends invocations, and tells how they ended; an attempt that no
program saw, since its cage could not be made, does not count.
"""

from __future__ import annotations

import asyncio
import os
import socket
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field

from host.channel.exit_codes import OK, outcome_of
from host.channel.reply import STREAM_MESSAGE, NotSentError, Outcome, event_params
from host.delivery.modes import Mode, Parts
from host.delivery.outcome import judged
from host.delivery.sidecar import RENEWED
from host.fence.fences import NO_LEASE
from host.plugins.registry import Plugin
from host.queue.interface import RETRY_BACKOFF, Delivery
from isolator.audit.client import moment
from isolator.errors import IsolatorError
from isolator.ipc.body import Body, WithFds, omitted
from isolator.ipc.messages import InvocationBegun, InvocationEnded, InvocationStarted, StartInvocation
from isolator.ipc.succession import Departure, Descriptors
from isolator.ipc.tasks import Tasks
from isolator.linux.descriptors import close_all, owning
from isolator.linux.memfd import make_sealed


class InvocationInFlight(Body):
    """An invocation on its way to another host."""

    seq: int
    run: str
    sent_ns: int
    beginning: bool = omitted(default=False)
    """the supervisor was asked for it and has not answered: `invocation.begun` is its answer"""


class ExecState(Body):
    """The invocations of a plugin on their way to another host."""

    invocations: tuple[InvocationInFlight, ...]


@dataclass(eq=False)
class _Invocation:
    """An invocation under way."""

    plugin: Plugin
    delivery: Delivery
    run: str
    sent_ns: int = 0
    begun: asyncio.Future[WithFds[InvocationStarted]] = field(
        default_factory=lambda: asyncio.get_running_loop().create_future()
    )
    """The supervisor's answer to another host, which had asked for it and has left."""
    asked: bool = False
    """The supervisor was asked for it: it hears that before whatever it is asked next."""
    started: bool = False
    """The supervisor has started it, and its pipes are read."""
    ended: asyncio.Future[InvocationEnded] = field(default_factory=lambda: asyncio.get_running_loop().create_future())

    async def answer(self) -> WithFds[InvocationStarted]:
        """The result of ``begun``; raises IsolatorError when it was not begun."""
        return await self.begun


class ExecDelivery(Mode):
    """Delivers events to one plugin in the mode ``exec``."""

    State = ExecState

    def __init__(self, parts: Parts) -> None:
        super().__init__(parts)
        self._invocations: dict[str, _Invocation] = {}
        """Those under way, by run."""
        self._slot = asyncio.Event()
        self._tasks = Tasks()

    @property
    def busy(self) -> bool:
        return bool(self._invocations)

    async def deliver(self, plugin: Plugin, hook: str, delivery: Delivery) -> None:
        assert delivery.event is not None and plugin.manifest is not None
        event_type = self.parts.catalogue.get(delivery.event.name)
        attempt, timeout = delivery.attempts + 1, plugin.timeout
        params = event_params(delivery.event, event_type, plugin.major, attempt, timeout, delivery.epoch)
        request = params.encode() + b"\n"  # a line, as the read of a shell wants it
        if len(request) > STREAM_MESSAGE:
            self.parts.outcomes.give_up(delivery, "payload_too_large")
            return
        while len(self._invocations) >= plugin.manifest.delivery.concurrency:
            self._slot.clear()
            await self._slot.wait()
        if plugin.state in ("disabled", "failed"):
            raise NotSentError(plugin.error or f"is {plugin.state}")
        if self.parts.sidecar.leaving:
            raise NotSentError(RENEWED)
        if self.parts.sidecar.fence.closed:
            raise NotSentError(NO_LEASE)
        invocation = _Invocation(plugin, delivery, os.urandom(5).hex())
        self._invocations[invocation.run] = invocation

        def send() -> None:
            invocation.sent_ns = time.monotonic_ns()
            self._tasks.run(
                f"invocation of {plugin.name}", self._live(invocation, lambda: self._ask(invocation, hook, request))
            )

        def give_up(why: str) -> None:
            invocation.sent_ns = time.monotonic_ns()
            self._conclude(invocation, Outcome("busy", "not_started", why))

        self.parts.outcomes.begin(delivery, invocation.run, request, send, give_up)
        self.parts.sidecar.status = "in_flight"

    async def _live(
        self, invocation: _Invocation, answered: Callable[[], Awaitable[WithFds[InvocationStarted]]]
    ) -> None:
        """Conclude the attempt when the invocation has ended, or ``answered`` says that it was not begun."""
        try:
            answer = await answered()
            self._attach(invocation, answer.fds)
        except (IsolatorError, OSError) as error:
            pause = RETRY_BACKOFF.after(invocation.delivery.busy)
            self._conclude(invocation, Outcome("busy", "not_started", str(error), retry_after=pause))
            return
        if answer.body.failed:
            self._conclude(invocation, Outcome("failed", "not_executed", answer.body.failed))
            return
        invocation.started = True
        await self._finish(invocation)

    async def _ask(self, invocation: _Invocation, hook: str, request: bytes) -> WithFds[InvocationStarted]:
        event = invocation.delivery.event
        assert event is not None
        start = StartInvocation(
            name=invocation.plugin.name, run=invocation.run, event=event.id, type=hook,
            attempt=invocation.delivery.attempts, environment=self.parts.environment(invocation.plugin.name),
        )  # fmt: skip
        with owning(make_sealed(request)) as stdin:
            invocation.asked = True
            return await self.parts.supervisor.ask_fds(start, fds=[stdin])

    def _attach(self, invocation: _Invocation, fds: list[int]) -> None:
        """Read the output of an invocation and serve its calls; owns the descriptors."""
        name, run = invocation.plugin.name, invocation.run
        if len(fds) == 3:
            listener, stdout, stderr = fds
            self.parts.logs.attach(name, run, stdout, stderr, tail=True)
            self.parts.serve_invocation(name, run, socket.socket(fileno=listener))
        else:
            close_all(fds)

    async def _finish(self, invocation: _Invocation) -> None:
        ended = await invocation.ended
        name = invocation.plugin.name
        self.parts.end_invocation(name, invocation.run)
        line = await self.parts.logs.last_line(invocation.run)
        last_words = await self.parts.logs.stderr_tail(name, invocation.run) if ended.exit_code != OK else []
        self._conclude(invocation, judged(outcome_of, ended, line, last_words[-1] if last_words else ""))

    def _conclude(self, invocation: _Invocation, outcome: Outcome) -> None:
        del self._invocations[invocation.run]
        self._slot.set()
        of, sent_ns = invocation.delivery, invocation.sent_ns
        self.parts.outcomes.conclude(invocation.plugin, of, invocation.run, outcome, sent_ns, moment(), broken=False)

    def invocation_begun(self, begun: InvocationBegun, fds: list[int]) -> None:
        invocation = self._invocations.get(begun.run)
        if invocation is None or invocation.begun.done():
            return
        if begun.refused:
            invocation.begun.set_exception(IsolatorError(begun.refused))
        else:
            invocation.begun.set_result(WithFds(InvocationStarted(failed=begun.failed), list(fds)))
            fds.clear()

    def invocation_ended(self, ended: InvocationEnded) -> None:
        invocation = self._invocations.get(ended.run)
        if invocation is not None and not invocation.ended.done():
            invocation.ended.set_result(ended)
            if not invocation.begun.done():
                invocation.begun.set_result(WithFds(InvocationStarted(), []))

    def close(self) -> None:
        self._tasks.cancel()

    # One host in the place of another

    @property
    def unsettled(self) -> bool:
        # One that is asked for after the supervisor was told to break off is answered to a process that has left.
        return any(not invocation.asked for invocation in self._invocations.values())

    @property
    def replied(self) -> bool:
        return any(invocation.ended.done() for invocation in self._invocations.values())

    def pass_on(self, departure: Departure) -> ExecState | None:
        self._tasks.cancel()
        invocations = (
            InvocationInFlight(seq=one.delivery.seq, run=one.run, sent_ns=one.sent_ns, beginning=not one.started)
            for one in self._invocations.values()
            if one.asked
        )
        return ExecState(invocations=tuple(invocations))

    @classmethod
    def in_flight(cls, state: ExecState) -> Sequence[int]:
        return [invocation.seq for invocation in state.invocations]

    async def take_over(
        self, plugin: Plugin | None, deliveries: Mapping[int, Delivery], state: ExecState, descriptors: Descriptors
    ) -> None:
        for one in state.invocations:
            delivery = deliveries.get(one.seq)
            if plugin is not None and delivery is not None:
                invocation = self._invocations[one.run] = _Invocation(
                    plugin, delivery, one.run, one.sent_ns, asked=True, started=not one.beginning
                )
                life = self._live(invocation, invocation.answer) if one.beginning else self._finish(invocation)
                self._tasks.run(f"invocation of {plugin.name}", life)
