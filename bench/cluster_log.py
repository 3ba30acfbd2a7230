"""Experiment: a stream on three servers of NATS while their leader is killed or stopped, and its writers' view of it.

Not a comparison of speed, but the experiment on which the cluster's protocol rests; docs/decisions has its outcome.
Run as ``python3 -m bench.cluster_log PROGRAM`` in a network namespace of its own (``unshare -n``), with ``nats-py``:

1. *races*: two writers update one subject with the same expected last sequence; how often both win, or none;
2. *faults*: writers send numbered messages, again until they read them back by ``DIRECT.GET``, while servers are
   killed and stopped in turn; what is missing of what was acknowledged, what stands there twice, how long it took;
3. *replicas*: the stream, read fifty times by direct gets, which any replica answers; sequences with two contents.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import random
import signal
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import nats
import nats.errors
from nats.js.api import StreamConfig

from tests.support.nats_servers import Server, nats_servers

STREAM, GET = "ISO", "$JS.API.DIRECT.GET.ISO"


async def _connect(servers: list[Server], first: int = 0) -> Any:
    urls = [one.url for one in servers[first:] + servers[:first]]
    again = {"error_cb": _ignore, "max_reconnect_attempts": -1, "reconnect_time_wait": 0.2, "connect_timeout": 1}
    quick = {"pending_size": 0, "ping_interval": 1, "max_outstanding_pings": 2}
    return await nats.connect(urls, dont_randomize=True, **quick, **again)


async def _close(client: Any) -> None:
    with contextlib.suppress(Exception, asyncio.CancelledError):  # its own tasks may be cancelled in mid-connect
        await asyncio.wait_for(client.close(), 2)


async def _ignore(_: Exception) -> None:
    """Connections that end are part of the experiment."""


async def _request(
    client: Any, subject: str, body: bytes, timeout: float, headers: dict[str, str] | None = None
) -> Any:
    """The answer to a request, or None: out of time, no quorum, a connection that ends."""
    try:
        return await client.request(subject, body, timeout=timeout, headers=headers)
    except (nats.errors.Error, OSError, TimeoutError):
        return None


async def _make(client: Any, servers: list[Server]) -> None:
    config = StreamConfig(name=STREAM, subjects=["iso.>"], num_replicas=len(servers), allow_direct=True)
    for _ in range(100):
        with contextlib.suppress(Exception):
            await client.jetstream(timeout=2).add_stream(config)
            return
        await asyncio.sleep(0.2)
    raise TimeoutError("no stream: the servers have found no leader")


async def races(servers: list[Server], count: int) -> dict[str, int]:
    """Race two writers for one subject; each expects the last sequence that both have seen."""
    first, second = await _connect(servers), await _connect(servers, 1)
    found = {"one winner": 0, "two winners": 0, "no winner": 0}
    last = 0
    for _ in range(count):
        headers = {"Nats-Expected-Last-Subject-Sequence": str(last)}
        answers = await asyncio.gather(*(_request(one, "iso.race", b"x", 5, headers) for one in (first, second)))
        won = [body["seq"] for one in answers if one is not None and "error" not in (body := json.loads(one.data))]
        found[("no winner", "one winner", "two winners")[len(won)]] += 1
        last = max([last, *won])
    await _close(first)
    await _close(second)
    return found


class Writer:
    """Sends numbered messages one by one, each again until it is read back."""

    def __init__(self, name: str, servers: list[Server], first: int) -> None:
        self.name, self._servers, self._first = name, servers, first
        self.acknowledged: set[int] = set()
        self.read_back: set[int] = set()
        self.waits: list[float] = []
        self.sent_again = 0

    async def run(self, until: float) -> None:
        client = await _connect(self._servers, self._first)
        place, number = 0, 0
        while time.monotonic() < until:
            number += 1
            began, body = time.monotonic(), f"{self.name} {number}".encode()
            back = False
            while not back and time.monotonic() < until + 60:
                answer = await _request(client, f"iso.ctl.{self.name}", body, 1)
                if answer is not None and "error" not in json.loads(answer.data):
                    self.acknowledged.add(number)
                while (entry := await _next(client, place, f"iso.ctl.{self.name}")) is not None:
                    place, content = entry
                    back = back or content == body
                if not back:
                    self.sent_again += 1
                    await asyncio.sleep(0.1)
            if back:
                self.read_back.add(number)
                self.waits.append(time.monotonic() - began)
        await _close(client)


async def _next(client: Any, place: int, subject: str) -> tuple[int, bytes] | None:
    """The message of a subject that comes next after a place."""
    wish = json.dumps({"seq": place + 1, "next_by_subj": subject}).encode()
    answer = await _request(client, GET, wish, 1)
    if answer is None or not answer.headers or "Nats-Sequence" not in answer.headers:
        return None
    return int(answer.headers["Nats-Sequence"]), answer.data


async def _disturb(servers: list[Server], client: Any, until: float, chance: random.Random) -> int:
    faults = 0
    while time.monotonic() < until:
        await asyncio.sleep(chance.uniform(1, 3))
        info = await _request(client, f"$JS.API.STREAM.INFO.{STREAM}", b"", 1)
        leader = (json.loads(info.data).get("cluster") or {}).get("leader") if info is not None else None
        one = next((one for one in servers if one.name == leader), chance.choice(servers))
        faults += 1
        if chance.random() < 0.5:
            one.kill()
            await asyncio.sleep(chance.uniform(0.5, 3))
            await asyncio.to_thread(one.start)
        else:
            one.signal(signal.SIGSTOP)
            await asyncio.sleep(chance.uniform(1, 12))
            one.signal(signal.SIGCONT)
    return faults


async def faults(servers: list[Server], seconds: float, seed: int) -> dict[str, Any]:
    """Write from three hosts while leaders are killed and stopped; what is lost, twice or late."""
    control = await _connect(servers)
    writers = [Writer(f"h{number}", servers, number) for number in range(3)]
    until = time.monotonic() + seconds
    work = [writer.run(until) for writer in writers]
    count, *_ = await asyncio.gather(_disturb(servers, control, until, random.Random(seed)), *work)
    await asyncio.sleep(5)
    kept: dict[bytes, int] = {}
    place = 0
    while (entry := await _next(control, place, "iso.ctl.>")) is not None:
        place, content = entry
        kept[content] = kept.get(content, 0) + 1
    missing = {
        kind: sum(f"{one.name} {number}".encode() not in kept for one in writers for number in getattr(one, kind))
        for kind in ("acknowledged", "read_back")
    }
    waits = sorted(wait for one in writers for wait in one.waits)
    await _close(control)
    return {
        "faults": count,
        "messages": sum(kept.values()),
        "twice": sum(number > 1 for number in kept.values()),
        "sent again": sum(one.sent_again for one in writers),
        "acknowledged and missing": missing["acknowledged"],
        "read back and missing": missing["read_back"],
        "read back, s, p50": round(statistics.median(waits), 4),
        "read back, s, longest": round(waits[-1], 2),
    }


async def replicas(servers: list[Server], rounds: int) -> dict[str, int]:
    """Read the stream by direct gets again and again; the sequences that replicas know differently."""
    seen: dict[int, set[bytes]] = {}
    for number in range(rounds):
        client = await _connect(servers, number % len(servers))
        place = 0
        while (entry := await _next(client, place, "iso.ctl.>")) is not None:
            place, content = entry
            seen.setdefault(place, set()).add(content)
        await _close(client)
    return {"sequences": len(seen), "with two contents": sum(len(contents) > 1 for contents in seen.values())}


async def experiment(program: str, races_of: int, seconds: float, rounds: int, seed: int) -> dict[str, Any]:
    """All three parts on three servers of one version."""
    with tempfile.TemporaryDirectory() as folder, nats_servers(Path(folder), 3, program, 4222) as servers:
        client = await _connect(servers)
        await _make(client, servers)
        await _close(client)
        return {
            "races": await races(servers, races_of),
            "faults": await faults(servers, seconds, seed),
            "replicas": await replicas(servers, rounds),
        }


if __name__ == "__main__":
    print(json.dumps(asyncio.run(experiment(sys.argv[1], 300, float(sys.argv[2]), 20, int(sys.argv[3]))), indent=1))
