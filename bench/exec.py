"""Invocations: a shell script run once for each event, each in a cage of its own (the mode ``exec``)."""

from __future__ import annotations

import os
import time
from pathlib import Path

from bench.delivery_subjects import HOST_TOML, Subject
from bench.frame import Report, Series
from host.client.client import Client
from tests.system.daemon import Daemon, daemon

SCRIPT = """\
    #!/bin/sh
    read -r params
"""
AT_ONCE = 4
"""Invocations of the plugin that may run at a time."""


def processor(running: Daemon) -> dict[str, float]:
    """Seconds of the processor that each process of a daemon has used, and what those used that it has reaped."""
    assert running.process is not None
    pids = {"supervisor": running.process.pid, "launcher": running.service_pid("isolator.launcher")}
    for name, module in (("host", "host.service"), ("audit", "isolator.audit"), ("broker", "isolator.broker")):
        pids[name] = running.service_pid(module)
    used: dict[str, float] = {}
    for name, pid in pids.items():
        times = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[11:15]
        own, reaped = sum(map(int, times[:2])), sum(map(int, times[2:]))
        used[name] = own / os.sysconf("SC_CLK_TCK")
        used[f"reaped by {name}"] = reaped / os.sysconf("SC_CLK_TCK")
    return used


def measure(rounds: int) -> Report:
    """Emit ``rounds`` events one at a time, and then five times as many as fast as they are taken."""
    taken = []
    with daemon(host_toml=HOST_TOML) as running, Client(running.root) as client:
        subject = Subject(
            running, "exec", "project.created", SCRIPT, transport={"mode": "exec"}, delivery={"concurrency": AT_ONCE}
        )
        subject.once(client)
        for _ in range(rounds):
            began = time.perf_counter_ns()
            subject.once(client)
            taken.append((time.perf_counter_ns() - began) / 1000)
        count = 5 * rounds
        before, began_all = processor(running), time.perf_counter()
        for _ in range(count):
            subject.once(client, wait=False)
        for event in subject.ids[-count:]:
            client.call("event.wait", id=event, timeout=300)
        took, load, after = time.perf_counter() - began_all, os.getloadavg()[0], processor(running)
    each = ", ".join(f"{name} {1000 * (after[name] - before[name]) / count:.1f}" for name in before)
    notes = (
        f"{count / took:.0f} events/s sustained, {AT_ONCE} at a time, emitted to ended (to reach: 60 on two cores); "
        f"load of the machine {load:.1f} on {os.cpu_count()} processors",
        f"processor time for each in ms: {each}",
    )
    series = (Series("isolator exec: one at a time", "cage, validation, durable queue, audit", "µs", tuple(taken)),)
    return Report("exec", "Running an invocation for an event", series, notes=notes)
