"""Requests in flight to one sidecar, many at a time and each with a number; its answer concludes an attempt."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Generic, TypeVar

from host.channel.reply import LostError, NotSentError, Outcome
from host.delivery.outcome import Outcomes, judged
from host.delivery.sidecar import SidecarLink
from host.plugins.registry import Plugin
from host.queue.interface import Delivery
from isolator.audit.client import moment
from isolator.ipc.body import Body

A = TypeVar("A")
Write = Callable[[str, bytes, float, "PendingRequest[A]"], None]
"""Writes a request: (number, bytes, seconds for its answer, who takes that)."""


class RequestState(Body):
    """A request in flight, on its way to another host."""

    seq: int
    run: str
    sent_ns: int


@dataclass(eq=False, slots=True)
class PendingRequest(Generic[A]):
    """A request that waits for its answer: the first thing that ends it concludes its attempt, at once."""

    requests: Requests[A]
    plugin: Plugin
    delivery: Delivery
    run: str
    number: str
    request: bytes = b""
    """The bytes to be written."""
    write: Write[A] | None = None
    """Writes it; None: it is written, by this host or by another."""
    flush: Callable[[], None] | None = None
    """Sends what that only gathers."""
    sent_ns: int = 0
    """CLOCK_MONOTONIC in ns when it was written."""

    def send(self) -> None:
        """Write the request, which is on record by now, if its answer is still awaited."""
        if self.number not in self.requests.unanswered:
            return
        self.sent_ns = time.monotonic_ns()
        why = self.requests.outcomes.note_sent(self.delivery, self.run)
        if why is not None:
            self.set_exception(LostError(why))
        elif self.write is not None:
            self.write(self.number, self.request, self.plugin.timeout, self)
            self.write, self.request = None, b""

    def listen(self) -> None:
        """Send what was only gathered: every request of this turn is, by now."""
        if self.flush is not None:
            self.sent_ns = time.monotonic_ns()
            self.flush()

    def done(self) -> bool:
        """Whether the answer is no longer awaited."""
        return self.number not in self.requests.unanswered

    def set_result(self, result: A, /) -> None:
        """Take the answer."""
        self.requests.conclude(self, result)

    def set_exception(self, exception: LostError | NotSentError, /) -> None:
        """Take the reason why there is no answer."""
        self.requests.conclude(self, exception)


class Requests(Generic[A]):
    """The requests in flight; ``judge`` says what an answer means."""

    def __init__(self, sidecar: SidecarLink, outcomes: Outcomes, judge: Callable[[A], Outcome]) -> None:
        self.outcomes = outcomes
        self._sidecar, self._judge = sidecar, judge
        self.unanswered: dict[str, PendingRequest[A]] = {}
        """Requests in flight, by number."""
        self._most = 0
        """How many may be in flight, as was last asked."""
        self._waiter: asyncio.Future[None] | None = None
        """Future of whoever waits for room."""

    def __len__(self) -> int:
        return len(self.unanswered)

    def has_room(self, plugin: Plugin) -> bool:
        """Whether one more may be in flight; during isolated retries, if none is."""
        self._most = self.outcomes.most_in_flight(plugin)
        return len(self.unanswered) < self._most

    async def slot(self, plugin: Plugin) -> None:
        """Wait until there is room; for one taker."""
        while not self.has_room(plugin):
            self._waiter = asyncio.get_running_loop().create_future()
            await self._waiter

    def send(
        self,
        plugin: Plugin,
        delivery: Delivery,
        run: str,
        number: str,
        request: bytes,
        write: Write[A],
        flush: Callable[[], None] | None = None,
    ) -> None:
        """Begin an attempt: ``write`` writes the request once that is on record; raises NotSentError.

        ``flush`` is called once every request of this turn is written: to send what ``write`` only gathers.
        """
        self._sidecar.begin_request(run, self._most)
        one = self.unanswered[number] = PendingRequest(self, plugin, delivery, run, number, request, write, flush)
        self.outcomes.attempts.begin(one)

    def conclude(self, one: PendingRequest[A], answer: A | LostError | NotSentError) -> None:
        """End the attempt of a request, unless it is no longer awaited; never raises."""
        if self.unanswered.pop(one.number, None) is None:
            return
        at = moment()
        self._sidecar.end_request()
        if self._waiter is not None:
            waiter, self._waiter = self._waiter, None
            if not waiter.done():
                waiter.set_result(None)
                self.outcomes.attempts.schedule()
        try:
            broken = False
            if isinstance(answer, (LostError, NotSentError)):
                outcome, broken = Outcome("unknown", detail=str(answer)), isinstance(answer, LostError) and answer.crash
            else:
                outcome = judged(self._judge, answer)
            self.outcomes.conclude(one.plugin, one.delivery, one.run, outcome, one.sent_ns, at, broken=broken)
        except Exception as error:  # this attempt's; those whose answers come with it go on
            asyncio.get_running_loop().call_exception_handler(
                {"message": "an attempt could not be concluded", "exception": error}
            )

    def cancel(self) -> None:
        """Await no more answers."""
        for _ in self.unanswered:
            self._sidecar.end_request()
        self.unanswered.clear()

    def pass_on(self, numbers: Collection[str] | None = None) -> dict[str, RequestState]:
        """Hand on what is written of all requests, or of these numbers, by number; none is awaited here any more."""
        states = {
            number: RequestState(seq=one.delivery.seq, run=one.run, sent_ns=one.sent_ns)
            for number, one in self.unanswered.items()
            if one.write is None and (numbers is None or number in numbers)
        }
        self.cancel()
        return states

    def take_over(
        self, plugin: Plugin | None, deliveries: Mapping[int, Delivery], states: Mapping[str, RequestState]
    ) -> Iterator[PendingRequest[A]]:
        """Go on with the requests of another host; yields each that goes on."""
        for number, state in states.items():
            delivery = deliveries.get(state.seq)
            if plugin is not None and delivery is not None:
                self._sidecar.take_request()
                one = PendingRequest(self, plugin, delivery, state.run, number, sent_ns=state.sent_ns)
                yield self.unanswered.setdefault(number, one)
