"""Deliveries of an event on whichever host: what this host has done itself, and what the log says of the others."""

from __future__ import annotations

import sqlite3
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from host.cluster.delivery.places import GIVEN_UP, Place, is_later, shard_of_event
from host.cluster.entries import EventRef
from host.cluster.fold import Incarnation, Lease, Shard, State
from host.queue.interface import DeliveryRow, Event, Subscriber


@dataclass(frozen=True)
class Elsewhere:
    """A plugin whose delivery of an event another host has, or had; ``holder`` has the plugin now.

    ``row``: the delivery as it will be listed if the holder says that it has ended, of a plugin that is not here: what
    it filters only the hosts know that have it.
    """

    plugin: str
    holder: str
    row: DeliveryRow | None = None


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
            state, attempts = _stands(self.state, shard, self.ref, self.at)
            rows[plugin] = self._lost(shard) or self._held(plugin, state, attempts, lease)
        for known in self._absent(here, subscribers):
            if self.ref is not None and _waits(self.state, known, self.ref, self.at):
                lease = self.state.leases.get((known.plugin.name, 0))
                rows[known.plugin.name] = self._held(known.plugin.name, "queued", 0, lease)
            for number in range(known.plugin.shards):
                if (lost := self._lost((known.plugin.name, number))) is not None:
                    rows[known.plugin.name] = lost
        return tuple(rows[plugin] for plugin in sorted(rows))

    def _lost(self, shard: Shard) -> DeliveryRow | None:
        """The delivery, if the shard's holder went on without it."""
        if self.ref is None or not any(one.has(self.ref) for one in self.state.lost.get(shard, ())):
            return None
        return self._row(shard[0], "dead", 0, "lost: its holder has never read it, and the log has it no more")

    def _absent(self, here: Sequence[DeliveryRow], subscribers: Mapping[str, Subscriber]) -> list[Incarnation]:
        """The plugins of one host each that want such events, and that this host does not have."""
        known = {*subscribers, *(row.plugin for row in here)}
        return [
            one
            for name, one in self.state.plugins.items()
            if name not in known and one.plugin.placement == "one" and self.event.name in one.plugin.hooks
        ]

    def elsewhere(self, here: Sequence[DeliveryRow], subscribers: Mapping[str, Subscriber]) -> list[Elsewhere]:
        """The plugins among the subscribers whose deliveries another host knows more of than this one."""
        rows, found = {row.plugin: row for row in here}, []
        for plugin, to in subscribers.items():
            known, row = self.state.plugins.get(plugin), rows.get(plugin)
            if known is None or known.plugin.placement != "one" or (row is not None and not _is_from_the_log(row)):
                continue
            of = (plugin, shard_of_event(self.event.id, to.key, known.plugin.shards))
            lease = self.state.leases.get(of)
            if lease is not None and lease.holder != self.host and self._lost(of) is None:
                found.append(Elsewhere(plugin, lease.holder))
        for absent in self._absent(here, subscribers):
            name = absent.plugin.name
            for shard in range(absent.plugin.shards):
                lease = self.state.leases.get((name, shard))
                if lease is not None and lease.holder != self.host and self._lost((name, shard)) is None:
                    found.append(Elsewhere(name, lease.holder, self._held(name, "ok", 0, lease)))
        return found

    def _held(self, plugin: str, state: str, attempts: int, lease: Lease | None) -> DeliveryRow:
        """The delivery of a plugin's holder, as the log has it."""
        if lease is None:
            return self._row(plugin, state, attempts, "no host holds the plugin")
        host = lease.holder if lease.holder != self.host else None
        return self._row(plugin, state, attempts, f"on {lease.holder}", host)

    def _row(self, plugin: str, state: str, attempts: int, detail: str, host: str | None = None) -> DeliveryRow:
        event = self.event
        return DeliveryRow(
            event.id, event.name, plugin, state, attempts, None, detail, None, None, event.accepted, host=host
        )


def _is_from_the_log(row: DeliveryRow) -> bool:
    """Whether this host has never had the delivery itself, or gave it away."""
    return row.state == "moved" or (row.state in GIVEN_UP and not row.attempts and row.status is None)


def _stands(state: State, shard: Shard, ref: EventRef | None, at: Place | None) -> tuple[str, int]:
    """State and attempts of a delivery of an event, as far as the shard's holder has told."""
    if ref is None or at is None:
        return "queued", 0
    position = state.position(shard)
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
    events = [(EventRef(*ref), (place, ref[2]) if place is not None else None) for *ref, place in rows]
    return sum(any(_waits(state, one, ref, at) for one in wanting) for ref, at in events)


def _waits(state: State, known: Incarnation, ref: EventRef, at: Place | None) -> bool:
    if at is not None and at[0] <= known.began:
        return False
    shards = ((known.plugin.name, number) for number in range(known.plugin.shards))
    return any(_stands(state, shard, ref, at)[0] != "ok" for shard in shards)
