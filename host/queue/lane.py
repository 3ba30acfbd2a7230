"""Scheduling of one plugin's pending deliveries, in memory.

Per key the deliveries stand in order of acceptance and only the first may move; a first one that waits for its
retry, or is in flight, holds back the rest of its key and nothing else. Among the keys whose first may go, the
oldest delivery goes first. All times here are those of a monotonic clock, so that setting the clock of the host
neither fires every retry at once nor stops them for a day.

Every method but ``expedite`` and ``pending`` is O(log n); a delivery that waits costs some 350 bytes because its
payload stays on disk.
"""

from __future__ import annotations

import heapq
import itertools

from host.queue.interface import Delivery

_places = itertools.count()
"""Numbers of entries in the order of a lane."""


class Lane:
    """Pending deliveries of one plugin; knows nothing of storage."""

    def __init__(self) -> None:
        self.depth = 0
        self._last: dict[object, Delivery] = {}
        """The newest of each key, behind which the next one stands."""
        # Only the entry with a delivery's newest ``place`` counts; it may have others, and stand beside its replay.
        self._ready: list[tuple[int, int, Delivery]] = []
        self._waiting: list[tuple[float, int, int, Delivery]] = []
        self._oldest: list[tuple[int, int, Delivery]] = []

    @property
    def oldest(self) -> Delivery | None:
        """The delivery of the oldest event that is not final."""
        while self._oldest and self._oldest[0][2].final:
            heapq.heappop(self._oldest)
        return self._oldest[0][2] if self._oldest else None

    def add(self, delivery: Delivery) -> None:
        """Append a delivery; within its key it comes after all that were added before. It may be ``taken`` already."""
        self.depth += 1
        if len(self._oldest) > 2 * self.depth + 8:  # many have passed; each keeps its event in memory
            self._oldest = [entry for entry in self._oldest if not entry[2].final]
            heapq.heapify(self._oldest)
        delivery.place = next(_places)
        entry = (delivery.seq, delivery.place, delivery)
        heapq.heappush(self._oldest, entry)
        key = self._key(delivery)
        delivery.ahead = ahead = self._last.get(key)
        self._last[key] = delivery
        if ahead is not None:
            ahead.behind = delivery
        elif not delivery.taken:
            self._push(entry)

    def pop(self, now: float) -> Delivery | None:
        """Take the oldest delivery that may go at ``now``; None if there is none."""
        while self._waiting and self._waiting[0][0] <= now:
            _, seq, number, delivery = heapq.heappop(self._waiting)
            if number == delivery.place:
                heapq.heappush(self._ready, (seq, number, delivery))
        while self._ready:
            _, number, delivery = heapq.heappop(self._ready)
            if not delivery.final and number == delivery.place:
                delivery.taken = True
                return delivery
        return None

    def next_due(self) -> float | None:
        """When the earliest waiting delivery becomes ready; None if none waits."""
        delivery = self.next_waiting()
        return None if delivery is None else delivery.due

    def next_waiting(self) -> Delivery | None:
        """The delivery that is the first to become ready of those that wait; None if none waits."""
        while self._waiting and (self._waiting[0][3].final or self._waiting[0][2] != self._waiting[0][3].place):
            heapq.heappop(self._waiting)
        return self._waiting[0][3] if self._waiting else None

    def has_next(self) -> bool:
        """Whether a delivery may go now or waits for its time; else those that are pending are taken."""
        return bool(self._ready or self._waiting)

    def put_back(self, delivery: Delivery, due: float) -> None:
        """Let a taken delivery wait until ``due``; its key waits with it."""
        delivery.taken = False
        delivery.due = due
        self._offer(delivery)

    def expedite(self, delivery: Delivery) -> Delivery | None:
        """Let a delivery that no taker has go at once; returns the earlier one of its key that has to go first."""
        first = delivery
        while first.ahead is not None:
            first = first.ahead
        if first is not delivery:
            return first
        delivery.due = 0.0
        self._offer(delivery)
        return None

    def remove(self, delivery: Delivery) -> None:
        """Take out a delivery that is final, sent or not: the next of its key may go."""
        if delivery.final:
            raise ValueError("the delivery is final already")
        delivery.final = True
        self.depth -= 1
        ahead, behind = delivery.ahead, delivery.behind
        delivery.ahead = delivery.behind = None
        if ahead is not None:
            ahead.behind = behind
        if behind is not None:
            behind.ahead = ahead
            if ahead is None:
                self._offer(behind)
        elif ahead is not None:
            self._last[self._key(delivery)] = ahead
        else:
            del self._last[self._key(delivery)]

    def upcoming(self, count: int) -> list[Delivery]:
        """Deliveries that will be taken soon, at most ``count``; their payload is worth loading now."""
        return [d for _, number, d in self._ready[:count] if not d.final and number == d.place]

    def pending(self) -> list[Delivery]:
        """Every delivery that is not final, those of one key together and in their order."""
        found: list[Delivery] = []
        for one in reversed(self._last.values()):
            delivery: Delivery | None = one
            while delivery is not None:
                found.append(delivery)
                delivery = delivery.ahead
        return found[::-1]

    def _offer(self, delivery: Delivery) -> None:
        delivery.place = next(_places)
        self._push((delivery.seq, delivery.place, delivery))

    def _push(self, entry: tuple[int, int, Delivery]) -> None:
        due = entry[2].due
        if due > 0.0:
            heapq.heappush(self._waiting, (due, *entry))
        else:
            heapq.heappush(self._ready, entry)

    @staticmethod
    def _key(delivery: Delivery) -> object:
        return delivery.key if delivery.key is not None else delivery.seq
