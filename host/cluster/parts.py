"""Parts of a host in its cluster that outlast one life of following the log."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

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
from isolator.policy.cluster import Cluster


@dataclass
class Parts:
    """Those who work together; ``random`` gives a number of so many bits."""

    settings: Cluster
    log: Log
    database: Database
    follower: Follower
    fences: Fences
    clock: Clock
    random: Callable[[int], int]
    problems: Problems
    copies: Snapshots | None
    clocks: dict[str, float] = field(default_factory=dict)
    """Seconds by which the wall clocks of other hosts were ahead of this one's when their newest beat was read."""

    def __post_init__(self) -> None:
        self.host = self.settings.name
        self.troubles = LogTroubles(self.problems, self.clock)
        self.footing, self.holding = Footing(self), Holding(self)
        self.outbox = Outbox(self.database, self.host, self.settings.outbox, self.random)
        self.events = Events(self)
