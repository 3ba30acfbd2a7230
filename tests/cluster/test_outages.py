"""Whole daemons and servers while ways are cut, processes stopped and killed: one log decides, whatever happens.

    sudo ./dev test tests/cluster/test_outages.py --faults 200 --events 100000 -s

takes ten seconds a fault; a few faults are part of the default suite. The seed is printed; with ``--seed`` the faults
come in the same order, at moments that are never quite the same. ``--minutes`` bounds the time. With ``--kind`` there
are faults of that kind alone, which may be given more than once, and each host that has the plugin loses it:

    sudo ./dev test tests/cluster/test_outages.py --faults 24 --kind "host cut off" --kind "kill -9 daemon" -s
"""

from __future__ import annotations

import asyncio
import json
import random
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from isolator.linux import netns
from isolator.paths import Paths
from tests.cluster.outages import history
from tests.cluster.outages.faults import Faults
from tests.cluster.outages.site import Site, site
from tests.cluster.outages.stores import Copies
from tests.cluster.outages.watch import Watch, watch
from tests.support.ledger import COURIER, Ledger, ledger
from tests.support.platforms import Platform, platforms
from tests.support.timeouts import seconds
from tests.system.daemon import wait_for

HOST_TOML = """
[defaults]
state = "0"
[restart]
backoff_min = "0.1s"
backoff_max = "1s"
crashes = 1000
"""
FIRST = (
    ("host cut off", 22.0),
    ("servers, one way", 4.0),
    ("kill -9 daemon", 22.0),
    ("server gone", 8.0),
    ("SIGSTOP daemon", 22.0),
)
"""The faults of every run, whatever the seed: each of these hosts has the plugin, and loses it."""
LOSES = 22.0
"""Seconds of a fault after which a host has lost the plugin."""
RATE = 20
"""Events a second, of each host, at most."""
EXPECTED = 11
"""Seconds that a fault takes, with the calm after it."""
HARMLESS = {"unreachable", "unwritable", "outbox_full", "put_back", "copies"}
"""Problems that outages and older copies cause; any other is a fault of this program's, or of the servers'."""


@pytest.mark.slow
@pytest.mark.timeout(0)
def test_one_log_decides_whatever_fails(request: pytest.FixtureRequest, tmp_path: Path) -> None:
    option = request.config.getoption
    count, events, seed = option("faults"), option("events"), option("seed")
    seed = seed if seed is not None else random.SystemRandom().randrange(1 << 32)
    print(f"\noutages: --faults {count} --events {events} --seed {seed}", flush=True)
    with (
        site(tmp_path, HOST_TOML, f"{200 + events // 200}MB") as made,
        ledger(made.network, {host.machine.address: host.name for host in made.hosts}) as kept,
    ):
        made.add(COURIER)
        share = -(-events // len(made.hosts))
        rate = min(RATE, max(0.5, share / max(90, count * EXPECTED)))
        with watch(made.roots) as watched, platforms(made.roots, rate, share, seed) as emitting:
            wait_for(lambda: kept.holder, seconds(90), "no event is handled")
            made.emitting.update(zip(made.roots, emitting, strict=True))
            faults = Faults(made, lambda: kept.holder, random.Random(seed), Copies(tmp_path / "copies"))
            _have(faults, count, option("minutes") * 60, option("kind"))
            made.until_quiet(seconds(150))
            for platform in emitting:
                platform.close()
            accepted = [event for platform in emitting for event in platform.accepted]
            logged = _read(made, ()).ids
            wait_for(lambda: logged <= kept.events, seconds(150), "what stands in the log is not handled")
            made.until_quiet(seconds(60))
        problems = [(name, *one) for name, trail in watched.trails.items() for one in trail.problems.items()]
        folded = {}
        for host in made.hosts:
            assert host.daemon.stop() == 0
            folded[host.name] = history.Folded.of(Paths.of(host.daemon.root).host_database)
        found = _read(made, [one.place for one in folded.values()])
        _tell(faults, kept, watched, emitting, found)
    wrong = [
        *kept.wrong,
        *watched.wrong,
        *history.differing(found, folded),
        *history.lost(found, accepted, kept.events),
        *history.out_of_order(found, kept.handled),
        *history.repeated(kept.handled).wrong,
        *(f"{name} had a problem, {kind}: {line}" for name, kind, line in problems if kind not in HARMLESS),
    ]
    assert not wrong, "\n".join(wrong[:40])
    assert len(kept.holdings) >= 2, "the plugin has never moved"


def _have(faults: Faults, count: int, patience: float, kinds: Sequence[str]) -> None:
    first = [(kinds[at % len(kinds)], LOSES) for at in range(count)] if kinds else FIRST
    began = time.monotonic()
    while len(faults.done) < count and time.monotonic() - began < patience:
        before = len(faults.done)
        faults.one(*first[before] if before < len(first) else ())
        for number, one in enumerate(faults.done[before:], before + 1):
            took = one.ended - one.began
            print(f"{one.ended - began:8.1f} s {number:5} {one.kind} {one.hit} for {took:.1f} s", flush=True)
        time.sleep(faults.pause())


def _read(made: Site, places: Sequence[int]) -> history.History:
    reader = made.log("h1")
    machine = made.hosts[0].machine
    return netns.in_network(machine.fd, lambda: asyncio.run(history.History.read(reader, places)))


def _tell(faults: Faults, kept: Ledger, watched: Watch, emitting: Sequence[Platform], found: history.History) -> None:
    taken = history.take_overs(kept.holdings, faults.done)
    again = history.repeated(kept.handled)
    counts: dict[str, Any] = {
        "faults": len(faults.done),
        "kinds": faults.counts,
        "accepted": sum(len(platform.accepted) for platform in emitting),
        "calls without an answer": sum(platform.unanswered for platform in emitting),
        "events in the log": sum(map(len, found.events.values())),
        "messages in the log": found.last,
        "epochs": len(kept.holdings),
        "take-over, s": _spread([one.seconds for one in taken]),
        "the slowest": [history.reasons(found, one, faults.done) for one in taken[-5:]],
        **{f"{stage}, s": _spread(values) for stage, values in history.stages(found, kept.holdings).items()},
        "without an actor, s": _spread(history.idle(kept.holdings)),
        "events that came twice": again.events,
        "most of them at once": again.most,
        "late values, void": len(found.late),
        "looks at frozen cages": watched.looks,
        "records": {name: trail.counts for name, trail in watched.trails.items()},
        "violations": len(kept.wrong) + len(watched.wrong),
    }
    print(json.dumps(counts, indent=1), flush=True)


def _spread(values: Sequence[float]) -> dict[str, float]:
    if not values:
        return {}
    at = min(len(values) - 1, int(len(values) * 0.99))
    return {"number": len(values), "p50": round(statistics.median(values), 2), "p99": round(values[at], 2)}
