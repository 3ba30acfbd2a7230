"""Figures of one moment: each plugin's from its control groups and the daemon, the daemon's and the host's by psutil.

The usage of a plugin is read here, at the moment itself, from files that every user may read; rates are differences to
the moment before. A figure that this host or this user does not get is None, never guessed.
"""

from __future__ import annotations

import os
import time
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from host.cli.notes import all_notes
from host.cli.top.trail import Trail
from host.client.client import Client
from isolator.audit.snapshots import Usage, snapshot
from isolator.errors import IsolatorError
from isolator.layers.cgroup.subtree import find_hierarchies

EXEC = "exec"
_SUMMED = ("cpu_us", "memory", "tasks", "network_bytes")
PATIENCE = 10.0
"""Seconds that an answer of the daemon may take."""
CATCH_UP = 10.0
"""Seconds that the first moment waits for the trail."""


@dataclass(frozen=True)
class Row:
    """One plugin. ``cpu`` in cores, ``memory`` and ``egress_per_s`` in bytes, ``latency_p99_us`` in µs.

    ``egress_per_s`` is what goes through its network, both ways; ``denials`` are those of the last ten minutes;
    ``events_per_s`` attempts, and calls of its tools. With the mode exec, ``cpu`` and ``egress_per_s`` are those of all
    its invocations, also of such as began and ended in between; ``memory`` and ``tasks`` of those under way, whose
    number is ``invocations``.
    """

    name: str
    state: str
    paused: bool
    cpu: float | None
    cpu_cap: float | None
    memory: int | None
    memory_cap: int | None
    tasks: int | None
    tasks_cap: int | None
    events_per_s: float | None
    queue: int
    latency_p99_us: int | None
    denials: int | None
    egress_per_s: float | None
    notes: tuple[str, ...]
    mode: str = "oneshot"
    invocations: int = 0


@dataclass(frozen=True)
class Process:
    """One of the daemon's processes; ``cpu`` in cores, ``memory`` (resident) in bytes."""

    name: str
    pid: int
    cpu: float | None
    memory: int | None


@dataclass(frozen=True)
class Machine:
    """The host: ``cpu`` in cores, memory in bytes, load averages of 1, 5 and 15 minutes."""

    cpu: float
    cores: int
    load: tuple[float, float, float]
    memory: int
    memory_total: int


@dataclass(frozen=True)
class Moment:
    """Everything at one moment; rates are of the last ``seconds``."""

    at: float
    seconds: float
    version: str
    started_at: float
    host: Machine
    processes: tuple[Process, ...]
    alarms: tuple[str, ...]
    plugins: tuple[Row, ...]


@dataclass
class _Before:
    """The figures of before, to which rates are differences."""

    run: str | None
    at: float
    usage: Usage
    attempts: int
    calls: int


class Figures:
    """The source of moments, over one connection to the daemon; one that breaks is made anew."""

    def __init__(self, root: str | None) -> None:
        self._root = root
        self._client = Client(root, timeout=PATIENCE)
        self._trail = Trail(root)
        self._trail.wait(CATCH_UP)
        self._before: dict[str, _Before] = {}
        self._groups: dict[str, list[Path]] = {}
        """Control groups of each run."""
        self._processes: dict[int, psutil.Process] = {}
        self._at = time.monotonic()
        psutil.cpu_percent()

    def close(self) -> None:
        self._client.close()

    def moment(self) -> Moment:
        """The figures of now; rates are None for what the moment before did not have. Raises IsolatorError."""
        try:
            status, listed = self._client.call("status"), self._client.call("plugin.list")
        except IsolatorError:
            self._client.close()
            self._client = Client(self._root, timeout=PATIENCE)
            raise
        now, denied = time.monotonic(), self._trail.denials()
        seconds, self._at = now - self._at, now
        rows = tuple(self._row(entry, None if denied is None else denied[entry["name"]]) for entry in listed["plugins"])
        names = {row.name for row in rows}
        runs = {run for entry in listed["plugins"] for run in self._runs(entry)}
        self._before = {name: one for name, one in self._before.items() if name in names}
        self._groups = {run: folders for run, folders in self._groups.items() if run in runs}
        return Moment(
            at=time.time(), seconds=seconds, version=status["version"], started_at=status["started_at"],
            host=_machine(), processes=self._daemon(status["services"]), alarms=tuple(listed["alarms"]), plugins=rows,
        )  # fmt: skip

    def _row(self, entry: Mapping[str, Any], denials: int | None) -> Row:
        name, mode, runs = entry["name"], entry.get("mode", "oneshot"), self._runs(entry)
        run = entry.get("run") if mode != EXEC else EXEC
        attempts, calls = entry["attempts_ended"], self._trail.calls[name]
        usage = _together([self._usage(one, pid) for one, pid in runs.items()])
        if mode == EXEC:
            usage = _together([dict.fromkeys(_SUMMED, 0), usage, self._trail.invocations.used(name)])
        before, now = self._before.get(name), time.monotonic()
        self._before[name] = _Before(run, now, usage, attempts, calls)
        passed = now - before.at if before is not None else 0.0

        def grown(key: str) -> float | None:
            if before is None or before.run != run or key not in usage or key not in before.usage or passed <= 0:
                return None
            return max(0.0, float(usage[key] - before.usage[key]) / passed)

        ended = attempts - before.attempts if before is not None else 0
        if ended < 0:  # another host process counts from 0
            ended = attempts
        ended += calls - before.calls if before is not None else 0
        cpu, caps = grown("cpu_us"), entry.get("caps") or {}
        return Row(
            name=name, state=entry["state"], paused=entry.get("paused") is not None,
            cpu=cpu / 1e6 if cpu is not None else None, cpu_cap=caps["cpu"] / 1000 if caps else None,
            memory=usage.get("memory"), memory_cap=caps.get("memory"),
            tasks=usage.get("tasks"), tasks_cap=caps.get("tasks"),
            events_per_s=ended / passed if passed > 0 else None, queue=entry["queue"],
            latency_p99_us=entry["latency_p99_us"], denials=denials, egress_per_s=grown("network_bytes"),
            notes=tuple(all_notes(entry)), mode=mode, invocations=len(runs) if mode == EXEC else 0,
        )  # fmt: skip

    def _runs(self, entry: Mapping[str, Any]) -> dict[str, int]:
        """The pids of a plugin's runs, or of its invocations, by run."""
        if entry.get("mode") == EXEC:
            return self._trail.invocations.of(entry["name"])
        return {entry["run"]: entry["pid"]} if entry.get("run") and entry.get("pid") else {}

    def _usage(self, run: str, pid: int) -> Usage:
        """Usage of the run; nothing once it has ended. Its groups stay its own, whoever gets its pid next."""
        try:
            folders = self._groups.get(run)
            if folders is None:
                found = find_hierarchies(pid)
                named = [found.unified, *found.v1.values()] if found.unified is not None else []
                # A group's name has the run: a pid alone may be another's by now.
                folders = self._groups[run] = [path for path in dict.fromkeys(named) if path and run in path.name]
            alive = [pid] if any(_holds(folder, pid) for folder in folders[:1]) else []
            return snapshot(folders, alive) if alive else {}
        except (OSError, ValueError):
            return {}

    def _daemon(self, services: list[dict[str, Any]]) -> tuple[Process, ...]:
        pids = {service["pid"]: service["name"] for service in services if service["up"] and service["pid"]}
        self._processes = {pid: one for pid, one in self._processes.items() if pid in pids and one.is_running()}
        return tuple(self._process(name, pid) for pid, name in pids.items())

    def _process(self, name: str, pid: int) -> Process:
        try:
            known = pid in self._processes
            process = self._processes.setdefault(pid, psutil.Process(pid))
            cpu = process.cpu_percent()  # since the call before, which is none the first time
            return Process(name, pid, cpu / 100 if known else None, process.memory_info().rss)
        except psutil.Error:
            return Process(name, pid, None, None)


def _together(usages: Iterable[Mapping[str, Any]]) -> Usage:
    """The sums of what is counted."""
    found: Counter[str] = Counter()
    for usage in usages:
        found.update({key: value for key, value in usage.items() if key in _SUMMED})
    return dict(found)


def _holds(group: Path, pid: int) -> bool:
    """Whether a process is in this group."""
    return os.fsencode(str(pid)) in (group / "cgroup.procs").read_bytes().split()


def _machine() -> Machine:
    memory, cores = psutil.virtual_memory(), psutil.cpu_count() or 1
    return Machine(
        cpu=psutil.cpu_percent() / 100 * cores, cores=cores, load=psutil.getloadavg(),
        memory=memory.total - memory.available, memory_total=memory.total,
    )  # fmt: skip
