"""Queue of a host in a cluster: what is emitted goes to the log, and lanes are filled by those who read the log.

All else is as on a single host. A delivery whose outcome is final is reported to ``on_final``, and a plugin whose
deliveries are held back is given none.
"""

from __future__ import annotations

import asyncio
import hashlib
import sqlite3
import time
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from host.cluster.delivery import cloudevent
from host.cluster.delivery.fates import Fates
from host.cluster.delivery.places import Local, Places, Subscriptions
from host.cluster.delivery.replies import Replies
from host.cluster.entries import Event as LogEvent
from host.cluster.entries import EventRef, Replay
from host.database.store import Store
from host.queue import rows
from host.queue.accepting import Accepting, Answer
from host.queue.consumer import SqliteConsumer
from host.queue.interface import FINAL, Delivery, Event, EventRow, NewEvent, Prepare, Result, Subscriber
from host.queue.lane import Lane
from host.queue.sqlite import Requeued, SqliteQueue
from isolator.errors import UnavailableError

Emit = Callable[[sqlite3.Connection, LogEvent | Replay], EventRef]
_PRUNE_EVERY = 1000
_MOVED = Result("moved", detail="another host goes on with it")


def _not_yet(_: sqlite3.Connection, __: LogEvent | Replay) -> EventRef:
    raise UnavailableError("the cluster", "is not joined yet: this host is being started", "try again")


class _GatedLane(Lane):
    """A lane that gives nothing while it is closed."""

    def __init__(self) -> None:
        super().__init__()
        self.closed = False

    def pop(self, now: float) -> Delivery | None:
        return None if self.closed else super().pop(now)

    def next_due(self) -> float | None:
        return None if self.closed else super().next_due()


class ClusterConsumer(SqliteConsumer):
    """One plugin's lane; deliveries leave it also because another host has the plugin."""

    def __init__(self, rows: SqliteQueue, on_expired: Callable[[Delivery], None]) -> None:
        super().__init__(rows, on_expired)
        self._gate = self._lane = _GatedLane()

    async def take(
        self,
        on_delivery_pending: Callable[[bool], Prepare | None] | None = None,
        send_now: Callable[[Delivery], bool] | None = None,
        room: Callable[[], float] = lambda: 1.0,
    ) -> Delivery:
        """As ``SqliteConsumer.take``, but nothing is offered: a cursor notes a delivery before that can end."""
        return await super().take(on_delivery_pending)

    def hold_back(self, closed: bool) -> None:
        """Give nothing to the taker from now on, or again."""
        if closed != self._gate.closed:
            self._gate.closed = closed
            self._wake()

    def pending(self) -> list[Delivery]:
        """The deliveries that are not final."""
        return self._lane.pending()

    def move(self, delivery: Delivery) -> None:
        """End a delivery here, in flight or not."""
        if not delivery.final:
            self._lane.remove(delivery)
            self._rows.write(delivery, _MOVED, 0.0)

    def drop_all(self) -> int:
        closed, dropped = self._gate.closed, super().drop_all()
        self._gate = self._lane = _GatedLane()
        self._gate.closed = closed
        return dropped


class ClusterQueue(SqliteQueue):
    """The queue of one host process in a cluster; see ``host.queue.interface.Queue``.

    Only deliveries whose requests another process of this host has sent come back from the disk by themselves.
    """

    def __init__(self, store: Store, host: str, **options: Any) -> None:
        self.host = host
        self.places = Places(store, host, self._next)
        self.emit: Emit = _not_yet
        """Numbers an event for the log, in a transaction."""
        self.on_final: Callable[[Delivery, Result], None] = lambda _, __: None
        self.subscribers: Subscriptions = lambda _: {}
        self.is_of_one: Callable[[str], bool] = lambda _: True
        """Whether one host has the work of a plugin, or of each of its shards."""
        self.may_act: Callable[[str], bool] = lambda _: False
        """Whether a plugin may be sent anything at the moment."""
        self.has_ended: Callable[[str], bool] = lambda _: False
        """Whether a plugin that this host has is the cluster's no more: no event is for it."""
        self.is_cut_off: Callable[[], bool] = lambda: False
        """Whether the log is out of reach: plugins that run on all hosts then get this host's events at once."""
        self.replies: Replies | None = None
        """Who asks other hosts about deliveries, once this one has joined."""
        self._settled = asyncio.Event()
        super().__init__(store, **options)
        self.kept_back = lambda: "this host is being started, and has not joined its cluster yet"

    # Emitting

    def _next(self) -> int:
        self._seq += 1
        return self._seq

    @staticmethod
    def _id_of(new: NewEvent, now: float) -> str:
        if new.dedupe_key is None:
            return SqliteQueue._id_of(new, now)
        unique = "\n".join((new.name, new.dedupe_key))
        return f"ev_{hashlib.sha256(unique.encode()).hexdigest()[:28]}"

    def submit(self, event: NewEvent, subscribers: Sequence[Subscriber], done: Answer) -> None:
        subscribers = [one for one in subscribers if not self.has_ended(one.plugin)]
        here = [one for one in subscribers if self.is_cut_off() and self.may_act(one.plugin)]
        super().submit(event, here, done)
        assert self._accepting is not None
        self._accepting[-1].others = tuple(one.plugin for one in subscribers if one not in here)

    def _insert(self, db: sqlite3.Connection, batch: list[Accepting]) -> None:
        super()._insert(db, batch)
        for entry in batch:
            if entry.earlier is None:
                text = cloudevent.write(entry.event, entry.new, self.host)
                ref = self.emit(db, LogEvent(text, entry.new.dedupe_key or ""))
                self.places.expect(db, ref, entry.event.seq)

    async def requeue(self, apply: Callable[[sqlite3.Connection], list[Requeued]]) -> list[Requeued]:
        elsewhere: list[Requeued] = []

        def repeat(db: sqlite3.Connection) -> list[Requeued]:
            found = apply(db)
            elsewhere.clear()
            here = []
            for event, to in found:
                ref = self.places.ref_of(db, event.seq) if self.is_of_one(to.plugin) else None
                if ref is None:  # or it was emitted before this host had a cluster
                    here.append((event, to))
                    continue
                self.emit(db, Replay(ref, to.plugin))
                db.execute("UPDATE deliveries SET state='moved' WHERE seq=? AND plugin=?", (event.seq, to.plugin))
                elsewhere.append((event, to))
            return here

        return await super().requeue(repeat) + elsewhere

    def show(self, event_id: str) -> EventRow:
        row, standing = super().show(event_id), self.places.standing(event_id)
        if standing is None:
            return row
        fates = Fates(self.places.state, self.host, *standing)
        return replace(row, deliveries=fates.merged(row.deliveries, self.subscribers(standing[0])))

    async def complete(self, row: EventRow) -> EventRow:
        standing = self.places.standing(row.id)
        if standing is None or self.replies is None:
            return row
        fates = Fates(self.places.state, self.host, *standing)
        elsewhere = fates.elsewhere(super().show(row.id).deliveries, self.subscribers(standing[0]))
        return replace(row, deliveries=tuple(await self.replies.complete(row.deliveries, elsewhere)))

    def has_missed(self, db: sqlite3.Connection, plugin: str, seq: int) -> bool:
        """See ``SqliteQueue``; what one host has, another has delivered or will: only events from before are missed."""
        known = self.places.state.plugins.get(plugin) if self.is_of_one(plugin) else None
        if known is None:
            return not self.has_ended(plugin)
        found = db.execute("SELECT place FROM cluster_events WHERE seq=? AND plugin IS NULL", (seq,)).fetchone()
        return found is None or (found[0] is not None and found[0] <= known.began)

    # Lanes

    def _new_consumer(self) -> ClusterConsumer:
        return ClusterConsumer(self, self._on_expired)

    def lane(self, plugin: str) -> ClusterConsumer:
        """A plugin's lane."""
        consumer = self.consumer(plugin)
        assert isinstance(consumer, ClusterConsumer)
        return consumer

    def _unfinished(self, in_flight: Mapping[str, Collection[int]]) -> list[tuple[Any, ...]]:
        return [row for row in self.store.read(rows.pending) if row[0] in in_flight.get(row[1], ())]

    def take_up(self, plugin: str) -> list[Delivery]:
        """Let what is left of a plugin enter its lane, in the log's order; only of one that runs on all hosts."""
        there = {delivery.seq for delivery in self.lane(plugin).pending()}
        left = self.places.left(plugin)
        return [self.fill(to, event, local) for to, event, local in left if event.seq not in there]

    def fill(self, to: Subscriber, event: Event, local: Local, epoch: int = 0) -> Delivery:
        """Let a delivery enter its lane, behind those that are there; what the log has is safe already."""
        now, loop_now = time.time(), self._loop.time()
        delivery = Delivery(event.seq, to.plugin, to.key, local.attempts, local.crashes, ready_at=loop_now, epoch=epoch)
        delivery.expires = loop_now + max(0.0, event.expires - now)
        delivery.due = loop_now + max(0.0, local.due - now) if local.due else 0.0
        delivery.event_id = event.id
        row = (event.seq, to.plugin, to.key, local.attempts, local.crashes, local.due, now)
        self.store.submit(lambda db: db.execute(_FILL, row))
        self.lane(to.plugin).add(delivery, event)
        return delivery

    def move(self, deliveries: Iterable[Delivery]) -> None:
        """End deliveries here: another host goes on with them."""
        for delivery in deliveries:
            self.lane(delivery.plugin).move(delivery)

    def write(self, delivery: Delivery, result: Result, due: float) -> None:
        super().write(delivery, result, due)
        self._settled.set()
        if result.state in FINAL and result.state != "moved":
            self.on_final(delivery, result)

    def count(self, events: int) -> None:
        """Count events of the log: now and then the oldest are pruned."""
        self._since_prune += events
        if self._since_prune >= _PRUNE_EVERY:
            self._since_prune = 0
            self._start_prune()

    async def settled(self) -> None:
        """Return when something was delivered, or the log was read."""
        self._settled.clear()
        await self._settled.wait()

    def look(self) -> None:
        """Have those look again who wait for the end of an event on another host."""
        self._settled.set()
        self._look_again()

    def _needed(self, db: sqlite3.Connection) -> int | None:
        return self.places.needed(db, time.time())


_FILL = (
    "INSERT INTO deliveries (seq, plugin, state, key, attempts, crashes, due, updated)"
    " VALUES (?1,?2,'queued',?3,?4,?5,?6,?7) ON CONFLICT DO UPDATE"
    " SET state='queued', key=?3, attempts=?4, crashes=?5, due=?6, detail=NULL, updated=?7"
)
