"""Worker of one plugin: takes the next delivery from the queue and has it sent, or holds back.

A delivery goes out in the plugin's mode (``oneshot``, ``stream``, or one of ``modes``). Until its request is written
nothing counts as an attempt: a sidecar that is not running, still starting or refusing connections blocks its worker,
with growing pauses, and any change of the plugin ends the pause. Once the request is written, silence is ``unknown``:
an attempt that failed and is repeated. The ``event.dispatched`` record reaches the audit *before* the request is
written (``attempts``), so that the plugin's acts from then on can be traced to their cause.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import Iterator, Mapping
from typing import Any

from host.channel.reply import LostError, NotSentError
from host.delivery.gate import DispatchGate
from host.delivery.modes import Mode, Parts, mode_class
from host.delivery.oneshot import OneshotDelivery, OneshotState
from host.delivery.outcome import Outcomes, OutcomeState
from host.delivery.sidecar import PAUSED, SidecarLink, SidecarState
from host.delivery.stream import SessionState, StreamDelivery
from host.fence.fences import NO_LEASE
from host.plugins.registry import Plugin, Registry
from host.queue.interface import Consumer, Delivery, Event, KeptState, Prepare
from isolator.base.pacing import Backoff
from isolator.errors import IsolatorError
from isolator.ipc.body import Body, Json
from isolator.ipc.fence import Fence
from isolator.ipc.messages import InvocationBegun, InvocationEnded
from isolator.ipc.succession import Departure, Descriptors
from isolator.ipc.tasks import Tasks

DRAIN_SECONDS = 2.0
"""Seconds that a plugin which is to stop has to answer requests, and then ``shutdown``, before its SIGTERM."""
HOLD_FIRST, HOLD_LONGEST = 0.25, 30.0
"""Seconds: pauses of a worker that is blocked."""


class WorkerState(Body):
    """A worker on its way to another host."""

    plugin: str
    sidecar: SidecarState
    oneshot: OneshotState
    session: SessionState | None
    modes: dict[str, Json]
    """by name of each other mode, its ``State``"""
    outcomes: OutcomeState
    kept: tuple[KeptState, ...]
    last_used: float

    @property
    def in_flight(self) -> tuple[int, ...]:
        """The numbers of the events whose requests are unanswered."""
        requests = [one.seq for one in self.session.requests.values()] if self.session is not None else []
        requests += [seq for name, state in self.of_modes().items() for seq in mode_class(name).in_flight(state)]
        return (*requests, *([self.oneshot.request.seq] if self.oneshot.request is not None else []))

    def of_modes(self) -> dict[str, Body]:
        """The states of the other modes; raises UsageError for one that is none."""
        return {name: mode_class(name).State.from_json(state, name) for name, state in self.modes.items()}


class Worker:
    """Delivers one plugin's events until it is closed. ``before``: another host's worker, to go on from."""

    def __init__(
        self,
        consumer: Consumer,
        registry: Registry,
        gate: DispatchGate,
        sidecar: SidecarLink,
        outcomes: Outcomes,
        oneshot: OneshotDelivery,
        stream: StreamDelivery,
        parts: Parts,
        before: tuple[WorkerState, Descriptors] | None = None,
    ) -> None:
        self.name = sidecar.name
        self.blocked_on: str | None = None
        """Why nothing is being sent at the moment, else None."""
        loop = self._loop = asyncio.get_running_loop()
        self.last_used = loop.time()
        """Loop time at which the newest delivery was taken."""
        self._consumer, self._registry, self._gate = consumer, registry, gate
        self._sidecar, self._outcomes, self._oneshot, self._stream = sidecar, outcomes, oneshot, stream
        self._parts = parts
        self._modes: dict[str, Mode] = {}
        """Modes that were needed so far, by name."""
        self._users = 0
        """Others than the queue that use the sidecar at the moment."""
        self._woken = asyncio.Event()
        self._resumed_by_operator = asyncio.Event()
        self._resumed_by_operator.set()
        self._backoff = Backoff(HOLD_FIRST, HOLD_LONGEST)
        self._taken: Delivery | None = None
        """The delivery that is to be sent next."""
        self._before = before
        self._resumed: asyncio.Future[None] = loop.create_future()
        """Done once the requests of another host, if there are any, are awaited here."""
        if before is not None:
            self._sidecar.take_over(before[0].sidecar)
            if before[0].session is not None and before[0].session.run != before[0].sidecar.run:
                self._sidecar.run_ended(before[0].session.run)
            self.last_used = before[0].last_used
        self._tasks = Tasks()
        self._tasks.keep(f"dispatch of {self.name}", self._work)

    @property
    def run(self) -> str | None:
        """The run that is delivered to, if any."""
        return self._sidecar.run

    @property
    def status(self) -> str:
        """Present step of delivery, for listings."""
        return self._sidecar.status

    def health(self) -> dict[str, Any]:
        """Return how the attempts went and when the next is due (``ListedPlugin`` of the control socket's verbs)."""
        last, failing_since = self._outcomes.last, self._outcomes.failing_since
        return {
            "last": last._asdict() if last is not None else None,
            "failing_since": failing_since,
            "next_attempt": self._consumer.next_attempt,
            "attempts_ended": self._outcomes.ended,
            "latency_p99_us": self._outcomes.latency_p99,
        }

    @property
    def busy(self) -> bool:
        """Whether a request is unanswered or a delivery waits."""
        busy = self._users > 0 or self._stream.busy or self._oneshot.busy
        busy = busy or any(mode.busy for mode in self._modes.values())
        return busy or self._consumer.depth > 0

    @contextlib.contextmanager
    def in_use(self) -> Iterator[None]:
        """Count as busy."""
        self._users += 1
        try:
            yield
        finally:
            self._users -= 1
            self.last_used = self._loop.time()

    def pause(self) -> None:
        """Send no further event until ``resume``; what is in flight is answered, and the sidecar stays."""
        self._sidecar.paused = True
        self._resumed_by_operator.clear()

    def resume(self) -> None:
        """Send events again."""
        self._sidecar.paused = False
        self._resumed_by_operator.set()
        self.wake()

    @property
    def fence(self) -> Fence:
        """Until when the plugin may act."""
        return self._sidecar.fence

    def lost(self) -> None:
        """Count no attempt that is under way."""
        self._outcomes.lost()
        self.wake()

    @property
    def idle(self) -> bool:
        """Whether the sidecar may be stopped as idle."""
        return not self.busy and not self._sidecar.paused and not self.fence.closed

    def wake(self) -> None:
        """End the present pause: the plugin has changed."""
        self._backoff.reset()
        self._woken.set()

    def run_started(self, run: str) -> None:
        """Deliver to this run: the supervisor has started it."""
        self._sidecar.run = run
        self.wake()

    def run_ended(self, run: str, *, crashed: bool) -> None:
        """Deliver no more to this run; if it ``crashed``, an event in flight may be responsible."""
        self._sidecar.run_ended(run)
        self._oneshot.run_ended(run)
        for mode in self._modes.values():
            mode.run_ended(run)
        self._outcomes.run_ended(run, crashed=crashed)
        self.wake()

    def invocation_begun(self, begun: InvocationBegun, fds: list[int]) -> None:
        """Go on with an invocation for which another host has asked; takes the descriptors of one of its own."""
        for mode in self._modes.values():
            mode.invocation_begun(begun, fds)

    def invocation_ended(self, ended: InvocationEnded) -> None:
        """Conclude the attempt whose invocation has ended."""
        for mode in self._modes.values():
            mode.invocation_ended(ended)

    async def close(self) -> None:
        """Stop; a delivery in flight counts as an attempt with an unknown outcome at the next start."""
        await self._tasks.close()
        self._sidecar.forget_run()
        self._oneshot.close()
        self._stream.close()
        for mode in self._modes.values():
            mode.close()

    async def drain(self, run: str, reason: str) -> None:
        """Drain the run before a stop: send nothing new, wait for replies, send ``shutdown``.

        Returns within ``DRAIN_SECONDS``.
        """
        if run != self._sidecar.run or self.fence.closed:
            return
        with contextlib.suppress(TimeoutError, LostError, NotSentError):
            async with asyncio.timeout(DRAIN_SECONDS):
                await self._sidecar.drain()
                await self._stream.shutdown(reason, DRAIN_SECONDS)
                for mode in self._modes.values():
                    await mode.shutdown(reason, DRAIN_SECONDS)

    def notify(self, method: str, params: Mapping[str, Any]) -> None:
        """Send a plugin a notification, if it declared that it takes this one."""
        if self.fence.closed:
            return
        self._stream.notify(method, params)
        for mode in self._modes.values():
            mode.notify(method, params)

    async def ping(self, plugin: Plugin, timeout: float) -> bool:
        """Ping the sidecar; raises LostError, NotSentError, WireError or IsolatorError when there is no pong.

        Returns whether it was a time to ping. Except in stream mode a plugin is pinged only while nothing waits for it:
        it may serve one thing at a time.
        """
        if self.fence.closed:
            return False
        if plugin.mode == "stream":
            return await self._stream.ping(timeout)
        unanswered = self._oneshot.busy or any(mode.busy for mode in self._modes.values())
        if unanswered or (self._consumer.depth and not self._sidecar.paused):
            return False
        if plugin.mode == "oneshot":
            await self._oneshot.ping(timeout)
        else:
            await self._mode(plugin.mode).ping(plugin, timeout)
        return True

    def _mode(self, name: str) -> Mode:
        mode = self._modes.get(name)
        if mode is None:
            mode = self._modes[name] = mode_class(name)(self._parts)
        return mode

    # One host in the place of another

    def hold(self) -> None:
        """Begin nothing from now on: another process takes this one's place."""
        self._sidecar.leaving = True
        self._stream.hold()
        for mode in self._modes.values():
            mode.hold()

    @property
    def unsettled(self) -> bool:
        """Whether something is under way that cannot be handed on, and may soon be over."""
        modes = any(mode.unsettled for mode in self._modes.values())
        return modes or self._oneshot.connecting or self._stream.unsettled

    @property
    def connecting(self) -> bool:
        """Whether a connect is under way."""
        return self._sidecar.connecting > 0 or self._oneshot.connecting or self._stream.connecting

    @property
    def replied(self) -> bool:
        """Whether a reply is there that is not concluded yet; it will be in a turn of the event loop or two."""
        modes = any(mode.replied for mode in self._modes.values())
        return modes or self._oneshot.replied or self._stream.replied

    def pass_on(self, departure: Departure) -> WorkerState:
        """Hand everything to the successor of this process, the requests in flight with it, and stop."""
        began = self._taken is None or self._oneshot.began(self._taken)
        modes = {name: mode.pass_on(departure) for name, mode in self._modes.items()}
        self._outcomes.lost()
        state = WorkerState(
            plugin=self.name,
            sidecar=self._sidecar.pass_on(),
            oneshot=self._oneshot.pass_on(departure),
            session=self._stream.pass_on(departure),
            modes={name: state.to_json() for name, state in modes.items() if state is not None},
            outcomes=self._outcomes.pass_on(),
            kept=self._consumer.pass_on(),
            last_used=self.last_used,
        )
        self._tasks.cancel()
        if self._taken is not None and not began:
            self._consumer.release(self._taken)
        return state

    async def taken_over(self) -> None:
        """Return once the requests of the other host are awaited here; raises what kept them from it."""
        await asyncio.shield(self._resumed)

    async def _resume(self, before: WorkerState, descriptors: Descriptors) -> None:
        plugin = self._registry.get(self.name)
        found = {seq: self._consumer.retake(seq) for seq in before.in_flight if plugin is not None}
        deliveries = {seq: delivery for seq, delivery in found.items() if delivery is not None}
        self._consumer.restore(before.kept)
        self._outcomes.take_over(before.outcomes, deliveries)
        if before.session is not None:
            await self._stream.take_over(plugin, deliveries, before.session, descriptors)
        for name, state in before.of_modes().items():
            await self._mode(name).take_over(plugin, deliveries, state, descriptors)
        request = before.oneshot.request
        delivery = deliveries.get(request.seq) if request is not None else None
        self._oneshot.take_over(plugin, delivery, before.oneshot, descriptors)
        self._resumed.set_result(None)
        await self._oneshot.go_on()

    async def _begin(self) -> None:
        before, self._before = self._before, None
        try:
            if before is not None:
                await self._resume(*before)
        except Exception as error:
            if not self._resumed.done():
                self._resumed.set_exception(error)
            raise
        if not self._resumed.done():
            self._resumed.set_result(None)

    async def _work(self) -> None:
        await self._begin()
        while True:
            self._sidecar.status = "idle"
            if self._sidecar.paused:
                await self._until_resumed()
            delivery = self._taken = await self._consumer.take(self._prepare, self._send_now, self._sidecar.room)
            if not self._gate.is_open():
                await self._gate.wait_open()
            if self._sidecar.leaving:
                await asyncio.Event().wait()  # pass_on ends it
            if self._sidecar.paused or self.fence.closed:
                self._consumer.release(delivery)
                self._taken = None
                if self.fence.closed:
                    await self._until_opened()
                continue
            try:
                await self._deliver(delivery)
                self._unblocked()
            except (NotSentError, IsolatorError) as error:
                self._consumer.release(delivery)
                self._taken = None
                await self._back_off(str(error))
            except Exception as error:  # this delivery's: those behind it go on
                self._outcomes.note_failure(self._registry.get(self.name), delivery, error)
            self._taken = None

    async def _until_resumed(self) -> None:
        self._sidecar.status, self.blocked_on = "holding", PAUSED
        await self._resumed_by_operator.wait()
        self._sidecar.status, self.blocked_on = "idle", None

    async def _until_opened(self) -> None:
        """Hold back past the deadline, as a delivery waits, until that is moved on or something else has changed."""
        self._sidecar.status, self.blocked_on = "holding", NO_LEASE
        self._woken.clear()
        self.fence.stall(self._woken.set)
        await self._woken.wait()
        self._unblocked()

    def _unblocked(self) -> None:
        """Begin with the first pause when the worker is blocked again."""
        if self.blocked_on is not None:
            self._backoff.reset()
            self.blocked_on = None

    async def _back_off(self, why: str) -> None:
        self._sidecar.status, self.blocked_on = "holding", why
        self._woken.clear()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(self._backoff.next()):
                await self._woken.wait()

    def _send_now(self, delivery: Delivery) -> bool:
        """Begin an attempt of a delivery, or conclude it, if that takes no wait; returns whether it took none."""
        if not self._sidecar.accepts() or not self._gate.is_open():
            return False
        try:
            if not self._deliver_now(delivery):
                return False
        except (NotSentError, IsolatorError):  # ``_work`` meets it again, and backs off
            return False
        except Exception as error:
            self._outcomes.note_failure(self._registry.get(self.name), delivery, error)
        self._unblocked()
        return True

    async def _deliver(self, delivery: Delivery) -> None:
        if self._deliver_now(delivery):
            await self._oneshot.answered()
            return
        plugin, event = self._registry.get(self.name), delivery.event
        assert plugin is not None
        assert event is not None
        hook = plugin.hooks[event.name]
        if plugin.mode == "stream":
            await self._stream.deliver(plugin, hook, delivery)
        elif plugin.mode == "oneshot":
            await self._oneshot.deliver(plugin, hook, delivery)
        else:
            await self._mode(plugin.mode).deliver(plugin, hook, delivery)

    def _deliver_now(self, delivery: Delivery) -> bool:
        """As ``_deliver``, if that takes no wait; returns whether it took none."""
        plugin = self._registry.get(self.name)
        event = delivery.event
        assert event is not None
        self.last_used = self._loop.time()
        if plugin is not None and plugin.state == "rejected":
            raise NotSentError(plugin.error or "its policy or manifest is of no use")
        if plugin is not None:
            self._parts.config.check_whole(plugin.name, plugin.manifest, plugin.digest)
        hook = plugin.hooks.get(event.name) if plugin is not None else None
        if plugin is None or hook is None:
            self._outcomes.give_up(delivery, "the plugin no longer receives this event")
        elif plugin.filtered and not plugin.sees(json.loads(event.payload)):
            # It was accepted, or is replayed, under another grant or version.
            self._outcomes.give_up(delivery, "the filters of the plugin's grant or manifest leave this event out")
        elif plugin.mode == "stream":
            return self._stream.deliver_now(plugin, hook, delivery)
        else:
            return plugin.mode == "oneshot" and self._oneshot.deliver_now(plugin, hook, delivery)
        return True

    def _prepare(self, alone: bool) -> Prepare | None:
        """Prepare for a delivery that is being synced; returns None unless it can be sent as soon as that is done."""
        plugin = self._registry.get(self.name)
        if plugin is None or not self._sidecar.accepts() or not self._gate.is_open():
            return None
        if plugin.mode == "stream":
            return self._make_ahead if self._stream.ready else None
        return _make_nothing if plugin.mode == "oneshot" and self._oneshot.prepare(alone=alone) else None

    def _make_ahead(self, event: Event) -> None:
        """Make a part of the request of an event's first attempt on the stream while it is being synced."""
        plugin = self._registry.get(self.name)
        if plugin is not None:
            self._stream.make_ahead(plugin, event)


def _make_nothing(_: Event) -> None:
    """Leave a one-shot request for later: its emitter waits longer for that than the plugin gains."""
