"""The log, folded once more by itself, and what hosts and plugin have made of it held against that."""

from __future__ import annotations

import asyncio
import contextlib
import json
import sqlite3
import time
from collections import Counter, defaultdict
from collections.abc import Awaitable, Callable, Iterable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import TypeVar

from host.cluster.delivery import cloudevent
from host.cluster.delivery.cursor import MOST_ENDED
from host.cluster.entries import Claim, Event, KeyValue, decode
from host.cluster.fold import State, fold
from host.cluster.log import LogUnavailableError
from host.cluster.nats import NatsLog
from tests.cluster.outages.faults import Done
from tests.cluster.simulation import MemoryStore
from tests.support.ledger import Handled, Holding
from tests.support.timeouts import seconds

T = TypeVar("T")
IN_FLIGHT = 16
"""Events that a stream plugin has in flight at most, when nobody says otherwise."""


@dataclass(frozen=True)
class Folded:
    """A host's fold as its database has it: up to where, and its digest there, and the plugins' values."""

    place: int
    digest: str
    values: dict[tuple[str, str], str]

    @classmethod
    def of(cls, database: Path) -> Folded:
        """Read it; the host has stopped."""
        with sqlite3.connect(f"file:{database}?mode=ro", uri=True) as db:
            place, digest = db.execute("SELECT place, digest FROM cluster_self").fetchone()
            rows = db.execute("SELECT plugin, key, value FROM cluster_values").fetchall()
        db.close()
        return cls(place, digest, {(plugin, key): value for plugin, key, value in rows})


@dataclass(frozen=True)
class Claimed:
    """A claim that counted, by the servers' clock: when it was put into the log, and when its last holder's newest."""

    time: float
    silent_since: float


@dataclass
class History:
    """The log: its events that count, by key and in its order, and the fold at some places."""

    events: dict[str, list[str]] = field(default_factory=lambda: defaultdict(list))
    folds: dict[int, Folded] = field(default_factory=dict)
    last: int = 0
    claims: dict[int, Claimed] = field(default_factory=dict)
    """By epoch, those of what another host had held."""
    late: list[KeyValue] = field(default_factory=list)
    """Values that a host has written when it was no holder any more: they do not count."""

    @property
    def ids(self) -> set[str]:
        """The events, by their ids."""
        return {event for events in self.events.values() for event in events}

    @classmethod
    async def read(cls, log: NatsLog, places: Iterable[int]) -> History:
        """Read a log that nobody writes any more, and fold it; ``places`` are those at which the fold is kept."""
        wanted, found, state, store = {*places}, cls(), State(), MemoryStore()
        heard: dict[str, float] = {}
        seen: set[str] = set()
        end = await _answer(log.facts)
        while found.last < end.last:
            entered = await _answer(lambda: log.after(found.last))
            if entered is None:  # of a replica that is behind
                await asyncio.sleep(0.1)
                continue
            found.last = entered.place
            message = decode(entered.subject, entered.body)
            leases = dict(state.leases) if any(isinstance(one, Claim) for one in message.entries) else {}
            if message.stream == "ctl":
                heard[message.host] = entered.time
            for one in fold(state, store, message, entered.place, entered.time):
                if isinstance(one.entry, Event) and not one.void:
                    event = cloudevent.read(one.entry.cloudevent)
                    if event.id not in seen:  # a database that was put back has sent it again, under another number
                        seen.add(event.id)
                        found.events[json.loads(event.payload).get("project_id", "")].append(event.id)
                elif isinstance(one.entry, KeyValue) and one.void:
                    found.late.append(one.entry)
                elif isinstance(one.entry, Claim) and not one.void:
                    lease = leases.get((one.entry.plugin, one.entry.shard))
                    if lease is not None and lease.holder != message.host:
                        found.claims[entered.place] = Claimed(entered.time, heard[lease.holder])
            if entered.place in wanted:
                found.folds[entered.place] = Folded(entered.place, state.digest, dict(store.values))
        await log.close()
        return found


async def _answer(ask: Callable[[], Awaitable[T]]) -> T:
    """The log's answer, sooner or later."""
    async with asyncio.timeout(seconds(60)):
        while True:
            with contextlib.suppress(LogUnavailableError):
                return await ask()
            await asyncio.sleep(0.2)


def differing(history: History, hosts: dict[str, Folded]) -> list[str]:
    """The hosts whose folds are not what the log says."""
    return [
        f"{name} has folded the log to {one}, which says {history.folds.get(one.place)}"
        for name, one in hosts.items()
        if history.folds.get(one.place) != one
    ]


def lost(history: History, accepted: Iterable[str], handled: Iterable[str]) -> list[str]:
    """Events that were accepted and do not stand in the log, or stand there and were not handled, or were made up."""
    logged, seen = history.ids, {*handled}
    wrong = [f"{event} was accepted and is not in the log" for event in {*accepted} - logged]
    wrong += [f"{event} is in the log and was not handled" for event in logged - seen]
    return wrong + [f"{event} was handled and is not in the log" for event in seen - logged]


def out_of_order(history: History, handled: Sequence[Handled]) -> list[str]:
    """Events that came before an earlier one of their key: a repetition may go back, nothing ever skips."""
    index = {event: (key, at) for key, events in history.events.items() for at, event in enumerate(events)}
    last: dict[str, int] = defaultdict(lambda: -1)
    wrong = []
    for one in handled:
        key, at = index.get(one.event, (one.key, -1))
        if at > last[key] + 1:
            wrong.append(f"event {at} of {key} came after event {last[key]} of it: {one}")
        last[key] = at
    return wrong


@dataclass(frozen=True)
class Repeated:
    """Events that came more than once: how many, the most that one host process has repeated, and what is too many."""

    events: int
    most: int
    wrong: list[str]


def repeated(handled: Sequence[Handled]) -> Repeated:
    """Count repetitions of what another host process, be it of the same host, had delivered before."""
    first: dict[str, tuple[str, int]] = {}
    by_link: Counter[tuple[str, int]] = Counter()
    twice: set[str] = set()
    for one in handled:
        if first.setdefault(one.event, one.link) != one.link:
            by_link[one.link] += 1
            twice.add(one.event)
    most = max(by_link.values(), default=0)
    wrong = [f"{count} events were repeated at once" for count in by_link.values() if count > MOST_ENDED + IN_FLIGHT]
    return Repeated(len(twice), most, wrong)


def stages(history: History, holdings: Sequence[Holding]) -> dict[str, list[float]]:
    """What a move of the plugin to another host takes, in seconds, sorted, stage by stage."""
    wall = time.time() - time.monotonic()
    claimed = [(history.claims[one.epoch], one.first + wall) for one in holdings if one.epoch in history.claims]
    return {
        "silence": sorted(claim.time - claim.silent_since for claim, _ in claimed),
        "claim to first act": sorted(first - claim.time for claim, first in claimed),
    }


_STRIKES = ("host ", "kill -9 daemon", "SIGSTOP daemon")


@dataclass(frozen=True)
class TakeOver:
    """A plugin's move from a host that a fault hit: seconds from the fault until the next host has acted."""

    seconds: float
    before: Holding
    after: Holding
    began: float
    """When the fault did."""


def take_overs(holdings: Sequence[Holding], faults: Sequence[Done]) -> list[TakeOver]:
    """The moves that a fault has caused, the quickest first."""
    taken = []
    for before, after in pairwise(holdings):
        causes = [
            one.began
            for one in faults
            if one.hit == before.host and one.kind.startswith(_STRIKES) and one.began < after.first < one.ended + 1
        ]
        if causes and before.host != after.host:
            taken.append(TakeOver(after.first - min(causes), before, after, min(causes)))
    return sorted(taken, key=lambda one: one.seconds)


def idle(holdings: Sequence[Holding]) -> list[float]:
    """Seconds, sorted, for which nobody has acted."""
    return sorted(after.first - before.last for before, after in pairwise(holdings))


def reasons(history: History, take: TakeOver, faults: Sequence[Done]) -> str:
    """The stages of a take-over, and what else was wrong until its end, in seconds from the fault."""
    claim, wall = history.claims.get(take.after.epoch), time.time() - time.monotonic() + take.began
    stages = (
        f"silent since {claim.silent_since - wall:.1f}, claimed at {claim.time - wall:.1f}" if claim else "no claim"
    )
    beside = [
        f"{one.kind} {one.hit} {one.began - take.began:.1f} to {one.ended - take.began:.1f}"
        for one in faults
        if one.ended > take.began - 5.0 and one.began < take.after.first
    ]
    return f"{take.before.host} to {take.after.host}, {stages}, acts at {take.seconds:.1f}: {'; '.join(beside)}"
