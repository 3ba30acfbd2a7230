"""Rules of delivery: which attempts count, when to try again, when to give up, when an event is quarantined.

Each attempt's outcome is recorded in the trail and in the queue. An event that the plugin dies of, by a signal or out
of memory, is a poison message: two crashes that are attributed to it and it is quarantined. An exit code is a failed
attempt like others, and an end by the daemon or an operator is nobody's crash. A crash is attributed to the request
that was in flight alone; when several were, none is accused, but each of them is retried in isolation from then on.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import deque
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import NamedTuple, ParamSpec

from host.channel.reply import Outcome, shown
from host.delivery.attempts import Attempts
from host.fence.fences import NO_LEASE
from host.plugins.registry import Plugin
from host.plugins.secrets import Redactor
from host.queue.interface import RETRY_BACKOFF, Consumer, Delivery, Result, State
from isolator.audit.client import AuditClient, Moment
from isolator.audit.schema import EventDead, EventQuarantined, EventResponse
from isolator.ipc.body import Body
from isolator.ipc.fence import Fence
from isolator.linux.boottime import boottime

P = ParamSpec("P")
_log = logging.getLogger(__name__)

CRASHES_TO_QUARANTINE = 2
UNREADABLE_REPLIES = 2
"""Answers that are no reply after which an event is given up: the plugin has most likely done its work each time."""
CRASH_WINDOW = 5.0
"""Seconds within which a death of the sidecar is attributed to the attempt whose connection broke before it."""
_IN_VAIN = frozenset({"retry", "busy", "failed", "unknown"})
"""Outcomes after which an event is delivered again."""
STORED_REPLY = 4096
"""Characters of a reply that are kept."""
LATENCIES = 256
"""Newest attempts of a plugin among which its slowest hundredth is looked for."""


class Attempted(NamedTuple):
    """The newest attempt that has ended; ``at`` in Unix time. As listings show it."""

    event_id: str
    outcome: str
    status: str | None
    detail: str | None
    at: float


def judged(judge: Callable[P, Outcome], *answer: P.args, **more: P.kwargs) -> Outcome:
    """Judge an answer; where ``judge`` fails, that is reported, and the attempt has failed.

    An attempt without an outcome would be in flight for good, and hold back all that follow in the order of its key.
    """
    try:
        return judge(*answer, **more)
    except Exception as error:
        context = {"message": "an answer could not be judged", "exception": error}
        asyncio.get_running_loop().call_exception_handler(context)
        return Outcome("failed", "bad_reply", f"it cannot be judged: {type(error).__name__}")


@dataclass(frozen=True, slots=True)
class _Ended:
    """An attempt that has ended, as ``conclude`` has it."""

    plugin: Plugin
    delivery: Delivery
    run: str
    outcome: Outcome
    latency: int


@dataclass(eq=False, slots=True)
class _Begun:
    """An attempt as ``Outcomes.begin`` has it."""

    outcomes: Outcomes
    delivery: Delivery
    run: str
    request: bytes
    write: Callable[[], None]
    give_up: Callable[[str], None]
    awaits: Callable[[], None] | None

    def send(self) -> None:
        why = self.outcomes.note_sent(self.delivery, self.run)
        self.write() if why is None else self.give_up(why)

    def listen(self) -> None:
        if self.awaits is not None:
            self.awaits()


class AttemptedState(Body):
    """The newest attempt that has ended, on its way to another host."""

    event_id: str
    outcome: str
    status: str | None
    detail: str | None
    at: float


class OutcomeState(Body):
    """State of attempts and crashes, on its way to another host; deliveries by the numbers of their events."""

    last: AttemptedState | None
    failing_since: float | None

    in_flight: dict[str, str]
    """by number, the run"""
    overlapped: tuple[int, ...]
    died: tuple[str, ...]
    candidate: int | None
    candidate_run: str
    candidate_at: float
    isolated: tuple[int, ...]


class Outcomes:
    """The outcomes of one plugin's attempts."""

    def __init__(
        self,
        name: str,
        consumer: Consumer,
        audit: AuditClient,
        redactor: Callable[[str], Redactor],
        attempts: Attempts,
        fence: Fence,
    ) -> None:
        self._name, self._consumer, self._audit, self._redactor = name, consumer, audit, redactor
        self.attempts, self._fence = attempts, fence
        self._deferred: list[_Ended] = []
        """Attempts that have ended past the plugin's deadline."""
        self._last: tuple[str, str, str | None, str | None, float] | None = None
        self.failing_since: float | None = None
        """Unix time of the first failed attempt since the last that succeeded, or since this process started."""
        self.ended = 0
        """Attempts that have ended since this process started."""
        self._latencies: deque[int] = deque(maxlen=LATENCIES)
        self._in_flight: dict[int, str] = {}
        """Run by event number."""
        self._overlapped: set[int] = set()
        """Events in flight that were not alone all the time."""
        self._died: set[str] = set()
        """Runs that died while the host had their requests in flight."""
        self._crash_candidate: tuple[str, Delivery, float] | None = None
        """The run, the delivery that was alone in flight as its connection broke, and when that was."""
        self._isolated_retries: dict[int, Delivery] = {}
        """Deliveries that were in flight together when the plugin crashed, by event number."""

    @property
    def last(self) -> Attempted | None:
        """The newest attempt that has ended."""
        return Attempted(*self._last) if self._last is not None else None

    def most_in_flight(self, plugin: Plugin) -> int:
        """How many requests may be unanswered; one alone while the plugin may die of one of those that are retried."""
        while self._isolated_retries:
            seq, delivery = next(iter(self._isolated_retries.items()))
            if not delivery.final:
                return 1
            del self._isolated_retries[seq]
        return plugin.most_in_flight

    @property
    def latency_p99(self) -> int | None:
        """Latency in µs that one of a hundred of the newest attempts exceeds; None before the first one."""
        return sorted(self._latencies)[len(self._latencies) * 99 // 100] if self._latencies else None

    def pass_on(self) -> OutcomeState:
        """Return the state of attempts and crashes for the successor of this process."""
        run, delivery, at = self._crash_candidate or ("", None, 0.0)
        return OutcomeState(
            last=AttemptedState(**self.last._asdict()) if self.last is not None else None,
            failing_since=self.failing_since,
            in_flight={str(seq): of for seq, of in self._in_flight.items()},
            overlapped=tuple(self._overlapped),
            died=tuple(self._died),
            candidate=delivery.seq if delivery is not None else None,
            candidate_run=run,
            candidate_at=at,
            isolated=tuple(self._isolated_retries),
        )

    def take_over(self, state: OutcomeState, resumed: Collection[int]) -> None:
        """Go on with what another host knew, and with its attempts for these events; ``conclude`` ends each.

        To be called before the first of them can conclude.
        """
        self._last = Attempted(**state.last.to_json()) if state.last is not None else None
        self.failing_since = state.failing_since
        self._in_flight = {seq: state.in_flight[str(seq)] for seq in resumed if str(seq) in state.in_flight}
        self._overlapped = {seq for seq in state.overlapped if seq in self._in_flight}
        self._died = set(state.died) if self._in_flight else set()
        isolated = ((seq, self._consumer.find(seq)) for seq in state.isolated)
        self._isolated_retries = {seq: delivery for seq, delivery in isolated if delivery is not None}
        candidate = self._consumer.find(state.candidate) if state.candidate is not None else None
        if candidate is not None:
            self._crash_candidate = (state.candidate_run, candidate, state.candidate_at)

    def begin(
        self, delivery: Delivery, run: str, request: bytes, send: Callable[[], None], give_up: Callable[[str], None],
        listen: Callable[[], None] | None = None,
    ) -> None:  # fmt: skip
        """Begin an attempt: ``send`` is called when it may be written, and must not raise. ``conclude`` ends it.

        ``give_up`` is called in its place, with the reason, if it may not be written after all. ``listen`` is called
        after either, once all attempts that begin in this turn are written.
        """
        self.attempts.begin(_Begun(self, delivery, run, request, send, give_up, listen))

    def note_sent(self, delivery: Delivery, run: str) -> str | None:
        """Note that a request is written now; returns the reason if it may not be."""
        if self._fence.closed:
            return NO_LEASE
        if self._in_flight:
            if len(self._in_flight) == 1:  # of several, each is noted already
                self._overlapped.update(self._in_flight)
            self._overlapped.add(delivery.seq)
        self._in_flight[delivery.seq] = run
        return None

    def conclude(
        self, plugin: Plugin, delivery: Delivery, run: str, outcome: Outcome, sent_ns: int, at: Moment, *, broken: bool
    ) -> None:
        """End an attempt whose request was written at ``sent_ns`` (CLOCK_MONOTONIC), and whose answer was read ``at``.

        ``broken``: its connection broke, perhaps as the plugin died of it.
        Past the plugin's deadline it has no outcome before that is moved on, and none ever if the plugin is lost. One
        that failed counts for nothing if the plugin could not act all the time.
        """
        latency = (at.mono - sent_ns) // 1000
        if self._fence.until is not None:
            ended = _Ended(plugin, delivery, run, outcome, latency)
            if self._fence.closed and not self._fence.lost:
                self._fence.stall(self._conclude_deferred)
                self._deferred.append(ended)
                return
            in_vain = self._fence.lost or outcome.kind in _IN_VAIN
            if in_vain and self._fence.closed_since(boottime() - latency / 1e6):
                self._conclude_uncounted(ended)
                return
        self._conclude(plugin, delivery, run, outcome, latency, at, broken=broken)

    def lost(self) -> None:
        """Count none of the attempts that have ended past the deadline: the plugin is lost, or this process leaves."""
        deferred, self._deferred = self._deferred, []
        for ended in deferred:
            self._conclude_uncounted(ended)

    def _conclude_deferred(self) -> None:
        deferred, self._deferred = self._deferred, []
        for one in deferred:
            if one.outcome.kind in _IN_VAIN:
                self._conclude_uncounted(one)
            else:
                self._conclude(one.plugin, one.delivery, one.run, one.outcome, one.latency, None, broken=False)

    def _conclude_uncounted(self, one: _Ended) -> None:
        outcome = Outcome("busy", "frozen", "the plugin was held back meanwhile, as its lease ended", retry_after=0.0)
        self._conclude(one.plugin, one.delivery, one.run, outcome, one.latency, None, broken=False)

    def _conclude(
        self, plugin: Plugin, delivery: Delivery, run: str, outcome: Outcome, latency: int, at: Moment | None, *,
        broken: bool,
    ) -> None:  # fmt: skip
        try:
            self._end(plugin, delivery, run, outcome, latency, at, broken=broken)
        except Exception as error:  # this delivery's: those behind it go on
            self.note_failure(plugin, delivery, error, sent=True)

    def _end(
        self, plugin: Plugin, delivery: Delivery, run: str, outcome: Outcome, latency: int, at: Moment | None, *,
        broken: bool,
    ) -> None:  # fmt: skip
        assert delivery.event is not None
        self._in_flight.pop(delivery.seq, None)
        alone = delivery.seq not in self._overlapped
        self._overlapped.discard(delivery.seq)
        self.ended += 1
        self._latencies.append(latency)
        redact = self._redactor(self._name)
        reply = redact(outcome.text)[:STORED_REPLY] if outcome.text else None
        detail = shown(outcome.detail, redact) if outcome.detail else None
        status = shown(outcome.status, redact) if outcome.status else None
        self._audit.record(
            EventResponse(
                attempt=delivery.attempts,
                outcome=outcome.kind,
                status=status,
                detail=detail,
                latency_us=latency,
                response_bytes=outcome.size,
                response_sha256=outcome.sha256,
                response=reply,
            ),
            plugin=self._name,
            run=run,
            event_id=delivery.event.id,
            delivery_id=delivery.id,
            at=at,
        )
        self._note(delivery, outcome.kind, status, detail)
        if outcome.kind in ("ok", "skipped"):
            state: State = "ok" if outcome.kind == "ok" else "skipped"
            self._consumer.ack(delivery, Result(state, status, detail, reply, latency))
        elif outcome.kind == "rejected":
            self.give_up(delivery, detail or "rejected by the plugin", status, reply, latency)
        else:
            self._try_again(plugin, delivery, outcome, Result("retry", status or outcome.kind, detail, reply, latency))
            if broken:
                self._attribute_crash(delivery, run, alone=alone)
        if not self._in_flight:
            self._died.clear()

    def note_failure(self, plugin: Plugin | None, delivery: Delivery, error: Exception, *, sent: bool = False) -> None:
        """Log the failure of the host's own work on a delivery; that is an attempt, if there was none that was sent."""
        _log.error("plugin %s: a delivery failed within the host", self._name, exc_info=error)
        why = f"it failed within the host: {type(error).__name__}"
        if not delivery.taken or delivery.final:
            return  # it was concluded before
        if plugin is None:
            self.give_up(delivery, why)
        else:
            self.refuse(plugin, delivery, why, sent=sent)

    def refuse(self, plugin: Plugin, delivery: Delivery, why: str, *, sent: bool = False) -> None:
        """Have an attempt fail although nothing was ``sent``, or nobody knows what became of it."""
        self._in_flight.pop(delivery.seq, None)
        self._overlapped.discard(delivery.seq)
        self._note(delivery, "failed", "refused", why)
        delivery.attempts += 0 if sent else 1
        self._try_again(plugin, delivery, Outcome("failed"), Result("retry", "refused", why))

    def _note(self, delivery: Delivery, outcome: str, status: str | None, detail: str | None) -> None:
        assert delivery.event is not None
        now = time.time()
        self._last = (delivery.event.id, outcome, status, detail, now)
        if outcome in ("ok", "skipped"):
            self.failing_since = None
        elif outcome != "busy" and self.failing_since is None:
            self.failing_since = now

    def give_up(
        self,
        delivery: Delivery,
        why: str,
        status: str | None = None,
        reply: str | None = None,
        latency: int | None = None,
    ) -> None:
        """Make the delivery a dead letter, unless another host has it by now."""
        if delivery.final:
            return
        self._consumer.term(delivery, Result("dead", status, why, reply, latency))
        self._record_end(EventDead, delivery, why)

    def run_ended(self, run: str, *, crashed: bool) -> None:
        """Attribute a crash of the sidecar to the delivery that caused it, now or once it has concluded."""
        if not crashed:
            if self._crash_candidate is not None and self._crash_candidate[0] == run:
                self._crash_candidate = None
            return
        if run in self._in_flight.values():
            self._died.add(run)
        elif self._crash_candidate is not None and self._crash_candidate[0] == run:
            _, delivery, at = self._crash_candidate
            if asyncio.get_running_loop().time() - at < CRASH_WINDOW:
                self._count_crash(delivery)
        self._crash_candidate = None

    def _try_again(self, plugin: Plugin, delivery: Delivery, outcome: Outcome, result: Result) -> None:
        wait = outcome.retry_after
        if outcome.kind == "busy":
            delivery.attempts -= 1
            delivery.busy += 1
            self._consumer.nak(delivery, result, delay=1.0 if wait is None else wait)
        elif self._answered_in_vain(delivery, outcome):
            why = f"answered {UNREADABLE_REPLIES} times with what is no reply, perhaps after its work: {result.detail}"
            self.give_up(delivery, why, result.status, result.reply, result.latency_us)
        elif delivery.attempts >= plugin.attempts:
            why = f"{delivery.attempts} attempts failed; the last: {result.detail or result.status}"
            self.give_up(delivery, why, result.status, result.reply, result.latency_us)
        else:
            pause = RETRY_BACKOFF.after(delivery.attempts - 1) if wait is None else wait
            self._consumer.nak(delivery, result, delay=pause)

    @staticmethod
    def _answered_in_vain(delivery: Delivery, outcome: Outcome) -> bool:
        if (outcome.kind, outcome.status) == ("failed", "bad_reply"):
            delivery.unreadable += 1
        return delivery.unreadable >= UNREADABLE_REPLIES

    def _attribute_crash(self, delivery: Delivery, run: str, *, alone: bool) -> None:
        if not alone:
            self._isolated_retries[delivery.seq] = delivery
        elif run in self._died:
            self._count_crash(delivery)
        else:
            self._crash_candidate = (run, delivery, asyncio.get_running_loop().time())

    def _count_crash(self, delivery: Delivery) -> None:
        self._consumer.count_crash(delivery)
        if delivery.crashes >= CRASHES_TO_QUARANTINE and not (delivery.taken or delivery.final):
            why = f"the plugin crashed {delivery.crashes} times while handling it"
            self._consumer.term(delivery, Result("quarantined", detail=why))
            self._record_end(EventQuarantined, delivery, why)

    def _record_end(self, kind: type[EventDead | EventQuarantined], delivery: Delivery, why: str) -> None:
        self._audit.record(
            kind(reason=why, attempts=delivery.attempts),
            plugin=self._name,
            event_id=delivery.event_id or None,
            delivery_id=delivery.id if delivery.event_id else None,
        )
