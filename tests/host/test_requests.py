"""Requests in flight over one connection: begun together, each concluded once, by whatever comes first."""

from __future__ import annotations

import asyncio
import time
from types import SimpleNamespace
from typing import Any

import pytest

from host.channel.reply import LostError, Outcome
from host.delivery.attempts import Attempt
from host.delivery.outcome import Outcomes
from host.delivery.requests import PendingRequest, Requests
from host.delivery.runs import Runs
from host.delivery.sidecar import SidecarLink
from host.plugins.secrets import Redactor
from host.queue.interface import Delivery, Event
from isolator.audit.client import Moment, moment
from isolator.audit.schema import EventResponse
from isolator.ipc.fence import Fence
from tests.support.timeouts import seconds

ABSENT: Any = None
PLUGIN: Any = SimpleNamespace(most_in_flight=2, timeout=60.0)


class Concluded(Outcomes):
    """Keeps what is concluded, as (number of the event, kind, whether its connection broke)."""

    def __init__(self, attempts: Any) -> None:
        super().__init__("caller", ABSENT, ABSENT, ABSENT, attempts, Fence())
        self.concluded: list[tuple[int, str, bool]] = []

    def conclude(
        self, plugin: Any, delivery: Any, run: str, outcome: Outcome, sent_ns: int, at: Moment, *, broken: bool
    ) -> None:  # fmt: skip
        if outcome.detail == "a fault":
            raise ValueError(outcome.detail)
        self.concluded.append((delivery.seq, outcome.kind, broken))


class Made:
    """Requests of one plugin, with the attempts that were begun and what was written."""

    def __init__(self) -> None:
        self.begun: list[Attempt] = []
        self.scheduled = 0
        self.written: list[str] = []
        self.flushed: list[int] = []
        """When requests that were gathered were sent."""
        self.outcomes = Concluded(SimpleNamespace(begin=self.begun.append, schedule=self._schedule))
        runs: Runs = ABSENT
        self.sidecar = SidecarLink("caller", runs, ABSENT, Fence())
        self.requests = Requests[Outcome](self.sidecar, self.outcomes, self._judge)

    @staticmethod
    def _judge(answer: Outcome) -> Outcome:
        if answer.detail == "beyond judgement":
            raise OverflowError(answer.detail)
        return answer

    def _schedule(self) -> None:
        self.scheduled += 1

    def send(self, seq: int) -> PendingRequest[Outcome]:
        delivery: Any = SimpleNamespace(seq=seq)
        number = f"n{seq}"
        self.requests.send(
            PLUGIN, delivery, "run", number, b"request", lambda number, *_: self.written.append(number),
            flush=lambda: self.flushed.append(time.monotonic_ns()),
        )  # fmt: skip
        return self.requests.unanswered[number]


async def test_request_is_concluded_as_its_answer_comes_and_by_nothing_that_comes_later() -> None:
    made = Made()
    one = made.send(1)
    one.send()
    assert made.written == ["n1"] and not one.done()
    one.set_result(Outcome("ok"))
    assert made.outcomes.concluded == [(1, "ok", False)] and one.done() and not made.requests
    one.set_exception(LostError("the connection broke", crash=True))
    assert len(made.outcomes.concluded) == 1
    await asyncio.wait_for(made.sidecar.drain(), seconds(5))


async def test_broken_connection_and_silence_conclude_as_unknown() -> None:
    made = Made()
    made.send(1).set_exception(LostError("broke", crash=True))
    made.send(2).set_exception(LostError("no reply in time"))
    assert made.outcomes.concluded == [(1, "unknown", True), (2, "unknown", False)]


async def test_request_that_nobody_awaits_any_more_is_not_written() -> None:
    made = Made()
    one = made.send(1)
    made.requests.cancel()
    one.send()
    one.set_result(Outcome("ok"))
    assert made.written == [] and made.outcomes.concluded == []
    await asyncio.wait_for(made.sidecar.drain(), seconds(5))


async def test_latency_begins_as_a_request_is_sent_and_not_as_it_is_gathered() -> None:
    """Or a plugin would answer for the requests of others that are gathered, and sent, before its own."""
    made = Made()
    one, other = made.send(1), made.send(2)
    one.send()
    other.send()
    gathered = time.monotonic_ns()
    one.listen()
    other.listen()
    assert gathered <= one.sent_ns <= made.flushed[0] <= other.sent_ns <= made.flushed[1]


async def test_attempt_is_on_record_as_of_the_moment_to_which_its_latency_counts() -> None:
    """So that the trail tells exactly when a request was written."""
    recorded: list[tuple[EventResponse, Moment]] = []
    consumer: Any = SimpleNamespace(ack=lambda *_: None)
    audit: Any = SimpleNamespace(record=lambda record, *, at, **_: recorded.append((record, at)))
    outcomes = Outcomes("caller", consumer, audit, lambda _: Redactor(), ABSENT, Fence())
    at, delivery = moment(), Delivery(1, "caller", None)
    delivery.load(Event(1, "ev_1", "deploy.completed", "", 0.0, 0.0, "{}"))
    outcomes.conclude(PLUGIN, delivery, "run", Outcome("ok"), at.mono - 5_000, at, broken=False)
    assert [(record.data["latency_us"], when) for record, when in recorded] == [(5, at)]


async def test_request_that_is_not_written_yet_is_not_handed_on() -> None:
    """The next host would await an answer to what nobody has asked; it repeats the delivery as after a crash."""
    made = Made()
    made.send(1).send()
    late = made.send(2)
    assert [*made.requests.pass_on()] == ["n1"]
    late.send()
    assert made.written == ["n1"]


async def test_fault_in_a_conclusion_is_reported_and_keeps_no_other_answer_from_its_own() -> None:
    made, reported = Made(), list[Any]()
    asyncio.get_running_loop().set_exception_handler(lambda _, context: reported.append(context["exception"]))
    one, other = made.send(1), made.send(2)
    one.set_result(Outcome("ok", detail="a fault"))
    other.set_result(Outcome("ok"))
    assert made.outcomes.concluded == [(2, "ok", False)] and not made.requests
    assert [str(error) for error in reported] == ["a fault"]


async def test_answer_that_cannot_be_judged_is_a_failed_attempt() -> None:
    """Else its delivery would be in flight for good, and with it all that follow in the order of its key."""
    made, reported = Made(), list[Any]()
    asyncio.get_running_loop().set_exception_handler(lambda _, context: reported.append(context["exception"]))
    made.send(1).set_result(Outcome("ok", detail="beyond judgement"))
    assert made.outcomes.concluded == [(1, "failed", False)]
    assert [str(error) for error in reported] == ["beyond judgement"]


async def test_room_wakes_its_taker_and_announces_an_attempt_in_one_turn() -> None:
    made = Made()
    one = made.send(1)
    assert made.requests.has_room(PLUGIN)
    made.send(2)
    taker = asyncio.create_task(made.requests.slot(PLUGIN))
    await asyncio.sleep(0)
    assert not taker.done()
    one.set_result(Outcome("ok"))
    assert made.scheduled == 1, "its attempt is sent in the turn in which it runs"
    await asyncio.wait_for(taker, seconds(5))


async def test_requests_leave_no_room_from_the_last_that_is_allowed_until_one_of_them_ends() -> None:
    made = Made()
    assert made.sidecar.room() == 1.0, "nothing would end with which the next is offered"
    requests = []
    for seq in (1, 2):
        assert made.requests.has_room(PLUGIN) and made.sidecar.room() > 0
        requests.append(made.send(seq))
    assert made.sidecar.room() == 0
    requests[0].set_result(Outcome("ok"))
    assert made.sidecar.room() == 0.5


@pytest.mark.parametrize("several", [False, True], ids=["alone", "beside others"])
async def test_drain_waits_for_every_answer(several: bool) -> None:
    made = Made()
    requests = [made.send(seq) for seq in ((1, 2) if several else (1,))]
    draining = asyncio.create_task(made.sidecar.drain())
    for one in requests:
        await asyncio.sleep(0)
        assert not draining.done()
        one.set_result(Outcome("ok"))
    await asyncio.wait_for(draining, seconds(5))
