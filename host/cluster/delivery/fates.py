"""Deliveries of an event on whichever host: what this host has done itself, and what the log says of the others."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from host.cluster.delivery.places import Place, is_later, shard_of_event
from host.cluster.entries import EventRef, Position
from host.cluster.fold import State
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
            state, attempts = self._stands(self.state.positions.get(shard))
            rows[plugin] = self._row(plugin, state, attempts, where)
        return tuple(rows[plugin] for plugin in sorted(rows))

    def _stands(self, position: Position | None) -> tuple[str, int]:
        """State and attempts of a delivery, as far as its holder has told."""
        if position is None or self.ref is None or self.at is None:
            return "queued", 0
        for one in position.open:
            if one.event == self.ref:
                return ("retry" if one.attempts else "queued"), one.attempts
        last = next((ref for ref in position.read if ref.host == self.ref.host), None)
        unread = last is None or is_later(self.state.member(last.host), self.ref, last)
        return ("queued" if unread else "ok"), 0

    def _row(self, plugin: str, state: str, attempts: int, detail: str) -> DeliveryRow:
        event = self.event
        return DeliveryRow(event.id, event.name, plugin, state, attempts, None, detail, None, None, event.accepted)
