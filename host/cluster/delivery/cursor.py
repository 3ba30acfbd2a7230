"""Cursors: how far this host has read the log for a plugin, and what it has to deliver of it.

``Held`` is a shard that this host alone delivers, under a lease: how far it is stands in the log, as its position.
``Own`` is a plugin of which every host has its own copy: how far it is stands in this host's database.
"""

from __future__ import annotations

import functools
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Iterable
from typing import Final

from host.cluster.delivery.places import Local, Place, Read, Subscriptions, is_later, shard_of_event
from host.cluster.delivery.queue import ClusterQueue
from host.cluster.entries import MAX_OPEN, MAX_TIMES, EventRef, Opened, Position, Range, Replay
from host.cluster.fold import Shard
from host.queue.interface import FINAL, Delivery, Result, Subscriber

MOST_OPEN: Final = MAX_OPEN
"""Deliveries of a cursor that are not final; beyond that it reads no further."""
MOST_ENDED: Final = 256
"""Deliveries of a shard that have ended and stand in no position that was read back; no move repeats more of them."""
_NEW: Final = Local("queued", 0, 0, 0.0)


class Cursor(ABC):
    """How far a plugin's events are read. A cursor that is ``behind`` reads them from the database once it has room."""

    def __init__(self, plugin: str, queue: ClusterQueue, subscriptions: Subscriptions, at: Place) -> None:
        self.plugin, self.at, self.behind = plugin, at, True
        self.open: dict[EventRef, Delivery] = {}
        """Deliveries that are not final, in the log's order."""
        self._queue, self._places, self._subscriptions = queue, queue.places, subscriptions
        self._refs: dict[int, EventRef] = {}

    def offer(self, reads: Iterable[Read]) -> None:
        """Take what has just come from the log."""
        if not self.behind:
            self._go(reads)

    def catch_up(self) -> None:
        """Read on as far as there is room."""
        while self.behind and len(self.open) < MOST_OPEN:
            reads = self._places.after(self.at)
            self.behind = bool(reads)
            self._go(reads)

    def _go(self, reads: Iterable[Read]) -> None:
        for read in reads:
            if len(self.open) >= MOST_OPEN:
                self.behind = True
                return
            self.at = read.at
            self._take(read)

    @abstractmethod
    def _take(self, read: Read) -> None:
        """Make a delivery of what was read, if it has one for the plugin."""

    def _subscriber(self, read: Read) -> Subscriber | None:
        if read.plugin not in (None, self.plugin) or read.of in self.open:
            return None
        return read.subscribers(self._subscriptions).get(self.plugin)

    def _note(self, ref: EventRef, delivery: Delivery) -> None:
        self.open[ref], self._refs[delivery.seq] = delivery, ref

    def ref_of(self, seq: int) -> EventRef | None:
        """The event of this host's number, if its delivery is open here."""
        return self._refs.get(seq)

    def close(self, ref: EventRef) -> None:
        """Count a delivery as ended."""
        delivery = self.open.pop(ref, None)
        if delivery is not None:
            self._refs.pop(delivery.seq, None)
        if self.behind and len(self.open) <= MOST_OPEN // 2:
            self.catch_up()

    @abstractmethod
    def ended(self, delivery: Delivery, result: Result) -> EventRef | None:
        """Note a final outcome; returns the event if all hosts have to know of it before it is closed."""


class Held(Cursor):
    """A shard that this host holds in an epoch. ``position`` is what the log has of it.

    If nobody else has written a position since this host held it last, what this host knows of its own deliveries is
    newer than the position: ``gave_up`` gets those that it gave up, with their states.
    """

    def __init__(
        self,
        shard: Shard,
        epoch: int,
        position: Position,
        queue: ClusterQueue,
        subscriptions: Subscriptions,
        gave_up: Callable[[Held, EventRef, str], None],
    ) -> None:
        # Who has held it may be hostile: what it says of senders that there are not would be in every later position.
        members, known = queue.places.state.members, queue.places.state.plugins[shard[0]]
        self.read = {ref.host: ref for ref in position.read if ref.host in members}
        at = queue.store.read(lambda db: queue.places.begin(db, self.read, known.began))
        super().__init__(shard[0], queue, subscriptions, at)
        self.shard, self.epoch, self._shards, self._gave_up = shard, epoch, known.plugin.shards, gave_up
        self.unconfirmed = 0
        """Deliveries that have ended and stand in no position that was read back."""
        self._ended = 0
        self._made: deque[tuple[Position, int]] = deque()
        """Positions that were handed out to be written, each with the number of deliveries that had ended."""
        self._written = position if position.epoch == epoch else None
        is_ours = position.epoch == queue.places.held_before(shard)
        refs = [one.event for one in position.open]
        self._local = queue.places.local(self.plugin, refs, at) if is_ours else {}
        self._left = {delivery.seq: delivery for delivery in queue.lane(self.plugin).pending()}
        """Deliveries that another process of this host had in flight, and handed over."""
        self.lost = self._take_open(position.open)
        """Events that are open and that this host does not have."""

    def _take_open(self, opened: Iterable[Opened]) -> list[EventRef]:
        figures = {one.event: one for one in opened}
        reads = self._places.of(figures)
        for read in reads:
            to = read.subscribers(self._subscriptions).get(self.plugin)
            # What a hostile holder calls open may be another shard's, whose holder has it.
            if read.event is not None and (to is None or self._is_of_shard(read.event.id, to.key)):
                # A plugin that subscribes no longer gives it up itself, with the reason.
                one = figures[read.ref]
                self._fill(read, to or Subscriber(self.plugin, None), Local("queued", one.attempts, one.crashes, 0.0))
        found = {read.ref for read in reads if read.event is not None}
        return [ref for ref in figures if ref not in found]

    def _take(self, read: Read) -> None:
        last = self.read.get(read.ref.host)
        if last is not None and not is_later(self._places.state.member(last.host), read.ref, last):
            return
        self.read[read.ref.host] = read.ref
        to = self._subscriber(read)
        if to is None or read.event is None:
            return
        if self._is_of_shard(read.event.id, to.key):
            self._fill(read, to, _NEW)

    def _is_of_shard(self, event_id: str, key: str | None) -> bool:
        return shard_of_event(event_id, key, self._shards) == self.shard[1]

    def _fill(self, read: Read, to: Subscriber, figures: Local) -> None:
        assert read.event is not None
        seq = read.event.seq
        local = self._local.pop(seq, None) if read.plugin is None else None
        left = self._left.pop(seq, None)
        if left is not None and not left.final:
            self._note(read.of, left)
            return
        if local is not None and local.state in ("ok", "skipped"):
            return  # it ended after the last position that the log has
        if local is not None and local.state in FINAL - {"moved"}:
            self._gave_up(self, read.of, local.state)
            self._note(read.of, Delivery(seq, self.plugin, to.key, local.attempts, local.crashes, final=True))
            return
        if local is not None and local.state != "moved":
            figures = local
        self._note(read.of, self._queue.fill(to, read.event, figures, self.epoch))

    def pass_over(self, unread: Iterable[Range]) -> None:
        """Go on behind events that this host has never read, and never will."""
        for one in unread:
            ref, last = EventRef(one.host, one.series, one.last), self.read.get(one.host)
            if last is None or is_later(self._places.state.member(one.host), ref, last):
                self.read[one.host] = ref

    def begin(self) -> None:
        """Read on from the position; what is in the lane and not open by the log is done already."""
        self.catch_up()
        left, self._left = self._left, {}
        for delivery in left.values():
            mine = self._is_of_shard(delivery.event_id, delivery.key)
            in_log = self._queue.store.read(functools.partial(self._places.ref_of, seq=delivery.seq)) is not None
            if mine and in_log and delivery.seq not in self._refs:
                self._queue.move([delivery])

    def ended(self, delivery: Delivery, result: Result) -> EventRef | None:
        ref = self.ref_of(delivery.seq)
        if ref is None:
            return None
        self._ended += 1
        self.unconfirmed += 1
        if result.state not in ("ok", "skipped"):
            return ref
        self.close(ref)
        return None

    def position(self) -> Position:
        """How far this host is with the shard."""
        times = ((ref, min(one.attempts, MAX_TIMES), min(one.crashes, MAX_TIMES)) for ref, one in self.open.items())
        opened = tuple(Opened(*one) for one in times)
        return Position(*self.shard, self.epoch, tuple(self.read[host] for host in sorted(self.read)), opened)

    @property
    def is_settled(self) -> bool:
        """Whether nothing is in flight, and the log has the position."""
        in_flight = any(one.taken and not one.final for one in self.open.values())
        return not in_flight and self.position() == self._written

    def to_write(self) -> Position | None:
        """The position, if the log has another one."""
        position = self.position()
        if position == self._written:
            return None
        if not self._made or self._made[-1][0] != position:
            self._made.append((position, self._ended))
        return position

    def read_back(self, position: Position) -> None:
        """Note that the log has a position: a move repeats nothing that had ended then."""
        self._written = position
        if any(made == position for made, _ in self._made):
            while self._made:
                made, ended = self._made.popleft()
                if made == position:
                    self.unconfirmed = self._ended - ended
                    return


class Own(Cursor):
    """A plugin of which this host has its own copy, whatever the others do."""

    def __init__(self, plugin: str, queue: ClusterQueue, subscriptions: Subscriptions, at: Place) -> None:
        super().__init__(plugin, queue, subscriptions, at)
        for delivery in queue.take_up(plugin):
            ref = queue.store.read(functools.partial(queue.places.ref_of, seq=delivery.seq))
            self._note(ref or EventRef(queue.host, 0, delivery.seq), delivery)

    def replays(self) -> list[Replay]:
        """Wishes to deliver what is open here where one host has the plugin from now on."""
        return [Replay(ref, self.plugin) for ref in self.open if ref.series]

    def _take(self, read: Read) -> None:
        to = self._subscriber(read)
        place = (self.plugin, *read.at)
        self._queue.store.submit(lambda db: db.execute("INSERT OR REPLACE INTO cluster_read VALUES (?,?,?)", place))
        if to is None or read.event is None or read.event.seq in self._refs:
            return
        if read.plugin is None and read.event.seq in self._places.local(self.plugin, [read.of], None):
            return  # it was delivered as it was emitted, while this host was cut off; or the log is read once more
        self._note(read.of, self._queue.fill(to, read.event, _NEW))

    def ended(self, delivery: Delivery, result: Result) -> EventRef | None:
        ref = self.ref_of(delivery.seq)
        if ref is not None:
            self.close(ref)
        return None
