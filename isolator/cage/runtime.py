"""The parts that every cage of one process shares: launcher, journal, control groups, warm pool."""

from __future__ import annotations

from isolator.base.structs import field, struct_class
from isolator.cage.warm_pool import WarmPool
from isolator.launcher.client import Launcher
from isolator.layers.cgroup.subtree import Subtree
from isolator.recovery.journal import Journal


@struct_class()
class CageRuntime:
    """Shared by every cage of one process. ``launcher`` is replaced when it dies."""

    launcher: Launcher
    journal: Journal
    subtree: Subtree
    keep_warm: bool = False
    """Refill the pool after each start."""
    pool: WarmPool = field(init=False)

    def __post_init__(self) -> None:
        self.pool = WarmPool(lambda: self.launcher, self.journal, self.subtree)
