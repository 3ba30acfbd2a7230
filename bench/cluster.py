"""A cluster's log as hosts use it: nodes with real databases on three real servers, all on this machine.

Run as ``python3 -m bench.cluster`` in a network namespace of its own (``unshare -n``), with ``nats-py``:

1. *rate*: events that one host emits at once, until another has all of them in its database;
2. *latency*: one event at a time, from the platform's call on one host until another has it;
3. *take-over*: the holder of a plugin ends without a word; until another holds it;
4. *idle*: messages that a host writes in a second when nothing happens.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from host.cluster.access import inbox_of
from host.cluster.entries import Event, Plugin
from host.cluster.nats import Access, NatsLog, make_stream
from host.cluster.node import Node
from host.database.store import Store
from isolator.policy.cluster import Cluster
from tests.cluster.hosts import Following
from tests.support.nats_servers import Server, nats_servers

LOOK = 0.001


class Host:
    """One host, in this process."""

    def __init__(self, name: str, folder: Path, servers: list[Server]) -> None:
        self.database, self.follower = Store(folder / name), Following()
        self.follower.names = ("p",)
        log = NatsLog(Access(tuple(one.url for one in servers), inbox=inbox_of(name)))
        self.node = Node(Cluster(name=name, servers=()), log, self.database, self.follower, self.follower)

    async def emit(self, text: str) -> None:
        await self.database.run(lambda db: self.node.emit(db, Event(text)))

    async def has(self, count: int) -> None:
        """Return when this host has so many events."""
        while len(self.follower.events) < count:  # noqa: ASYNC110 # a follower that is not measured
            await asyncio.sleep(LOOK)


async def rate(hosts: list[Host], count: int) -> float:
    """Events a second, of 1 KiB each."""
    before, began = len(hosts[1].follower.events), time.monotonic()
    await asyncio.gather(*(hosts[0].emit("x" * 1024) for _ in range(count)))
    await hosts[1].has(before + count)
    return count / (time.monotonic() - began)


async def latency(hosts: list[Host], count: int) -> list[float]:
    """Seconds, sorted."""
    found = []
    for _ in range(count):
        before, began = len(hosts[1].follower.events), time.monotonic()
        await hosts[0].emit("x" * 1024)
        await hosts[1].has(before + 1)
        found.append(time.monotonic() - began)
    return sorted(found)


async def take_over(hosts: list[Host]) -> float:
    """Seconds from the end of the holder until another holds its plugin; ends one host."""
    holder = next(one for one in hosts if one.follower.held_now)
    hosts.remove(holder)
    began = time.monotonic()
    await holder.node.close()
    while not any(one.follower.held_now for one in hosts):  # noqa: ASYNC110 # as above
        await asyncio.sleep(LOOK)
    taken = time.monotonic() - began
    await holder.database.close()
    return taken


async def measure(program: str, events: int, moves: int) -> dict[str, Any]:
    """All four, with hosts that are made anew for each take-over."""
    with tempfile.TemporaryDirectory() as name, nats_servers(Path(name) / "nats", 3, program, 4222) as servers:
        await make_stream(Access(tuple(one.url for one in servers)), 3, 150 << 20)
        hosts = [Host(f"h{number}", Path(name), servers) for number in range(3)]
        for host in hosts:
            await host.node.start()
        while not all(host.node.is_member for host in hosts):  # noqa: ASYNC110 # beats have to come back
            await asyncio.sleep(0.05)
        found: dict[str, Any] = {"events/s": round(await rate(hosts, events))}
        times = await latency(hosts, 300)
        found["latency, ms, p50"] = round(statistics.median(times) * 1000, 2)
        found["latency, ms, p99"] = round(times[int(len(times) * 0.99)] * 1000, 2)
        place = hosts[0].node.place
        await asyncio.sleep(20)
        found["idle messages a host and second"] = round((hosts[0].node.place - place) / 3 / 20, 2)
        await hosts[0].node.decide(Plugin("p", "d"))
        moved = []
        for number in range(moves):
            while not any(one.follower.held_now for one in hosts):  # noqa: ASYNC110 # as above
                await asyncio.sleep(0.05)
            moved.append(await take_over(hosts))
            hosts.append(Host(f"h{3 + number}", Path(name), servers))
            await hosts[-1].node.start()
        found["take-over, s"] = [round(one, 1) for one in sorted(moved)]
        for host in hosts:
            await host.node.close()
            await host.database.close()
        return found


if __name__ == "__main__":
    with contextlib.suppress(KeyboardInterrupt):
        print(json.dumps(asyncio.run(measure(sys.argv[1] if len(sys.argv) > 1 else "", 5000, 5)), indent=1))
