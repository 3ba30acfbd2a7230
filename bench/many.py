"""Two hundred plugins of one daemon: all started at once, and the memory of each while it is idle.

Every plugin is registered: its own user, its own state image, its own cage with network rules. The sidecar is a small
C program that makes its socket and waits, so that Isolator's work is timed and not an interpreter's start.
Timed is from the first request on the control socket to the last answer that a plugin runs. Beside it stands
bubblewrap, 200 of it at once, which builds less and keeps nothing running.

Descriptors are those that the supervisor has open for each plugin that runs.

Memory is the proportional share (PSS) of the daemon's own processes: with the plugins registered and none started
yet, and with all of them running and idle. Pid 1 of a cage is ours as well, but counted against the plugin's cap; it
has a figure of its own.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from bench.frame import Report, Series, Skipped
from bench.peers import BUBBLEWRAP, bubblewrap
from host.client.client import Client
from isolator.layers.seccomp.layer import compiled
from tests.system.daemon import Daemon, daemon, write_plugin

COUNT = 200
CALLERS = 64
"""Connections to the control socket at one time: more than a hundred would wait at its door."""
ROUNDS = 5
SETTLING, RESTING = 75.0, 60.0
"""Seconds in which the last start settles, two snapshots that still tell of it with it, and two more of their intervals
(``snapshot_interval``)."""
SIDECAR = r"""
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <unistd.h>
int main(void) {
    struct sockaddr_un address = {.sun_family = AF_UNIX};
    strncpy(address.sun_path, getenv("PLUGIN_SOCKET"), sizeof address.sun_path - 1);
    int server = socket(AF_UNIX, SOCK_STREAM, 0);
    if (bind(server, (struct sockaddr *)&address, sizeof address) || listen(server, 1)) return 1;
    for (;;) close(accept(server, 0, 0));
}
"""


def measure(rounds: int) -> Report:
    """Run at most ``rounds`` rounds, in fact a few: each takes seconds."""
    rounds = min(rounds, ROUNDS)
    with tempfile.TemporaryDirectory(prefix="isolator-bench-") as folder, daemon() as running:
        work = Path(folder)
        work.chmod(0o755)
        names = register(running, work)
        program = work / "filter.bpf"
        program.write_bytes(compiled("default", work))
        peer: Callable[[], None] | None = None
        skipped: list[Skipped] = []
        try:
            peer = bubblewrap(work, program).once
            peer()
        except (OSError, RuntimeError) as error:
            peer, skipped = None, [Skipped(BUBBLEWRAP, str(error))]
        registered = memory(running)  # before the first start: what has grown once is not given back
        files = _open_files(running)
        first = for_all(running, names, "plugin.start")  # makes the images, which happens once in a plugin's life
        for_all(running, names, "plugin.stop")
        ours: list[float] = []
        theirs: list[float] = []
        idle: dict[str, float] = {}
        inits = 0.0
        held = 0
        resting = 0.0
        for number in range(rounds):
            ours.append(for_all(running, names, "plugin.start"))
            if number == rounds - 1:
                resting = at_rest(running)
            idle, inits = memory(running), _inits(running, names)
            held = _open_files(running) - files
            for_all(running, names, "plugin.stop")
            if peer is not None:
                theirs.append(_at_once(peer))
    series = [Series(f"isolator, {COUNT} plugins", "everything, and they stay", "ms", tuple(ours))]
    if peer is not None:
        series.append(Series(f"bubblewrap + seccomp, {COUNT}", "no network rules, no cgroup", "ms", tuple(theirs)))
    grown = {name: (idle[name] - registered[name]) / COUNT for name in idle}
    each = ", ".join(f"{name} {kib:.0f}" for name, kib in grown.items())
    return Report(
        name="many",
        title=f"{COUNT} cages started at once",
        series=tuple(series),
        skipped=tuple(skipped),
        baselines=(f"bubblewrap + seccomp, {COUNT}",),
        notes=(
            f"memory of the daemon per idle plugin: {sum(grown.values()):.0f} KiB ({each}); goal: 1024",
            f"processor time of the daemon while all of them rest: {resting:.2f} % of one; goal: 0.3",
            f"descriptors of the supervisor per running plugin: {held / COUNT:.2f}; goal: 6",
            f"pid 1 of a cage, counted against the plugin's own cap: {inits / COUNT:.0f} KiB",
            f"the daemon before the first of them was started: {sum(registered.values()) / 1024:.0f} MiB",
            f"the very first start of all of them, which makes their state images: {first:.0f} ms",
        ),
    )


def at_rest(running: Daemon) -> float:
    """Processor time of the daemon's processes while nothing happens, in % of one."""
    time.sleep(SETTLING)
    began = spent(running)
    time.sleep(RESTING)  # the length of what is measured
    return (spent(running) - began) / RESTING / 10


def processes_of(running: Daemon) -> list[int]:
    """The daemon's processes: the supervisor, and all that descends from it."""
    assert running.process is not None
    found = [running.process.pid]
    for pid in found:
        for path in Path(f"/proc/{pid}/task").glob("*/children"):
            found += map(int, path.read_text().split())
    return found


def spent(running: Daemon) -> float:
    """Milliseconds of processor time that the daemon's processes have used."""
    threads = [thread for pid in processes_of(running) for thread in Path(f"/proc/{pid}/task").iterdir()]
    return sum(int((thread / "schedstat").read_text().split()[0]) for thread in threads) / 1e6


def register(running: Daemon, work: Path, count: int = COUNT, at_once: int = 1) -> list[str]:
    """Add the plugins, so many at one time; returns their names."""
    source, program = work / "sidecar.c", work / "sidecar"
    source.write_text(SIDECAR)
    subprocess.run([shutil.which("gcc") or "cc", "-O2", "-static", "-o", str(program), str(source)], check=True)

    def add(name: str) -> None:
        folder = write_plugin(work / name, "", sandbox={"network": {"egress": [{"host": "hooks.example.com"}]}})
        shutil.copy(program, folder / "main")
        running.cli("plugin", "add", str(folder), "--yes")

    names = [f"idle-{number:03}" for number in range(count)]
    with ThreadPoolExecutor(at_once) as pool:
        list(pool.map(add, names))
    return names


def for_all(running: Daemon, names: Iterable[str], method: str) -> float:
    """Call a verb for all plugins at once; returns the milliseconds until the last answer."""

    def ask(name: str) -> None:
        with Client(running.root) as client:
            client.call(method, name=name)

    with ThreadPoolExecutor(CALLERS) as pool:
        began = time.perf_counter()
        list(pool.map(ask, names))
        return (time.perf_counter() - began) * 1e3


def _at_once(once: Callable[[], None]) -> float:
    with ThreadPoolExecutor(COUNT) as pool:
        began = time.perf_counter()
        list(pool.map(lambda _: once(), range(COUNT)))
        return (time.perf_counter() - began) * 1e3


def memory(running: Daemon) -> dict[str, float]:
    """Return the KiB of each of the daemon's processes."""
    assert running.process is not None
    modules = {"audit": "isolator.audit.service", "broker": "isolator.broker.service", "host": "host.service"}
    pids = {name: running.service_pid(module) for name, module in modules.items()}
    pids |= {"supervisor": running.process.pid, "launcher": running.service_pid("isolator.launcher.server")}
    return {name: pss(pid) for name, pid in pids.items()}


def _open_files(running: Daemon) -> int:
    """Return how many descriptors the supervisor has open."""
    assert running.process is not None
    return len(os.listdir(f"/proc/{running.process.pid}/fd"))


def _inits(running: Daemon, names: Iterable[str]) -> float:
    with Client(running.root) as client:
        entries = client.call("plugin.list")["plugins"]
    wanted = set(names)
    return sum(pss(entry["pid"]) for entry in entries if entry["name"] in wanted and entry["pid"])


def pss(pid: int, of: str = "Pss") -> float:
    """Return the KiB of a process, of shared pages its share; ``Pss_Anon``: without the pages of files."""
    with contextlib.suppress(OSError):
        for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
            if line.startswith(f"{of}:"):
                return float(line.split()[1])
    return 0.0
