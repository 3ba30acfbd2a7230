"""Accepted events that the trail may lack: their host, or the machine, ended before their records were on disk.

An emitter has its answer before the record is made, for its speed. So at its start a host owes the trail the records of
the newest events that are in the queue and not on the trail, whatever has become of their deliveries (``Debts.find``).
"""

from __future__ import annotations

import sqlite3
from datetime import UTC, datetime

from host.intake.intake import accepted_record
from host.queue.beside_trail import Compared
from host.queue.interface import QUEUE_FULL
from host.queue.owed import Owed
from isolator.audit.schema import EventDead

_EVENTS = (
    "SELECT e.seq, e.id, e.name, e.accepted, e.subject, e.payload, e.by FROM events e"
    " WHERE e.seq >= ? AND e.accepted >= ?{} ORDER BY e.seq"
)


def unrecorded(db: sqlite3.Connection, compared: Compared, accepted_here: str = "") -> list[Owed]:
    """The records that the trail is owed; ``accepted_here``: a condition of such events ``e``, begun with AND.

    The plugins of an event are those that have a delivery of it here by now.
    """
    found = []
    for row in db.execute(_EVENTS.format(accepted_here), (compared.recorded, compared.since)):
        seq, event_id, name, accepted, subject, payload, by = row
        texts = all(isinstance(text, str) for text in (event_id, name, subject, payload))
        if not texts or not isinstance(by, str | None):
            continue  # a damaged row
        try:
            at = datetime.fromtimestamp(accepted, UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ")
        except (TypeError, ValueError, OverflowError):
            continue  # likewise
        deliveries = db.execute("SELECT plugin, state, detail FROM deliveries WHERE seq=? ORDER BY plugin", (seq,))
        plugins = {plugin: (state, detail) for plugin, state, detail in deliveries}
        if seq > compared.recorded:
            record = accepted_record(seq, name, subject, payload, plugins, by, accepted_at=at)
            found.append(Owed(record, None, event_id, event_id, at))
        dead = EventDead(reason=QUEUE_FULL, attempts=0)  # its records come behind that of the event
        full = (plugin for plugin, standing in plugins.items() if standing == ("dead", QUEUE_FULL))
        found += [Owed(dead, plugin, event_id, f"{event_id}.{plugin}", at) for plugin in full]
    return found
