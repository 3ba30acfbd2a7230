"""What becomes of an attempt: recorded in the trail and in the queue; who is to blame for a crash.

The one place that knows the rules of delivery: what counts as an attempt, when to try again, when to give up, and
when an event is quarantined because the plugin dies of it.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from host.channel.reply import Outcome
from host.delivery.attempts import Attempt, Attempts
from host.plugins.registry import Plugin
from host.plugins.secrets import Redactor
from host.queue.consumer import SqliteConsumer, backoff
from host.queue.interface import Delivery, Result, State
from isolator.audit.client import AuditClient
from isolator.audit.schema import EventDead, EventQuarantined, EventResponse

CRASHES_TO_QUARANTINE = 2
CRASH_WINDOW = 5.0
"""Seconds within which a death of the sidecar is blamed on the attempt whose connection broke."""
STORED_REPLY = 4096


class Outcomes:
    """The rules, for one plugin."""

    def __init__(
        self,
        name: str,
        consumer: SqliteConsumer,
        audit: AuditClient,
        redactor: Callable[[str], Redactor],
        attempts: Attempts,
    ) -> None:
        self._name, self._consumer, self._audit, self._redactor = name, consumer, audit, redactor
        self._attempts = attempts
        self._died: set[str] = set()
        self._suspect: tuple[str, Delivery, float] | None = None
        self._in_flight: dict[int, str] = {}
        self._overlapped: set[int] = set()
        self.careful: set[int] = set()
        """Events that were in flight together when the plugin crashed: each goes alone until it is cleared."""

    def begin(self, delivery: Delivery, run: str, request: bytes, send: Callable[[], None]) -> None:
        """Begin an attempt: ``send`` is called when it may be written, and must not raise; ``concluded`` comes last."""

        def written() -> None:
            if self._in_flight:
                self._overlapped |= {*self._in_flight, delivery.seq}
            self._in_flight[delivery.seq] = run
            send()

        self._attempts.begin(Attempt(delivery, run, request, written))

    def concluded(
        self, plugin: Plugin, delivery: Delivery, run: str, outcome: Outcome, latency: int, *, broken: bool
    ) -> None:
        """An attempt ended; ``broken``: the connection did, which may mean that the plugin died of it."""
        assert delivery.event is not None
        self._in_flight.pop(delivery.seq, None)
        alone = delivery.seq not in self._overlapped
        self._overlapped.discard(delivery.seq)
        redact = self._redactor(self._name)
        reply = redact(outcome.text)[:STORED_REPLY] if outcome.text else None
        detail = redact(outcome.detail) if outcome.detail else None
        self._audit.record(
            EventResponse(
                attempt=delivery.attempts,
                outcome=outcome.kind,
                status=outcome.status,
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
        )
        if outcome.kind in ("ok", "skipped"):
            state: State = "ok" if outcome.kind == "ok" else "skipped"
            self.careful.discard(delivery.seq)
            self._consumer.done(delivery, Result(state, outcome.status, detail, reply, latency))
        elif outcome.kind == "rejected":
            self.given_up(delivery, detail or "rejected by the plugin", outcome.status, reply, latency)
        else:
            self._try_again(
                plugin, delivery, outcome, Result("retry", outcome.status or outcome.kind, detail, reply, latency)
            )
            if broken:
                self._accuse(delivery, run, alone=alone)
        if not self._in_flight:
            self._died.clear()

    def refused(self, plugin: Plugin, delivery: Delivery, why: str) -> None:
        """Nothing was sent, and it counts as an attempt all the same."""
        delivery.attempts += 1
        self._try_again(plugin, delivery, Outcome("failed"), Result("retry", "refused", why))

    def given_up(
        self,
        delivery: Delivery,
        why: str,
        status: str | None = None,
        reply: str | None = None,
        latency: int | None = None,
    ) -> None:
        """A dead letter."""
        self.careful.discard(delivery.seq)
        self._consumer.done(delivery, Result("dead", status, why, reply, latency))
        self._record_end(EventDead, delivery, why)

    def run_died(self, run: str) -> None:
        """The sidecar ended and nobody wanted that."""
        if run in self._in_flight.values():
            self._died.add(run)
        elif self._suspect is not None and self._suspect[0] == run:
            _, delivery, at = self._suspect
            if asyncio.get_running_loop().time() - at < CRASH_WINDOW:
                self._blame(delivery)
        self._suspect = None

    def _try_again(self, plugin: Plugin, delivery: Delivery, outcome: Outcome, result: Result) -> None:
        wait = outcome.retry_after
        if outcome.kind == "busy":
            delivery.attempts -= 1
            self._consumer.again(delivery, result, delay=1.0 if wait is None else wait)
        elif delivery.attempts >= plugin.attempts:
            why = f"{delivery.attempts} attempts failed; the last: {result.detail or result.status}"
            self.given_up(delivery, why, result.status, result.reply, result.latency_us)
        else:
            self._consumer.again(delivery, result, delay=backoff(delivery.attempts) if wait is None else wait)

    def _accuse(self, delivery: Delivery, run: str, *, alone: bool) -> None:
        if not alone:
            # Several were in flight and one of them may be the culprit: from now on each is tried alone.
            self.careful.add(delivery.seq)
        elif run in self._died:
            self._blame(delivery)
        else:
            self._suspect = (run, delivery, asyncio.get_running_loop().time())

    def _blame(self, delivery: Delivery) -> None:
        self._consumer.note_crash(delivery)
        if delivery.crashes >= CRASHES_TO_QUARANTINE:
            why = f"the plugin crashed {delivery.crashes} times while handling it"
            if self._consumer.cancel(delivery.seq, Result("quarantined", detail=why)) is not None:
                self.careful.discard(delivery.seq)
                self._record_end(EventQuarantined, delivery, why)

    def _record_end(self, kind: type[EventDead | EventQuarantined], delivery: Delivery, why: str) -> None:
        self._audit.record(
            kind(reason=why, attempts=delivery.attempts),
            plugin=self._name,
            event_id=delivery.event.id if delivery.event is not None else None,
            delivery_id=delivery.id if delivery.event is not None else None,
        )
