"""Figures that a cage's programs are shown in place of the host's: its processors, its memory, its load.

They agree with each other, with the cage's caps and with the processors that its processes may run on. A share of a
processor counts as a whole one. The files are written anew at each snapshot of the daemon's; in a single run they stay
as they were at its start.
"""

from __future__ import annotations

import functools
import itertools
import math
import os
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from isolator.base.structs import field, struct_class

if TYPE_CHECKING:
    from isolator.policy.model import ResourcePolicy

_TICKS = os.sysconf("SC_CLK_TCK")
_PAGE = os.sysconf("SC_PAGE_SIZE")
_LOAD_SECONDS = (60.0, 300.0, 900.0)
_turns = itertools.count(int.from_bytes(os.urandom(2), "little"))
"""Cages take turns at the host's processors, from a random one on."""


def count_processors(share: int) -> int:
    """The processors that a share, in thousandths of one, amounts to: rounded up, and not more than there are."""
    return max(1, min(math.ceil(share / 1000), len(os.sched_getaffinity(0))))


def choose_processors(share: int) -> tuple[int, ...]:
    """Processors of this host for one more cage, spread evenly over all cages, in ascending order."""
    usable, number = sorted(os.sched_getaffinity(0)), count_processors(share)
    if number == len(usable):
        return tuple(usable)
    first = next(_turns) * number
    return tuple(sorted(usable[(first + offset) % len(usable)] for offset in range(number)))


@struct_class()
class Figures:
    """The figures of one cage. ``folder``: a descriptor of the file system that they are written to; the caller's."""

    folder: int
    processors: tuple[int, ...]
    memory: int
    """Bytes: the cap, or what the host has if that is less."""
    swap: int
    booted: int
    """Unix time at which the cage's uptime was 0."""
    _load: tuple[float, float, float] = (0.0, 0.0, 0.0)
    _seen: tuple[float, int] = (0.0, 0)
    """Uptime and processor time, in µs, at the last refresh."""
    _shown: dict[str, Any] = field(default_factory=dict)
    """Values of which each file was made when it was written last."""

    @classmethod
    def of(cls, folder: int, limits: ResourcePolicy, processors: tuple[int, ...], boot_offset: int) -> Figures:
        """The figures of a new cage; ``boot_offset``: seconds that its CLOCK_BOOTTIME is ahead of the host's."""
        memory = min(limits.memory, _memory_of_host())
        booted = time.time() - time.clock_gettime(time.CLOCK_BOOTTIME) - boot_offset
        return cls(folder, processors, memory, limits.swap, int(booted))

    def hand_over(self) -> dict[str, Any]:
        """State for ``adopt``, as JSON."""
        return {"memory": self.memory, "swap": self.swap, "booted": self.booted, "load": self._load, "seen": self._seen}

    @classmethod
    def adopt(cls, folder: int, processors: tuple[int, ...], before: Mapping[str, Any]) -> Figures:
        """The figures of a cage that runs since before this process's exec."""
        one, five, fifteen = map(float, before["load"])
        uptime, used = before["seen"]
        sizes = (int(before["memory"]), int(before["swap"]), int(before["booted"]))
        return cls(folder, processors, *sizes, (one, five, fifteen), (float(uptime), int(used)))

    def write(self) -> None:
        """Write every file for a cage that has not used anything yet."""
        self._put("cpu/online", _ranges(self.processors) + "\n")
        self._put("proc/cpuinfo", _cpuinfo_of(self.processors))
        self.refresh({}, 0.0)

    def refresh(self, usage: Mapping[str, Any], uptime: float) -> None:
        """Write what has changed; ``usage``: data of a ``resources`` record, ``uptime`` in seconds."""
        used, tasks = int(usage.get("cpu_us", 0)), max(1, int(usage.get("tasks", 1)))
        passed = uptime - self._seen[0]
        if passed > 0:
            busy = max(0.0, (used - self._seen[1]) / 1e6 / passed)
            before = zip(self._load, _LOAD_SECONDS, strict=True)
            one, five, fifteen = (busy + (load - busy) * math.exp(-passed / span) for load, span in before)
            self._load, self._seen = (one, five, fifteen), (uptime, used)
        loads = f"{' '.join([f'{load:.2f}' for load in self._load])} 1/{tasks} {tasks}\n"
        if self._is_new("proc/loadavg", loads):
            self._put("proc/loadavg", loads)
        taken = int(usage.get("memory", 0)), int(usage.get("cached", 0)), int(usage.get("swap", 0))
        if self._is_new("proc/meminfo", taken):
            memory, cached, swapped = taken
            self._put("proc/meminfo", meminfo(self.memory, memory, cached, self.swap, swapped))
        system = min(used, int(usage.get("system_us", 0)))
        self._put("proc/stat", stat(self.processors, used - system, system, uptime, self.booted))

    def _is_new(self, name: str, made_of: object) -> bool:
        """Whether a file is to be written; it takes longer than all of a snapshot's arithmetic."""
        if self._shown.get(name) == made_of:
            return False
        self._shown[name] = made_of
        return True

    def _put(self, name: str, text: str) -> None:
        """Write into the file that is there: a bind shows the inode that it was made of."""
        raw = text.encode()
        fd = os.open(name, os.O_WRONLY | os.O_CLOEXEC | os.O_NOFOLLOW, dir_fd=self.folder)
        try:
            os.write(fd, raw)
            os.ftruncate(fd, len(raw))
        finally:
            os.close(fd)


def meminfo(total: int, used: int, cached: int, swap: int, swapped: int) -> str:
    """/proc/meminfo of a machine with ``total`` bytes, of which ``used`` are taken, ``cached`` of those by files."""
    used = min(used, total)
    cached = min(cached, used)
    values = {
        "MemTotal": total, "MemFree": total - used, "MemAvailable": total - used + cached, "Buffers": 0,
        "Cached": cached, "SwapCached": 0, "Active": used - cached, "Inactive": cached,
        "Active(anon)": used - cached, "Inactive(anon)": 0, "Active(file)": 0, "Inactive(file)": cached,
        "Unevictable": 0, "Mlocked": 0, "SwapTotal": swap, "SwapFree": swap - min(swapped, swap), "Dirty": 0,
        "Writeback": 0, "AnonPages": used - cached, "Mapped": 0, "Shmem": 0, "KReclaimable": 0, "Slab": 0,
        "SReclaimable": 0, "SUnreclaim": 0, "KernelStack": 0, "PageTables": 0, "CommitLimit": total + swap,
        "Committed_AS": used, "VmallocTotal": 0, "VmallocUsed": 0,
    }  # fmt: skip
    return "".join(f"{name + ':':<15} {value // 1024:>8} kB\n" for name, value in values.items())


def stat(processors: Sequence[int], user: int, system: int, uptime: float, booted: int) -> str:
    """/proc/stat; ``user`` and ``system``: processor time in µs of all processors together."""
    share = len(processors)
    ticks = [round(time * _TICKS / 1e6 / share) for time in (user, system)]
    each = [ticks[0], 0, ticks[1], max(0, round(uptime * _TICKS) - sum(ticks)), 0, 0, 0, 0, 0, 0]
    lines = [f"cpu  {' '.join(str(value * share) for value in each)}"]
    lines += [f"cpu{number} {' '.join(map(str, each))}" for number in processors]
    lines += ["intr 0", "ctxt 0", f"btime {booted}", "processes 1", "procs_running 1", "procs_blocked 0"]
    return "\n".join((*lines, "softirq 0 0 0 0 0 0 0 0 0 0 0")) + "\n"


def cpuinfo(text: str, processors: Sequence[int]) -> str:
    """/proc/cpuinfo of a host, with some of its processors only; their siblings and cores are counted anew."""
    blocks = [block for block in text.split("\n\n") if block.strip()]
    shown = [block for block in blocks if _field(block, "processor") in {"", *map(str, processors)}]
    packages = [_field(block, "physical id") for block in shown]
    cores = {(_field(block, "physical id"), _field(block, "core id")) for block in shown}
    counted = []
    for block, package in zip(shown, packages, strict=True):
        counts = {"siblings": packages.count(package), "cpu cores": sum(one == package for one, _ in cores)}
        counted.append("\n".join(_counted(line, counts) for line in block.splitlines()))
    return "".join(f"{block}\n\n" for block in counted)


def _counted(line: str, counts: dict[str, int]) -> str:
    key, colon, _ = line.partition(":")
    return f"{key}: {counts[key.strip()]}" if colon and key.strip() in counts else line


def _field(block: str, name: str) -> str:
    for line in block.splitlines():
        key, _, value = line.partition(":")
        if key.strip() == name:
            return value.strip()
    return ""


def _ranges(numbers: Sequence[int]) -> str:
    """A list as the kernel writes it: ``0-2,5``."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return ",".join(f"{run[0]}-{run[-1]}" if len(run) > 1 else f"{run[0]}" for run in runs)


@functools.lru_cache(256)
def _cpuinfo_of(processors: tuple[int, ...]) -> str:
    return cpuinfo(_cpuinfo_of_host(), processors)


@functools.cache
def _memory_of_host() -> int:
    return os.sysconf("SC_PHYS_PAGES") * _PAGE  # the C library reads a file of the kernel's for it


@functools.cache
def _cpuinfo_of_host() -> str:
    return Path("/proc/cpuinfo").read_text()
