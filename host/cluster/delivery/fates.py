"""Deliveries of an event on whichever host: what this host has done itself, and what the log says of the others."""

from __future__ import annotations

import sqlite3
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from host.cluster.delivery.places import Place, is_later, shard_of_event
from host.cluster.entries import EventRef, Position
from host.cluster.fold import Incarnation, State
from host.queue.interface import DeliveryRow, Event, Subscriber


@dataclass(frozen=True)
class Fates:
    """The deliveries of one event; ``at`` is None until the log was read as far as the event."""

    state: State
    host: str
    event: Event
    ref: EventRef | None
    at: Place | None

    def merged(self, here: Sequence[DeliveryRow], subscribers: Mapping[str, Subscriber]) -> tuple[DeliveryRow, ...]:
        """The deliveries to this host's subscribers, and those that it knows of from the log, by plugin."""
        rows = {row.plugin: row for row in here}
        for plugin, to in subscribers.items():
            known = self.state.plugins.get(plugin)
            row = rows.get(plugin)
            if row is not None and row.state != "moved":
                continue
            if known is None or known.plugin.placement != "one":
                if row is None and self.at is None:
                    rows[plugin] = self._row(plugin, "queued", 0, "it waits for the cluster's log")
                continue
            if row is None and self.at is not None and self.at[0] <= known.began:
                continue
            shard = (plugin, shard_of_event(self.event.id, to.key, known.plugin.shards))
            lease = self.state.leases.get(shard)
            where = f"on {lease.holder}" if lease is not None else "no host holds the plugin"
            state, attempts = _stands(self.state, self.state.positions.get(shard), self.ref, self.at)
            rows[plugin] = self._row(plugin, state, attempts, where)
        return tuple(rows[plugin] for plugin in sorted(rows))

    def _row(self, plugin: str, state: str, attempts: int, detail: str) -> DeliveryRow:
        event = self.event
        return DeliveryRow(event.id, event.name, plugin, state, attempts, None, detail, None, None, event.accepted)


def _stands(state: State, position: Position | None, ref: EventRef | None, at: Place | None) -> tuple[str, int]:
    """State and attempts of a delivery of an event, as far as the shard's holder has told."""
    if position is None or ref is None or at is None:
        return "queued", 0
    for one in position.open:
        if one.event == ref:
            return ("retry" if one.attempts else "queued"), one.attempts
    last = next((read for read in position.read if read.host == ref.host), None)
    unread = last is None or is_later(state.member(last.host), ref, last)
    return ("queued" if unread else "ok"), 0


def waiting(db: sqlite3.Connection, state: State, name: str, now: float) -> int:
    """Number of the events of a type that a plugin of one host, which wants such, is not through with on any shard."""
    wanting = [one for one in state.plugins.values() if one.plugin.placement == "one" and name in one.plugin.hooks]
    if not wanting:
        return 0
    rows = db.execute(
        "SELECT c.host, c.series, c.number, c.place FROM cluster_events c JOIN events e ON e.seq=c.seq"
        " WHERE e.name=? AND c.plugin IS NULL AND e.expires > ?",
        (name, now),
    )
    return sum(any(_waits(state, one, EventRef(*ref), place) for one in wanting) for *ref, place in rows)


def _waits(state: State, known: Incarnation, ref: EventRef, place: int | None) -> bool:
    if place is not None and place <= known.began:
        return False
    at = (place, ref.number) if place is not None else None
    positions = [state.positions.get((known.plugin.name, shard)) for shard in range(known.plugin.shards)]
    return any(_stands(state, position, ref, at)[0] != "ok" for position in positions)
