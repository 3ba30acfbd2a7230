"""Hosts of a cluster in one process: real nodes and databases, on a log in memory and a clock that tests move."""

from __future__ import annotations

import asyncio
import random
import shutil
import sqlite3
from collections.abc import Coroutine, Sequence
from pathlib import Path
from typing import Any, TypeVar

from host.cluster.entries import Event, EventRef, Plugin, Position
from host.cluster.fold import Applied, Shard, State
from host.cluster.node import Node
from host.cluster.problems import Kind
from host.database.store import Store
from host.fence.fences import Fences
from isolator.policy.cluster import Cluster as Settled
from tests.cluster.log_in_memory import MemoryLog, Servers
from tests.cluster.stepped_clock import SteppedClock, View

T = TypeVar("T")
_FOLLOWED = "CREATE TABLE IF NOT EXISTS followed (place INTEGER PRIMARY KEY)"


class Following(Fences):
    """A follower that notes what it learns, and the fences of its host."""

    def __init__(self) -> None:
        self.events: list[tuple[EventRef, str]] = []
        """What counts, in the log's order."""
        self.held_now: dict[Shard, tuple[int, Position]] = {}
        self.lost_because: list[tuple[Shard, str]] = []
        self.is_over = True
        self.names: tuple[str, ...] = ()
        self.changed: list[Position] = []
        self.drained: list[Shard] = []
        self.until: dict[str, float] = {}
        self.fails: list[Exception] = []
        """What the next transactions fail with, one each."""

    def applied(self, db: sqlite3.Connection, place: int, time: float, entries: Sequence[Applied]) -> None:
        db.execute(_FOLLOWED)
        db.execute("INSERT INTO followed VALUES (?)", (place,))
        if self.fails:
            raise self.fails.pop()

    def kept(self, place: int, time: float, entries: Sequence[Applied]) -> None:
        for one in entries:
            if isinstance(one.entry, Event) and not one.void:
                self.events.append((one.ref, one.entry.cloudevent))

    def renumbered(self, db: sqlite3.Connection, events: Sequence[tuple[EventRef, EventRef]]) -> None:
        pass

    def again(self, db: sqlite3.Connection) -> None:
        db.execute(_FOLLOWED)
        db.execute("DELETE FROM followed")
        self.events.clear()

    def adopted(self, db: sqlite3.Connection, before: State) -> None:
        self.again(db)

    def lacking(self) -> Sequence[str]:
        return ()

    def left(self, db: sqlite3.Connection) -> None:
        pass

    def read_up(self) -> None:
        pass

    def held(self, shard: Shard, epoch: int, position: Position) -> None:
        self.held_now[shard] = (epoch, position)

    def lost(self, shard: Shard | str, why: str = "") -> None:
        if isinstance(shard, str):  # the fence's
            self.until.pop(shard, None)
            return
        del self.held_now[shard]
        self.lost_because.append((shard, why))

    def fenced(self, over: bool) -> None:
        self.is_over = over

    async def drain(self, shard: Shard) -> None:
        self.drained.append(shard)

    def positions(self) -> Sequence[Position]:
        changed, self.changed = self.changed, []
        return changed

    def here(self) -> Sequence[str]:
        return ()

    def ready(self) -> Sequence[str]:
        return self.names

    def hold(self, plugin: str, until: float) -> None:
        self.until[plugin] = max(until, self.until.get(plugin, 0.0))

    def bind(self, plugin: str) -> None:
        self.until.setdefault(plugin, 0.0)

    def free(self, plugin: str) -> None:
        self.until.pop(plugin, None)


class Host:
    """One host: its disk is a folder, its process ``node``."""

    def __init__(self, cluster: Cluster, name: str, folder: Path, offset: float) -> None:
        self.cluster, self.name, self.folder = cluster, name, folder
        self.clock = View(cluster.clock, offset)
        self.outbox = 1 << 20
        self.problems: list[tuple[Kind, str | None]] = []

    async def start(self) -> None:
        self.folder.mkdir(exist_ok=True)
        self.database = Store(self.folder / "db")
        self.follower = Following()
        self.follower.names = self.cluster.names
        self.log = MemoryLog(self.cluster.servers, self.clock)
        settings = Settled(name=self.name, servers=(), outbox=self.outbox, distrusted=self.cluster.distrusted)
        self.node = Node(
            settings, self.log, self.database, self.follower, self.follower, self.folder / "folds", clock=self.clock,
            notice=lambda kind, line: self.problems.append((kind, line)), random=self.cluster.random.getrandbits,
        )  # fmt: skip
        await self.node.start()

    async def stop(self) -> None:
        await self.node.close()
        await self.database.close()

    async def emit(self, text: str, unique: str = "") -> EventRef:
        """Emit as the platform's caller does: the answer means that it is on disk."""
        return await self.database.run(lambda db: self.node.emit(db, Event(text, unique)))

    @property
    def seen(self) -> list[str]:
        return [text for _, text in self.follower.events]

    def acting(self) -> dict[Shard, int]:
        """The shards that it may act on, with their epochs."""
        now = self.clock.now()
        held = {shard: epoch for shard, (epoch, _) in self.follower.held_now.items()}
        acting = {shard: epoch for shard, epoch in held.items() if self.node.may_act(shard[0])}
        for name, _ in acting:  # the broker and the supervisor know at least as long a time
            assert self.follower.until[name] > now - 1, "held, and nobody else knows"
        return acting


class Cluster:
    """Hosts on one log."""

    def __init__(self, folder: Path, hosts: int = 3, seed: int = 1, names: tuple[str, ...] = ("p",)) -> None:
        self.random, self.clock, self.names, self.folder = random.Random(seed), SteppedClock(), names, folder
        self.servers = Servers(self.clock)
        self.hosts = [self.host(f"h{number}") for number in range(hosts)]
        self.highest: dict[Shard, tuple[int, str]] = {}
        self.moves = 0
        self.distrusted: tuple[str, ...] = ()

    def host(self, name: str, folder: str = "") -> Host:
        return Host(self, name, self.folder / (folder or name), self.random.uniform(0, 1e6))

    def copy_of(self, host: Host, name: str) -> Host:
        """Another host with a copy of a host's disk."""
        other = self.host(host.name, name)
        shutil.copytree(host.folder, other.folder)
        return other

    async def start(self) -> None:
        for host in self.hosts:
            await host.start()

    async def stop(self) -> None:
        for host in self.hosts:
            await host.stop()

    async def passes(self, seconds: float) -> None:
        await self.clock.passes(seconds, [host.database for host in self.hosts], self.check)

    async def settled(self, plugin: str = "p") -> Host:
        """Have a plugin in the cluster, and let its claim be made; returns its host."""
        await self.passes(5)
        await self.during(self.hosts[0].node.decide(Plugin(plugin, "d")))
        await self.passes(10)
        return self.holder(plugin)

    async def during(self, work: Coroutine[Any, Any, T]) -> T:
        """Let time pass until something is done; its result."""
        task = asyncio.create_task(work)
        for _ in range(200):
            await self.passes(0.25)
            if task.done():
                return task.result()
        raise AssertionError("it is not done after 50 s")

    def holder(self, plugin: str = "p") -> Host:
        found = [host for host in self.hosts if (plugin, 0) in host.acting()]
        assert len(found) == 1, [host.name for host in found]
        return found[0]

    def check(self) -> None:
        """One actor for each shard, and no earlier epoch after a later one."""
        acting: dict[Shard, str] = {}
        for host in self.hosts:
            for shard, epoch in host.acting().items():
                assert shard not in acting, f"{host.name} and {acting[shard]} act on {shard}"
                acting[shard] = host.name
                before = self.highest.get(shard, (0, host.name))
                assert epoch >= before[0], f"{host.name} acts on {shard} in epoch {epoch} after {before}"
                self.moves += before[1] != host.name
                self.highest[shard] = (epoch, host.name)
