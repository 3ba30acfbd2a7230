"""Parts of a host in its cluster that outlast one life of following the log."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from host.cluster.clock import Clock
from host.cluster.events import Events
from host.cluster.follower import Follower
from host.cluster.footing import Footing
from host.cluster.holding import Holding
from host.cluster.log import Log
from host.cluster.outbox import Outbox
from host.cluster.problems import LogTroubles, Problems
from host.cluster.snapshots import Snapshots
from host.database.store import Store as Database
from host.fence.fences import Fences


@dataclass(frozen=True, slots=True)
class Settings:
    """This host in its cluster. ``outbox``: bytes of events that may wait for the log.

    ``snapshots`` is a folder for copies of the fold, which new hosts need once the log's beginning is gone.
    """

    host: str
    labels: tuple[str, ...] = ()
    version: str = ""
    outbox: int = 256 << 20
    snapshots: Path | None = None
    distrusted: tuple[str, ...] = ()
    """Hosts whose messages of an unknown format are passed over, as what no host writes is."""


@dataclass(frozen=True, slots=True)
class Parts:
    """Those who work together; ``random`` gives a number of so many bits."""

    settings: Settings
    log: Log
    database: Database
    follower: Follower
    fences: Fences
    clock: Clock
    random: Callable[[int], int]
    problems: Problems
    troubles: LogTroubles
    footing: Footing
    outbox: Outbox
    events: Events
    holding: Holding
    copies: Snapshots | None
    clocks: dict[str, float] = field(default_factory=dict)
    """Seconds by which the wall clocks of other hosts were ahead of this one's when their newest beat was read."""

    @property
    def host(self) -> str:
        return self.settings.host
