"""Embedded queue: events and deliveries in the host's database, lanes in memory.

``accept`` writes the event and one delivery per subscriber in one transaction and returns once that is synced; only
then do the deliveries enter their lanes, so nothing is ever dispatched that a power cut could still take back.
An attempt is counted before it is sent. When an event is accepted for a plugin that waits for one, that is done in
the event's own transaction: should the host die before it is sent, one attempt too many is counted, never too few.
Outcomes are written in the same order in which they happen and ride along with the next sync: after a crash the
log holds a prefix of history, so events that are delivered twice are delivered twice *in order*.

At start every delivery that is not final goes back into its lane. One that was in flight counts as an attempt whose
outcome is unknown and waits for its back-off; where this process takes the place of another, whose requests it goes on
with, it stays in flight.

The database stays bounded: finished deliveries are dropped after ``keep_seconds`` or beyond ``keep_events`` events,
dead ones beyond ``keep_dead`` per plugin. A plugin's queue holds at most ``limit`` deliveries; one more is recorded
as dead with the reason ``queue_full``, where it can be seen and replayed.
"""

from __future__ import annotations

import asyncio
import sqlite3
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from functools import partial
from typing import Any

from host.database.store import Store
from host.events import format_time, new_event_id
from host.queue import rows
from host.queue.accepting import Accepting, Answer, prepare_requests
from host.queue.consumer import SqliteConsumer
from host.queue.interface import (
    FINAL,
    QUEUE_FULL,
    RETRY_BACKOFF,
    Accepted,
    Beside,
    Changed,
    Delivery,
    Event,
    EventRow,
    NewEvent,
    Result,
    Subscriber,
    nothing,
)
from host.queue.listing import Listing
from host.queue.states import States
from host.queue.watching import Watcher
from isolator.audit.client import Moment, moment
from isolator.errors import UsageError

_READ_AHEAD = 1 << 14
"""Characters of a payload that is read before its turn comes."""
_PRUNE_EVERY = 1000
_PENDING_TYPES: tuple[Any, ...] = (int, str, (str, type(None)), int, int, (int, float), (int, float), str)
"""Types of the columns that ``SqliteQueue`` takes up at its start."""
REPLAY_TTL = 86400.0
"""Seconds that a delivery has at least which is queued again."""
LONGEST_WAIT = 720.0
"""Seconds: the longest back-off with its spread. A row that is due later was written under another clock."""

_INTERRUPTED = Result("retry", detail="the host stopped while this was in flight")

Requeued = tuple[Event, Subscriber]
"""An event, and the plugin that it is queued for again."""


class SqliteQueue(Listing):
    """The queue of one host process; see ``host.queue.interface.Queue``.

    ``after``: events get higher numbers than this one. ``in_flight``: event numbers by plugin of the deliveries whose
    requests this process takes over from another (``Consumer.retake``).
    ``on_accepted`` is called once per accepted event when it is answered, with the moment that all of one sync share,
    before anything of it can be dispatched;
    ``on_ready`` when events have entered their lanes: the takers that waited have sent them or run in the next turn;
    ``on_expired`` for each delivery that expired unsent.
    """

    def __init__(
        self,
        store: Store,
        *,
        limit: int = 10_000,
        keep_events: int = 50_000,
        keep_seconds: float = 14 * 86400.0,
        keep_dead: int = 10_000,
        after: int = 0,
        in_flight: Mapping[str, Collection[int]] | None = None,
        on_accepted: Callable[[NewEvent, Accepted, Moment], None] = lambda *_: None,
        on_ready: Callable[[], None] = lambda: None,
        on_expired: Callable[[Delivery], None] = lambda _: None,
    ) -> None:
        self.store = store
        self.limit = limit
        self._on_accepted, self._on_ready, self._on_expired = on_accepted, on_ready, on_expired
        self._keep = (keep_events, keep_seconds, keep_dead)
        self._loop = asyncio.get_running_loop()
        self._consumers: dict[str, SqliteConsumer] = {}
        self._purges: dict[str, int] = {}
        """How often each name was purged."""
        self._watchers: dict[str, set[Watcher]] = {}
        self._states: States | None = None
        self._accepting: list[Accepting] | None = None
        self._seq = max(after, store.read(rows.newest_number))
        self._since_prune = self._pruned = 0
        self.kept_back: Callable[[], str] = str
        """Why events of this host reach no other at the moment; empty if they do, and where there is no other."""
        self.unreadable = 0
        """Deliveries whose rows are damaged; they are left alone."""
        self._recover(in_flight or {})

    # Accepting

    @staticmethod
    def _id_of(_: NewEvent, now: float) -> str:
        return new_event_id(now)

    async def accept(self, event: NewEvent, subscribers: Sequence[Subscriber]) -> Accepted:
        future: asyncio.Future[Accepted] = self._loop.create_future()

        def done(accepted: Accepted | None, error: Exception | None) -> None:
            if future.done():
                return
            if accepted is not None:
                future.set_result(accepted)
            elif error is not None:
                future.set_exception(error)

        self.submit(event, subscribers, done)
        return await future

    def submit(self, event: NewEvent, subscribers: Sequence[Subscriber], done: Answer) -> None:
        """As ``accept`` without a task: ``done(accepted, error)`` is called on the loop."""
        now = time.time()
        self._seq += 1
        # By their places: a named tuple takes names in twice the time.
        stored = Event(
            self._seq, self._id_of(event, now), event.name, format_time(now), now, now + event.ttl, event.payload,
            event.subject, event.trace,
        )  # fmt: skip
        entry = Accepting(event, stored, [], {}, [], done)
        if self._accepting is None:
            batch = self._accepting = [entry]
            self.store.submit(
                lambda db: self._insert(db, batch), lambda _, error: self._inserted(batch, error), durable=True,
                meanwhile=lambda: prepare_requests(batch),
            )  # fmt: skip
        else:
            self._accepting.append(entry)
        # Before the transaction, which is for the loop's next turn; what is prepared here begins behind it.
        for subscriber in subscribers:
            consumer = self.consumer(subscriber.plugin)
            if consumer.depth + consumer.reserved < self.limit:
                consumer.reserved += 1
                entry.admitted.append((subscriber, consumer))
                # While the event is being synced the way to an idle plugin can be prepared. Not when it may turn out
                # to be a duplicate: a connection that is made has to be used.
                if event.dedupe_key is None and (prepare := consumer.announce(len(subscribers) == 1)) is not None:
                    entry.counted[subscriber.plugin] = prepare
            else:
                entry.overflowed.append(subscriber)

    def _insert(self, db: sqlite3.Connection, batch: list[Accepting]) -> None:
        # May run again when the transaction fails: it must depend on the batch alone.
        if self._accepting is batch:
            self._accepting = None
        events: list[tuple[Any, ...]] = []
        deliveries: list[tuple[Any, ...]] = []
        seen: dict[str, Event] = {}
        for entry in batch:
            new, event = entry.new, entry.event
            if new.dedupe_key is not None:
                entry.earlier = seen.get(new.dedupe_key) or rows.event(db, "dedupe_key=?", new.dedupe_key)
                if entry.earlier is not None:
                    continue
                seen[new.dedupe_key] = event
            seq, at = event.seq, event.accepted
            row = (seq, event.id, event.name, event.time, at, event.expires, event.subject, event.payload)
            events.append((*row, new.dedupe_key, event.trace, new.by))
            for s, _ in entry.admitted:
                state, attempts = ("in_flight", 1) if s.plugin in entry.counted else ("queued", 0)
                deliveries.append((seq, s.plugin, state, attempts, s.key, None, at))
            deliveries += [(seq, s.plugin, "dead", 0, s.key, QUEUE_FULL, at) for s in entry.overflowed]
        db.executemany("INSERT INTO events VALUES (?,?,?,?,?,?,?,?,?,?,?)", events)
        db.executemany(
            "INSERT INTO deliveries (seq, plugin, state, attempts, key, detail, updated) VALUES (?,?,?,?,?,?,?)",
            deliveries,
        )

    def _inserted(self, batch: list[Accepting], error: Exception | None) -> None:
        if self._accepting is batch:
            self._accepting = None
        now = self._loop.time()
        at: Moment | None = None
        # First the answers are written, then the records and with them those of the attempts, then the requests: each
        # wakes somebody, and there are fewer processors than that.
        for entry in batch:
            for _, consumer in entry.admitted:
                consumer.reserved -= 1
            accepted = entry.accepted() if error is None else None
            entry.answer(accepted, error)
            if accepted is not None and entry.earlier is None:
                at = at or moment()  # behind the first answer, from which on a dispatch counts
                self._on_accepted(entry.new, accepted, at)
        if error is None:
            for entry in batch:
                if entry.earlier is None:
                    self._enter_lanes(entry, now)
        self._on_ready()
        self._since_prune += len(batch)
        if self._since_prune >= _PRUNE_EVERY:
            self._since_prune = 0
            self._start_prune()

    def _start_prune(self) -> None:
        events, seconds, dead = self._keep
        oldest = self._seq - events

        def pruned(upto: Any, error: Exception | None) -> None:
            if error is None:
                self._pruned = upto

        self.store.submit(
            lambda db: rows.prune(db, oldest, time.time() - seconds, dead, self._pruned, self._needed(db)), pruned
        )

    def _needed(self, _: sqlite3.Connection) -> int | None:
        """The number of the first event that has to stay though nothing of it is in this queue; None: there is none."""
        return None

    def _enter_lanes(self, entry: Accepting, now: float) -> None:
        event, counted = entry.event, entry.counted
        seq, expires = event.seq, now + entry.new.ttl
        for (plugin, key), consumer in entry.admitted:
            consumer.add(Delivery(seq, plugin, key, 0, 0, expires, now, plugin in counted), event)

    # Delivering

    def consumer(self, plugin: str) -> SqliteConsumer:
        consumer = self._consumers.get(plugin)
        if consumer is None:
            consumer = self._consumers[plugin] = self._new_consumer()
        return consumer

    def _new_consumer(self) -> SqliteConsumer:
        return SqliteConsumer(self, self._on_expired)

    async def sent(self, deliveries: Sequence[Delivery]) -> None:
        fresh = [delivery for delivery in deliveries if not (delivery.counted or delivery.final)]
        for delivery in deliveries:
            delivery.attempts += 1
            delivery.counted = False
        if fresh:
            self._open_states().begin(fresh)
            await self.store.committed()

    def write(self, delivery: Delivery, result: Result, due: float) -> None:
        """Record the state of a delivery and the Unix time of its next attempt; wakes those who wait for its event."""
        self._open_states().end(delivery, result, due)
        if self._watchers and delivery.event_id:
            for watcher in self._watchers.get(delivery.event_id, ()):
                watcher.note(delivery.plugin, result.state)

    def _open_states(self) -> States:
        """The states of the next transaction."""
        states = self._states
        if states is None:
            states = self._states = States()
            self.store.submit(partial(self._write_states, states), lazy=True)
        return states

    def _write_states(self, states: States, db: sqlite3.Connection) -> None:
        if self._states is states:
            self._states = None
        states.write(db)

    def load(self, delivery: Delivery, upcoming: Sequence[Delivery]) -> None:
        """Read the payload of a delivery and of those that follow soon; ``event`` stays None where it is pruned."""
        wanted = [delivery, *(d for d in upcoming if d.event is None and d is not delivery)]
        marks = ",".join("?" * len(wanted))
        found = self.store.read(
            lambda db: db.execute(
                f"{rows.EVENT} WHERE seq IN ({marks}) AND (seq=? OR length(payload)<=?)",
                [*(d.seq for d in wanted), delivery.seq, _READ_AHEAD],
            ).fetchall()
        )
        events = {row[0]: rows.read_event(row) for row in found}
        for item in wanted:
            item.load(events.get(item.seq))

    def write_due(self, delivery: Delivery, due: float) -> None:
        """Record the Unix time of a waiting delivery's next attempt (0: at once)."""
        values = (due, delivery.seq, delivery.plugin)
        self.store.submit(lambda db: db.execute("UPDATE deliveries SET due=? WHERE seq=? AND plugin=?", values))

    def write_crashes(self, delivery: Delivery) -> None:
        """Record ``delivery.crashes``."""
        values = (delivery.crashes, delivery.seq, delivery.plugin)
        self.store.submit(lambda db: db.execute("UPDATE deliveries SET crashes=? WHERE seq=? AND plugin=?", values))

    # Listing and repeating

    async def replay(self, event_id: str, plugin: str | None = None, beside: Beside = nothing) -> list[str]:
        event = self._event(event_id)
        now = time.time()

        def requeue(db: sqlite3.Connection) -> list[Requeued]:
            found = rows.replay(db, event.seq, plugin, now, now + REPLAY_TTL)
            beside(db, [Changed(name, attempts) for name, _, attempts in found])
            return [(event, Subscriber(name, key)) for name, key, _ in found]

        return [subscriber.plugin for _, subscriber in await self.requeue(requeue)]

    async def requeue(self, apply: Callable[[sqlite3.Connection], list[Requeued]]) -> list[Requeued]:
        """Let deliveries enter their lanes that ``apply`` writes as queued, in one transaction; returns them.

        Those of a plugin that was removed meanwhile are left out.
        """
        purges = dict(self._purges)
        queued = await self.store.run(apply)
        requeued = [(event, to) for event, to in queued if purges.get(to.plugin) == self._purges.get(to.plugin)]
        now, loop_now = time.time(), self._loop.time()
        for event, to in requeued:
            expires = loop_now + max(event.expires - now, REPLAY_TTL)
            self.consumer(to.plugin).add(Delivery(event.seq, to.plugin, to.key, expires=expires, ready_at=loop_now))
        return requeued

    async def retry(self, event_id: str, plugin: str | None = None, beside: Beside = nothing) -> list[Changed]:
        """Try deliveries that wait for their retry at once, each in its place; raises UsageError if there is none."""
        changed, earlier = [], None
        for delivery in self._pending(event_id, plugin):
            if delivery.taken:
                continue
            before = self.consumer(delivery.plugin).expedite(delivery)
            if before is None:
                changed.append(Changed(delivery.plugin, delivery.attempts))
            else:
                earlier = before
        if not changed and earlier is not None:
            if not earlier.event_id:
                self.load(earlier, ())
            why = f"{earlier.event_id} is before it in the order of its key"
            raise UsageError(f"event {event_id}", why, f"isolator event retry {earlier.event_id}, or skip it")
        if not changed:
            remedy = f"see 'isolator event show {event_id}'; what was given up: isolator event replay"
            raise UsageError(f"event {event_id}", "none of its deliveries waits to be tried", remedy)
        self.store.submit(lambda db: beside(db, changed))  # as the change itself: kept while the disk is full
        await self.store.run(lambda _: None)
        return changed

    async def end(
        self, event_id: str, plugin: str | None, result: Result, beside: Beside = nothing
    ) -> list[Changed]:  # fmt: skip
        """End the deliveries of an event that wait; raises UsageError if none does, or one is in flight.

        One that is in flight may still be handled, and later events of its key must not overtake it.
        """
        pending = self._pending(event_id, plugin)
        if not pending:
            raise UsageError(f"event {event_id}", "none of its deliveries waits", "see 'isolator event show'")
        taken = next((delivery.plugin for delivery in pending if delivery.taken), None)
        if taken is not None:
            remedy = f"isolator plugin pause {taken}, and try again when its attempt has ended"
            raise UsageError(f"event {event_id}", f"it is in flight in {taken}", remedy)
        for delivery in pending:
            delivery.event_id = event_id  # whoever waits for the event is woken
            self.consumer(delivery.plugin).term(delivery, result)
        changed = [Changed(delivery.plugin, delivery.attempts) for delivery in pending]
        self.store.submit(lambda db: beside(db, changed))  # as the change itself: kept while the disk is full
        await self.store.run(lambda _: None)
        return changed

    def _pending(self, event_id: str, plugin: str | None) -> list[Delivery]:
        """The deliveries of an event that are not final, or that of one plugin; raises NotFoundError."""
        seq = self._event(event_id).seq
        consumers = self._consumers.values() if plugin is None else [self.consumer(plugin)]
        return [found for consumer in consumers if (found := consumer.find(seq)) is not None]

    def has_missed(self, db: sqlite3.Connection, plugin: str, seq: int) -> bool:
        """Whether a plugin never had an event of which there is no delivery here."""
        return True

    def drop(self, plugin: str) -> int:
        """Hold nothing of a removed plugin's deliveries any more; returns how many were not final."""
        self._purges[plugin] = self._purges.get(plugin, 0) + 1
        consumer = self._consumers.pop(plugin, None)
        return consumer.drop_all() if consumer is not None else 0

    async def purge(self, plugin: str) -> int:
        waiting = self.drop(plugin)
        await self.store.run(lambda db: db.execute("DELETE FROM deliveries WHERE plugin=?", (plugin,)).rowcount)
        self._look_again()
        return waiting

    def _look_again(self) -> None:
        """Have those look again who wait for the end of an event."""
        for watchers in self._watchers.values():
            for watcher in watchers:
                watcher.look_again()

    async def wait(self, event_id: str, *, timeout: float) -> EventRow:
        """Wait at most ``timeout`` seconds until all deliveries of an event are final; returns it as it then stands."""
        watcher = Watcher()
        watchers = self._watchers.setdefault(event_id, set())
        watchers.add(watcher)
        try:
            async with asyncio.timeout(timeout):
                while True:
                    watcher.begin()
                    # An outcome wakes its watchers at once and is written in the loop's next turn: the row must include
                    # outcomes from before we watched, or nothing would ever wake us.
                    await self.store.committed()
                    row = self.show(event_id)
                    if all(delivery.state in FINAL for delivery in row.deliveries):
                        return row
                    await watcher.ended({one.plugin for one in row.deliveries if one.state not in FINAL})
        except TimeoutError:
            return self.show(event_id)
        finally:
            watchers.discard(watcher)
            if not watchers:
                self._watchers.pop(event_id, None)

    def depths(self) -> dict[str, int]:
        """Number of pending deliveries by plugin."""
        return {plugin: consumer.depth for plugin, consumer in self._consumers.items()}

    def oldest(self) -> dict[str, float]:
        """Unix time at which the oldest event was accepted that waits, by plugin."""
        numbers = {name: seq for name, consumer in self._consumers.items() if (seq := consumer.oldest) is not None}
        return {name: at for name, seq in numbers.items() if (at := self._accepted_at(seq)) is not None}

    def _accepted_at(self, seq: int) -> float | None:
        row = self.store.read(lambda db: db.execute("SELECT accepted FROM events WHERE seq=?", (seq,)).fetchone())
        return row[0] if row is not None and isinstance(row[0], float) else None

    def end_lost_requests(self) -> None:
        """Repeat the deliveries whose requests were to be taken over and were not, as after a crash of the host."""
        for consumer in self._consumers.values():
            for delivery in consumer.not_retaken():
                consumer.nak(delivery, _INTERRUPTED, delay=RETRY_BACKOFF.after(delivery.attempts - 1))

    def _unfinished(self, _: Mapping[str, Collection[int]]) -> list[tuple[Any, ...]]:
        """The deliveries on disk that this process goes on with."""
        return self.store.read(rows.pending)

    def _recover(self, in_flight: Mapping[str, Collection[int]]) -> None:
        now, loop_now = time.time(), self._loop.time()
        for row in self._unfinished(in_flight):
            if not all(isinstance(value, kind) for value, kind in zip(row, _PENDING_TYPES, strict=True)):
                self.unreadable += 1
                continue
            seq, plugin, key, attempts, crashes, due_at, expires, state = row
            due = due_at
            delivery = Delivery(seq, plugin, key, attempts, crashes, expires=loop_now + max(0.0, expires - now))
            if state == "in_flight" and seq in in_flight.get(plugin, ()):
                self.consumer(plugin).add_in_flight(delivery)
                continue
            if state == "in_flight":
                due = now + RETRY_BACKOFF.after(attempts - 1)
                self._open_states().end(delivery, _INTERRUPTED, due)
            if due > 0.0:
                # The clock may have been set back meanwhile.
                delivery.due = loop_now + min(max(0.0, due - now), LONGEST_WAIT)
            self.consumer(plugin).add(delivery)
