"""States of deliveries on their way to the database: those of one transaction, of each delivery the last."""

from __future__ import annotations

import sqlite3
import time
from collections.abc import Iterable
from typing import Any

from host.queue import rows
from host.queue.interface import Delivery, Result

_Rows = dict[tuple[int, str], tuple[Any, ...]]


class States:
    """The states that one transaction writes."""

    def __init__(self) -> None:
        self._ended: _Rows = {}
        self._begun: _Rows = {}
        """Attempts that begin, each after what ``_ended`` has of its delivery."""

    def begin(self, deliveries: Iterable[Delivery]) -> None:
        """Note that attempts begin, which ``attempts`` counts by now."""
        now, begun = time.time(), self._begun
        for one in deliveries:
            begun[one.seq, one.plugin] = (one.attempts, now, one.seq, one.plugin)

    def end(self, delivery: Delivery, result: Result, due: float) -> None:
        """Note how an attempt ended, or what else became of a delivery, and the Unix time of its next attempt."""
        delivery.counted = False
        seq, plugin = key = delivery.seq, delivery.plugin
        self._begun.pop(key, None)
        state, status, detail, reply, latency = result
        self._ended[key] = (
            state, delivery.attempts, delivery.crashes, due, status, detail, reply, latency, time.time(), seq, plugin,
        )  # fmt: skip

    def write(self, db: sqlite3.Connection) -> None:
        """Write them, perhaps again."""
        db.executemany(rows.OUTCOME, self._ended.values())
        db.executemany(rows.BEGUN, self._begun.values())
