"""A simulated cluster: real fold, leases and placement; a log, clocks and a network that do what the test wishes.

Messages are lost, delayed for long, and arrive twice; hosts are cut off, stop for a while, start again, and lose their
state. What is simulated is what a host does with the log, not what the log's servers do: these are tested as they are.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass, field

from host.cluster import lease as leases
from host.cluster.entries import (
    Beat,
    Claim,
    Entry,
    EventRef,
    Message,
    Number,
    Plugin,
    Release,
    VoidLeases,
    decode,
    encode,
    next_session,
    subject,
)
from host.cluster.fold import Shard, State, fold


class MemoryStore:
    """What a fold keeps, in dictionaries."""

    def __init__(self) -> None:
        self.unique: dict[str, EventRef] = {}
        self.values: dict[tuple[str, str], str] = {}

    def is_first(self, unique: str, event: EventRef, time: float) -> bool:
        return self.unique.setdefault(unique, event) == event

    def put(self, plugin: str, key: str, value: str | None) -> None:
        self.values.pop((plugin, key), None)
        if value is not None:
            self.values[plugin, key] = value

    def forget(self, plugin: str) -> None:
        self.values = {key: value for key, value in self.values.items() if key[0] != plugin}


@dataclass
class Host:
    """A host: what it has folded, its clock, and a batch of decisions that it has not yet read back."""

    name: str
    offset: float
    state: State = field(default_factory=State)
    store: MemoryStore = field(default_factory=MemoryStore)
    cursor: int = 0
    began: int = 0
    known: int = 0
    session: int = 0
    number: int = 0
    batch: Message | None = None
    sent_at: float = -1e9
    cut_until: float = 0.0
    stopped_until: float = 0.0
    drained: set[Shard] = field(default_factory=set)

    def start(self, now: float, end: int) -> None:
        """Start as a process does: of what was in memory nothing is left; a session begins at the log's end of now."""
        self.began, self.known, self.session, self.number, self.batch = end, max(self.known, self.session), 0, 0, None
        self.fence, self.watch = leases.Fence(), leases.Watch(self.name, now + self.offset)
        self.drained = set()

    def begin(self, random: int) -> None:
        """Begin a session, when the log that was there at the start has been read."""
        self.session = next_session(max(self.known, self.state.member(self.name).decisions.series), random)

    def acting(self, now: float) -> Iterator[tuple[Shard, int]]:
        """The shards that it may act on, with their epochs: nobody asks it, the fence answers."""
        if self.fence.may_act(now + self.offset):
            for shard, held in self.state.leases.items():
                if held.holder == self.name and shard not in self.drained:
                    yield shard, held.epoch


class Cluster:
    """Hosts and the log between them; ``step`` lets a quarter of a second pass."""

    def __init__(self, seed: int, *, hosts: int = 3, plugins: int = 2) -> None:
        self.random = random.Random(seed)
        self.now = 1000.0
        self.log: list[tuple[str, bytes]] = []
        self.flying: list[tuple[float, str, bytes]] = []
        self.hosts = [Host(f"h{number}", self.random.uniform(0, 1e6)) for number in range(hosts)]
        self.plugins = [Plugin(f"p{number}", "d", shards=number % 2 + 1) for number in range(plugins)]
        self.moves = 0
        self.digests: dict[int, str] = {}
        self.highest: dict[Shard, tuple[int, str]] = {}
        for host in self.hosts:
            host.start(self.now, len(self.log))

    def step(self) -> None:
        self.now += 0.25
        self._disturb()
        for host in self.hosts:
            if host.stopped_until <= self.now:
                self._read(host)
                self._write(host)
        due = [message for message in self.flying if message[0] <= self.now]
        self.flying = [message for message in self.flying if message[0] > self.now]
        self.log += [(published_to, body) for _, published_to, body in sorted(due)]
        self.check()

    def _disturb(self) -> None:
        chance = self.random.random()
        host = self.random.choice(self.hosts)
        if chance < 0.01:
            host.cut_until = self.now + self.random.uniform(1, 35)
        elif chance < 0.02:
            host.stopped_until = self.now + self.random.uniform(1, 35)
        elif chance < 0.025:
            host.start(self.now, len(self.log))
        elif chance < 0.027:
            host.state, host.store, host.cursor, host.known, host.session = State(), MemoryStore(), 0, 0, 0
            host.start(self.now, len(self.log))

    def _read(self, host: Host) -> None:
        if host.cut_until > self.now:
            return
        clock = self.now + host.offset
        for _ in range(self.random.choice((0, 1, 5, 1000))):
            if host.cursor == len(self.log):
                break
            published_to, body = self.log[host.cursor]
            host.cursor += 1
            message = decode(published_to, body)
            fold(host.state, host.store, message, host.cursor, 0.0)
            digest = self.digests.setdefault(host.cursor, host.state.digest)
            assert digest == host.state.digest, f"{host.name} decided differently at {host.cursor}"
            if message.host == host.name:
                self._read_back(host, clock)
            host.watch.look(host.state, clock)

    def _read_back(self, host: Host, clock: float) -> None:
        last = host.state.member(host.name).decisions
        if last.series == host.session:
            host.fence.read_back(last, clock)
            if host.batch is not None and last.number >= host.batch.first.number + len(host.batch.entries) - 1:
                host.batch = None
        elif last.series > host.session > 0:
            host.start(self.now, len(self.log))

    def _write(self, host: Host) -> None:
        clock = self.now + host.offset
        if not host.session:
            if host.cursor < host.began:
                return
            host.begin(self.random.randrange(1 << 20))
        if host.batch is None:
            if clock - host.sent_at < leases.BEAT:
                return
            entries = (*self._entries(host, clock), Beat(ready=tuple(plugin.name for plugin in self.plugins)))
            host.batch = Message(host.name, "ctl", Number(host.session, host.number + 1), entries)
            host.number += len(entries)
            host.fence.sending(Number(host.session, host.number), clock)
        elif clock - host.sent_at < 1.0:
            return
        host.sent_at = clock
        self._send(host, subject(host.name, "ctl"), encode(host.batch))

    def _send(self, host: Host, published_to: str, body: bytes) -> None:
        """Let a message arrive soon, late, twice or never; of a host that is cut off when it is connected again."""
        for _ in range(self.random.choice((0, 1, 1, 1, 1, 1, 2))):
            delay = self.random.uniform(0, self.random.choice((0.5, 0.5, 0.5, 3, 30)))
            self.flying.append((max(self.now, host.cut_until) + delay, published_to, body))

    def _entries(self, host: Host, clock: float) -> Iterator[Entry]:
        chance = self.random.random()
        held = [(shard, one) for shard, one in host.state.leases.items() if one.holder == host.name]
        if host.fence.is_steady(clock):
            for shard in host.watch.claimable(host.state, clock):
                yield host.state.claim(shard)
                host.drained.discard(shard)
        if held and chance < 0.05:
            shard, mine = self.random.choice(held)
            host.drained.add(shard)
            yield Release(*shard, mine.epoch)
        elif chance < 0.06:
            yield VoidLeases("its tail is lost")
        elif chance < 0.08:
            plugin = self.random.choice(self.plugins)
            if plugin.name in host.state.plugins:
                yield Plugin(plugin.name, plugin.digest, shards=plugin.shards, removed=True)
        elif chance < 0.3:
            yield from (plugin for plugin in self.plugins if plugin.name not in host.state.plugins)
        elif held and chance < 0.35:
            yield Claim(*self.random.choice(held)[0], "d", host.name)

    def check(self) -> None:
        """One actor for each shard, and no earlier one after a later one."""
        acting: dict[Shard, tuple[int, str]] = {}
        for host in self.hosts:
            for shard, epoch in host.acting(self.now):
                assert shard not in acting, f"{host.name} and {acting[shard]} act on {shard} at {self.now}"
                acting[shard] = (epoch, host.name)
        for shard, (epoch, name) in acting.items():
            before = self.highest.get(shard, (0, name))
            assert epoch >= before[0], f"{name} acts on {shard} in epoch {epoch}, after {before}"
            self.moves += before[1] != name
            self.highest[shard] = (epoch, name)
