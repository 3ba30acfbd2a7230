"""Jobs: a shell script run once for each event, each in a cage of its own (the mode ``exec``)."""

from __future__ import annotations

import os
import time

from bench.delivery_subjects import HOST_TOML, Subject
from bench.frame import Report, Series
from host.client.client import Client
from tests.system.daemon import daemon

SCRIPT = """\
    #!/bin/sh
    read -r params
"""
AT_ONCE = 4
"""Jobs of the plugin that may run at a time."""


def measure(rounds: int) -> Report:
    """Emit ``rounds`` events one at a time, and then five times as many as fast as they are taken."""
    taken = []
    with daemon(host_toml=HOST_TOML) as running, Client(running.root) as client:
        subject = Subject(
            running, "jobs", "project.created", SCRIPT, transport={"mode": "exec"}, delivery={"concurrency": AT_ONCE}
        )
        subject.once(client)
        for _ in range(rounds):
            began = time.perf_counter_ns()
            subject.once(client)
            taken.append((time.perf_counter_ns() - began) / 1000)
        count = 5 * rounds
        began_all = time.perf_counter()
        for _ in range(count):
            subject.once(client, wait=False)
        for event in subject.ids[-count:]:
            client.call("event.wait", id=event, timeout=300)
        took, load = time.perf_counter() - began_all, os.getloadavg()[0]
    notes = (
        f"{count / took:.0f} events/s sustained, {AT_ONCE} at a time, emitted to ended (to reach: 60 on two cores); "
        f"load of the machine {load:.1f} on {os.cpu_count()} processors",
    )
    series = (Series("isolator exec: one at a time", "cage, validation, durable queue, audit", "µs", tuple(taken)),)
    return Report("jobs", "Running a job for an event", series, notes=notes)
