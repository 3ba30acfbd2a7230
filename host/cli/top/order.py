"""Orders of the plugins, by the key of ``--sort``."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING

from host.cli.notes import BAD_STATES

if TYPE_CHECKING:
    from host.cli.top.figures import Row

ASCENDING = ("name", "state")
"""Keys by which the first comes first; by the others it is the most."""
ORDERS: dict[str, Callable[[Row], tuple[float, str]]] = {
    "name": lambda row: (0, row.name),
    "state": lambda row: (row.state not in BAD_STATES, row.state),
    "cpu": lambda row: (_number(row.cpu), ""),
    "memory": lambda row: (_number(row.memory), ""),
    "tasks": lambda row: (_number(row.tasks), ""),
    "events": lambda row: (_number(row.events_per_s), ""),
    "queue": lambda row: (row.queue, ""),
    "latency": lambda row: (_number(row.latency_p99_us), ""),
    "denials": lambda row: (_number(row.denials), ""),
    "egress": lambda row: (_number(row.egress_per_s), ""),
}


def ordered(rows: Iterable[Row], key: str, *, reverse: bool = False) -> list[Row]:
    """The rows in this order; what is alike by name."""
    by_name = sorted(rows, key=lambda row: row.name)
    return sorted(by_name, key=ORDERS[key], reverse=(key not in ASCENDING) != reverse)


def _number(value: float | None) -> float:
    return value if value is not None else -1.0
