"""Hosts of a cluster in one process: real nodes, queues and databases, over a log in memory; plugins that keep count.

A plugin acts when it is sent an event and when it answers. It acts as its host's fence allows, which is kept beside the
host: one that is over freezes it, one that is lost ends it.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import random
from collections import Counter, defaultdict
from collections.abc import Callable, Coroutine, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from host.cluster.delivery import cursor
from host.cluster.delivery.follower import QueueFollower
from host.cluster.delivery.queue import ClusterQueue
from host.cluster.delivery.unread import Loss
from host.cluster.entries import Entry, Plugin, Position
from host.cluster.entries import Event as LogEvent
from host.cluster.fold import Applied, Incarnation, Shard
from host.cluster.log import LogUnavailableError
from host.cluster.node import Node
from host.cluster.problems import Kind
from host.database.store import Store
from host.events import Catalogue
from host.membership.types import ClusterTypes
from host.plugins.registry import load_event_types
from host.queue.interface import Delivery, Event, EventRow, NewEvent, Result, Subscriber
from isolator.policy.cluster import Cluster as Settled
from tests.cluster.faulty_log import Faults, FaultyLog, StoppableView
from tests.cluster.log_in_memory import Servers
from tests.cluster.stepped_clock import SteppedClock, View

T = TypeVar("T")

_UNBOUND = float("inf")
MOST_AT_ONCE = 4
"""Events that a plugin has at a time."""


@dataclass
class Act:
    """A plugin has been sent an event, or has answered."""

    time: float
    plugin: str
    host: str
    epoch: int
    event: str
    key: str | None


@dataclass
class Witness:
    """All that plugins did, on any host, and what it has to be."""

    begun: list[Act] = field(default_factory=list)
    handled: list[Act] = field(default_factory=list)
    ended: dict[tuple[str, str], str] = field(default_factory=dict)
    """By plugin and event, the last outcome that was final."""
    moves: Counter[str] = field(default_factory=Counter)
    """How often a shard of a plugin was begun with."""
    digests: dict[int, str] = field(default_factory=dict)
    order: dict[str, int] = field(default_factory=dict)
    """By event, its place among those of the log."""
    wrong: list[str] = field(default_factory=list)
    """Notes of what plugins did and must not."""
    _latest: dict[Shard, tuple[int, str]] = field(default_factory=dict)

    def act(self, act: Act, shard: Shard) -> None:
        """One actor: nobody acts without an epoch, or in one after somebody has acted in a later one."""
        epoch, host = self._latest.get(shard, (1, ""))
        if act.epoch < epoch:  # nobody waits for the task that acts, so it is kept
            self.wrong.append(f"{act.host} acts on {shard} in epoch {act.epoch} after {host} in {epoch}")
        self._latest[shard] = max((epoch, host), (act.epoch, act.host))

    def folded(self, host: str, place: int, digest: str) -> None:
        """One fold."""
        assert self.digests.setdefault(place, digest) == digest, f"{host} decided differently at {place}"

    def check_order(self) -> None:
        """Per key in log order: what is first done for an event comes after what is done for those before it."""
        first: dict[tuple[str, str], list[str]] = defaultdict(list)
        seen = set()
        for act in self.handled:
            if act.key is not None and (act.plugin, act.event) not in seen:
                seen.add((act.plugin, act.event))
                first[act.plugin, act.key].append(act.event)
        for line, events in first.items():
            places = [self.order[event] for event in events]
            assert places == sorted(places), f"{line} handled {events} of the places {places}"

    def repeated(self, plugin: str) -> int:
        """How many times the plugin was sent an event once more."""
        times = Counter(act.event for act in self.handled if act.plugin == plugin)
        return sum(times.values()) - len(times)


class SimFences:
    """The fence beside a host, by its clock: until when plugins may act."""

    def __init__(self, host: SimHost) -> None:
        self._host = host
        self.until: dict[str, float] = {}

    def hold(self, plugin: str, until: float) -> None:
        self.until[plugin] = until

    def bind(self, plugin: str) -> None:
        if self.until.get(plugin, _UNBOUND) == _UNBOUND:
            self.until[plugin] = 0.0

    def free(self, plugin: str) -> None:
        self.until[plugin] = _UNBOUND

    def lost(self, plugin: str) -> None:
        self.until[plugin] = 0.0
        self._host.kill(plugin)

    def may_act(self, plugin: str) -> bool:
        return self._host.clock.now() < self.until.get(plugin, _UNBOUND)


@dataclass
class Sent:
    """An event in a plugin's hands."""

    delivery: Delivery
    run: int


class SimHost:
    """One host: process, database and cages. What a kill leaves is the database, and the cages until they are ended."""

    def __init__(self, cluster: Hosts, name: str, path: Path, offset: float) -> None:
        self.cluster, self.name, self.path = cluster, name, path
        self.clock = StoppableView(cluster.clock, offset)
        self.cage_clock = View(cluster.clock, offset)
        """Cages go on while the host is stopped, until they are frozen."""
        self.store: Store | None = None
        self.runs: Counter[str] = Counter()
        """Runs of each plugin's cage: what an earlier one had is gone."""
        self.fences = SimFences(self)
        self.plugins: dict[str, Plugin] = {}
        self.labels: tuple[str, ...] = ()
        self.problems: dict[Kind, str] = {}
        self.losses: list[Loss] = []
        self.faults = Faults()
        """Those of this host alone."""
        self._cut_until = self.down_until = 0.0
        self._tasks: list[asyncio.Task[None]] = []

    @property
    def is_up(self) -> bool:
        return self.store is not None

    def cut_until(self, time: float) -> None:
        """Have it reach no server until a time."""
        self._cut_until = time
        self.log.cut = self.cluster.clock.time < time
        self.cluster.clock.call_later(time - self.cluster.clock.time, self._connect)

    def _connect(self) -> None:
        self.log.cut = self.cluster.clock.time < self._cut_until

    async def start(self) -> None:
        self.store = Store(self.path)
        self.queue = ClusterQueue(self.store, self.name, on_accepted=lambda *_: None)
        self.catalogue = Catalogue()
        for event_type in load_event_types(self.store)[0]:
            self.catalogue.register(event_type)
        self.types = ClusterTypes(self.store, self.catalogue, lambda: self.node.state, self._decide)
        self.follower = QueueFollower(
            self.queue, self._subscribers, lambda: [*self.plugins], self.fences, self.losses.extend, self.types,
        )  # fmt: skip
        cluster = self.cluster
        log = self.log = FaultyLog(cluster.servers, self.clock, (cluster.faults, self.faults), cluster.random)
        self._connect()
        self.node = Node(
            Settled(name=self.name, servers=(), labels=self.labels, outbox=cluster.outbox),
            log, self.store, _Watched(self), self.fences, self.path.with_suffix(".folds"), clock=self.clock,
            notice=self._notice, random=cluster.random.getrandbits,
        )  # fmt: skip
        self.follower.attach(self.node)
        await self.node.start()
        self.types.follow()
        self.follower.tell()
        for plugin in self.plugins:
            self.follower.serve(plugin, before=True)
            self._work_for(plugin)

    async def _decide(self, entry: Entry) -> Applied:
        return await self.node.decide(entry)

    def _notice(self, kind: Kind, line: str | None) -> None:
        self.problems[kind] = line or ""

    def serve(self, plugin: Plugin) -> None:
        """Have a plugin of the cluster, in a version."""
        self.plugins[plugin.name] = plugin
        if self.is_up:
            self._work_for(plugin.name)
            self.follower.serve(plugin.name)

    def forget(self, plugin: str) -> None:
        """Have the plugin no more."""
        self.plugins.pop(plugin)
        self.follower.forget(plugin)
        self.follower.look()

    def _work_for(self, plugin: str) -> None:
        self._tasks.append(asyncio.create_task(self._work(plugin), name=f"{plugin} on {self.name}"))

    def _subscribers(self, event: Event) -> Mapping[str, Subscriber]:
        key = json.loads(event.payload).get("key")
        key = key if isinstance(key, str) else None
        return {name: Subscriber(name, key) for name in self.plugins}

    async def end(self) -> None:
        """Kill the process: nothing is written any more, and its cages end with their daemon."""
        store, self.store = self.store, None
        assert store is not None
        for task in self._tasks:
            task.cancel()
        self._tasks.clear()
        await self.node.close()
        self.follower.close()
        store._ops.clear()
        await store.close()
        for plugin in self.plugins:
            self.kill(plugin)

    def kill(self, plugin: str) -> None:
        self.runs[plugin] += 1

    async def _work(self, plugin: str) -> None:
        consumer, room = self.queue.consumer(plugin), asyncio.Semaphore(MOST_AT_ONCE)
        while True:
            await room.acquire()
            delivery = await consumer.take()
            await self.queue.sent([delivery])
            if delivery.final:
                room.release()
                continue
            self._tasks.append(asyncio.create_task(self._answer(plugin, Sent(delivery, self.runs[plugin]), room)))

    async def _answer(self, plugin: str, sent: Sent, room: asyncio.Semaphore) -> None:
        """What the cage does with an event, and what the host makes of its answer."""
        delivery, chance = sent.delivery, self.cluster.random
        self._act(plugin, sent, self.cluster.witness.begun)
        await self.cage_clock.sleep(chance.choice((0.001, 0.05, 1.0)))
        while self.runs[plugin] == sent.run and not self.fences.may_act(plugin):
            await self.cage_clock.sleep(0.25)  # frozen
        if self.runs[plugin] != sent.run:
            if not delivery.final:
                self.queue.consumer(plugin).nak(delivery, Result("retry", detail="its cage ended"), delay=0.0)
            room.release()
            return
        outcome = self.cluster.outcome(delivery)
        if outcome != "retry":
            self._act(plugin, sent, self.cluster.witness.handled)
        await self._reply(plugin, delivery, outcome)
        room.release()

    async def _reply(self, plugin: str, delivery: Delivery, outcome: str) -> None:
        await self.clock.sleep(0.001)  # a host that is stopped reads no answer
        consumer = self.queue.consumer(plugin)
        if outcome == "retry":
            consumer.nak(delivery, Result("retry"), delay=0.0)
        elif outcome == "dead":
            consumer.term(delivery, Result("dead", detail="it was rejected"))
        else:
            consumer.ack(delivery, Result("ok"))

    def _act(self, plugin: str, sent: Sent, acts: list[Act]) -> None:
        delivery = sent.delivery
        if self.runs[plugin] != sent.run or not self.fences.may_act(plugin):
            return
        act = Act(self.cluster.clock.time, plugin, self.name, delivery.epoch, delivery.event_id, delivery.key)
        acts.append(act)
        known = self.cluster.described(plugin, self)
        if known is not None and known.plugin.placement == "one":
            shards = known.plugin.shards
            self.cluster.witness.act(act, (plugin, cursor.shard_of_event(delivery.event_id, delivery.key, shards)))

    async def emit(self, key: str | None, name: str = "deploy.completed", **more: object) -> str:
        """Emit an event; its id, once it is accepted."""
        event = NewEvent(name, json.dumps({"key": key}), **more)  # type: ignore[arg-type]
        accepted = await self.queue.accept(event, [Subscriber(name, key) for name in self.plugins])
        return accepted.event.id

    async def decide(self, *entries: Plugin) -> None:
        for entry in entries:
            while True:
                try:
                    await self.node.decide(entry)
                    break
                except LogUnavailableError:
                    await self.clock.sleep(1.0)

    def show(self, event_id: str) -> EventRow:
        return self.queue.show(event_id)


class _Watched:
    """The follower of a host, with a witness beside it."""

    def __init__(self, host: SimHost) -> None:
        self._host = host

    def kept(self, place: int, time: float, entries: Sequence[Applied]) -> None:
        host, witness = self._host, self._host.cluster.witness
        witness.folded(host.name, place, host.node.state.digest)
        for one in entries:
            if isinstance(one.entry, LogEvent) and not one.void:
                with contextlib.suppress(ValueError, KeyError, TypeError, RecursionError):  # a hostile host
                    witness.order.setdefault(json.loads(one.entry.cloudevent)["id"], len(witness.order))
        host.follower.kept(place, time, entries)

    def held(self, shard: Shard, epoch: int, position: Position) -> None:
        self._host.cluster.witness.moves[shard[0]] += 1
        self._host.follower.held(shard, epoch, position)

    def __getattr__(self, name: str) -> object:
        return getattr(self._host.follower, name)


class Hosts:
    """A cluster, its time, and its faults."""

    def __init__(self, folder: Path, seed: int = 0, *, hosts: int = 3, faults: Faults | None = None) -> None:
        self.random = random.Random(seed)
        self.clock, self.faults = SteppedClock(), faults or Faults()
        self.servers = Servers(self.clock)
        self.witness = Witness()
        self.accepted: list[str] = []
        self.plugins: dict[str, Plugin] = {}
        self.failing = self.rejecting = 0.0
        self.outbox = 1 << 20
        self.hosts = [
            SimHost(self, f"h{number}", folder / f"h{number}.db", self.random.uniform(0, 1e6))
            for number in range(hosts)
        ]

    async def passes(self, seconds: float) -> None:
        await self.clock.passes(seconds, [host.store for host in self.hosts if host.store is not None])
        assert not self.witness.wrong, self.witness.wrong

    def outcome(self, _: Delivery) -> str:
        chance = self.random.random()
        return "retry" if chance < self.failing else "dead" if chance < self.failing + self.rejecting else "ok"

    async def start(self, *plugins: Plugin) -> None:
        self.plugins = {plugin.name: plugin for plugin in plugins}
        for host in self.hosts:
            for plugin in plugins:
                host.plugins[plugin.name] = plugin
            await host.start()
        await self.during(self.hosts[0].decide(*plugins))

    async def emit(self, host: SimHost, key: str | None, **more: Any) -> None:
        """Emit an event; it counts as accepted when its caller is answered."""
        self.accepted.append(await host.emit(key, **more))

    def described(self, plugin: str, host: SimHost) -> Incarnation | None:
        """A plugin as a host has read of it, or else any other that is up."""
        folds = [one.node.state for one in (host, *self.hosts) if one.is_up]
        return next((state.plugins[plugin] for state in folds if plugin in state.plugins), None)

    def holder(self, plugin: str, shard: int = 0) -> SimHost | None:
        """Who holds a shard, as a host that is up has it."""
        for host in self.hosts:
            if host.is_up and (plugin, shard) in host.node.held:
                return host
        return None

    async def until(self, done: Callable[[], object], seconds: float = 150.0) -> None:
        """Let time pass until something is so."""
        end = self.clock.time + seconds
        while not done():
            assert self.clock.time < end, "it has not come about"
            await self.passes(0.25)

    async def trim(self, living: SimHost) -> None:
        """Have the log begin at the newest copy of its fold that a living host has."""
        await self.passes(25.0)
        copies = living.path.with_suffix(".folds")
        await self.until(lambda: any(copies.glob("*.fold")))
        self.servers.trimmed = max(int(path.stem) for path in copies.glob("*.fold"))

    async def heal(self) -> None:
        """Have no fault any more, and every host up."""
        vars(self.faults).update(vars(Faults()))
        for host in self.hosts:
            host.clock.stopped_until = host.down_until = 0.0
            if not host.is_up:
                await host.start()
            host.cut_until(0.0)

    async def during(self, work: Coroutine[Any, Any, T]) -> T:
        """Let time pass until something is done; its result."""
        task = asyncio.create_task(work)
        await self.until(task.done)
        return task.result()

    def all_handled(self, plugin: str) -> bool:
        handled = {act.event for act in self.witness.handled if act.plugin == plugin}
        return handled >= {*self.accepted}

    async def close(self) -> None:
        for host in self.hosts:
            if host.is_up:
                await host.end()


Make = Callable[..., Hosts]
