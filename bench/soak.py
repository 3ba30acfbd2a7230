"""Memory of a daemon over 200 000 events. Run only when it is named, as it takes minutes.

``--rounds N`` sets how many thousand events are delivered (200 unless given, as 100 is the default of all benchmarks).
"""

from __future__ import annotations

import time

from bench.delivery_load import memory, pour
from bench.delivery_subjects import HOST_TOML, STREAM, Subject
from bench.frame import Report, Series
from host.client.client import Client
from tests.system.daemon import daemon

BATCH = 5000


def measure(rounds: int) -> Report:
    """Deliver the events in batches; after each, sample the resident memory of host, audit and supervisor."""
    count = 200_000 if rounds == 100 else rounds * 1000
    grown: dict[str, list[float]] = {"host": [], "audit": [], "supervisor": []}
    with daemon(host_toml=HOST_TOML) as running, Client(running.root, timeout=600) as client:
        subject = Subject(running, "stream", "deploy.started", STREAM, transport={"mode": "stream"})
        assert running.process is not None
        pids = {
            "host": running.service_pid("host.service"),
            "audit": running.service_pid("isolator.audit.service"),
            "supervisor": running.process.pid,
        }
        began = time.perf_counter()
        for _ in range(0, count, BATCH):
            client.call("event.wait", id=pour(running, subject, BATCH), timeout=600)
            for name, pid in pids.items():
                grown[name].append(memory(pid) / 1024)
        took = time.perf_counter() - began
    series = tuple(Series(name, "resident", "KiB", tuple(values)) for name, values in grown.items())
    half = len(grown["host"]) // 2
    notes = [f"{count} events in {took:.0f} s: {count / took:.0f} events/s"]
    notes += [
        f"{name}: {values[0]:.0f} KiB after the first {BATCH}, {values[half]:.0f} half-way, {values[-1]:.0f} at the end"
        for name, values in grown.items()
    ]
    return Report("soak", f"Memory over {count} events (each sample after {BATCH})", series, notes=tuple(notes))
