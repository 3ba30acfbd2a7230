"""Requests in flight to one sidecar, many at a time and each with a number; its answer concludes an attempt."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Generic, TypeVar

from host.channel.reply import LostError, NotSentError, Outcome
from host.delivery.outcome import Outcomes
from host.delivery.sidecar import SidecarLink
from host.plugins.registry import Plugin
from host.queue.interface import Delivery
from isolator.ipc.body import Body

A = TypeVar("A")


class RequestState(Body):
    """A request in flight, on its way to another host."""

    seq: int
    run: str
    sent_ns: int


@dataclass(eq=False)
class _Request(Generic[A]):
    """A request that is not answered."""

    plugin: Plugin
    delivery: Delivery
    run: str
    number: str
    answer: asyncio.Future[A]
    sent_ns: int = 0


class Requests(Generic[A]):
    """The requests in flight; ``judge`` says what the answer to the request of that number means."""

    def __init__(self, sidecar: SidecarLink, outcomes: Outcomes, judge: Callable[[A, str], Outcome]) -> None:
        self._sidecar, self._outcomes, self._judge = sidecar, outcomes, judge
        self._requests: dict[asyncio.Future[A], _Request[A]] = {}
        self._freed = asyncio.Event()

    def __bool__(self) -> bool:
        return bool(self._requests)

    @property
    def answered(self) -> bool:
        """Whether an answer is there whose attempt is not concluded yet."""
        return any(answer.done() for answer in self._requests)

    async def slot(self, plugin: Plugin) -> None:
        """Wait until one more may be in flight; during isolated retries, until none is."""
        spec = plugin.manifest
        most = min(spec.transport.max_in_flight, spec.delivery.concurrency) if spec is not None else 1
        while len(self._requests) >= (1 if self._outcomes.isolated_retries else most):
            self._freed.clear()
            await self._freed.wait()

    def send(
        self,
        plugin: Plugin,
        delivery: Delivery,
        run: str,
        number: str,
        request: bytes,
        write: Callable[[asyncio.Future[A]], None],
    ) -> None:
        """Begin an attempt: ``write`` writes the request once that is on record; raises NotSentError."""
        self._sidecar.begin_request(run)
        one = self._await(plugin, delivery, run, number)

        def send() -> None:
            one.sent_ns = time.perf_counter_ns()
            write(one.answer)

        def give_up(why: str) -> None:
            one.sent_ns = time.perf_counter_ns()
            if not one.answer.done():
                one.answer.set_exception(LostError(why))

        self._outcomes.begin(delivery, run, request, send, give_up)
        self._sidecar.status = "in_flight"

    def cancel(self) -> None:
        """Await no more answers."""
        for answer in list(self._requests):
            answer.cancel()

    def pass_on(self, numbers: Collection[str] | None = None) -> dict[str, RequestState]:
        """Hand on the requests in flight, of all or these numbers, by number; none is awaited here any more."""
        states = {
            one.number: RequestState(seq=one.delivery.seq, run=one.run, sent_ns=one.sent_ns)
            for one in self._requests.values()
            if numbers is None or one.number in numbers
        }
        self.cancel()
        return states

    def take_over(
        self, plugin: Plugin | None, deliveries: Mapping[int, Delivery], states: Mapping[str, RequestState]
    ) -> Iterator[tuple[str, asyncio.Future[A]]]:
        """Go on with the requests of another host; yields number and awaited answer of each that goes on."""
        for number, state in states.items():
            delivery = deliveries.get(state.seq)
            if plugin is not None and delivery is not None:
                self._sidecar.take_request()
                one = self._await(plugin, delivery, state.run, number)
                one.sent_ns = state.sent_ns
                yield number, one.answer

    def _await(self, plugin: Plugin, delivery: Delivery, run: str, number: str) -> _Request[A]:
        answer: asyncio.Future[A] = asyncio.get_running_loop().create_future()
        answer.add_done_callback(self._conclude)
        one = self._requests[answer] = _Request(plugin, delivery, run, number, answer)
        return one

    def _conclude(self, answer: asyncio.Future[A]) -> None:
        one = self._requests.pop(answer)
        self._freed.set()
        self._sidecar.end_request()
        if answer.cancelled():  # the worker ends
            return
        broken = False
        try:
            outcome = self._judge(answer.result(), one.number)
        except (LostError, NotSentError) as error:
            outcome, broken = Outcome("unknown", detail=str(error)), isinstance(error, LostError) and error.crash
        latency = (time.perf_counter_ns() - one.sent_ns) // 1000
        self._outcomes.conclude(one.plugin, one.delivery, one.run, outcome, latency, broken=broken)
