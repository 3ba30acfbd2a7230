"""What a plugin uses at this moment, read from its cgroup and from /proc: the ``data`` of a ``resources`` record.

Works on cgroup v2 and on hybrid hosts, where the figures of one plugin are spread over the folders of several
hierarchies: each figure is taken from the first folder that has it. What the host cannot tell is left out, never
guessed. Nothing here raises because a process ended meanwhile.

``OF_PROCESSES`` are the figures that end with the processes; the others are the control group's to the last.

Names and units: sizes in bytes, ``*_us`` in microseconds since the start of the run, ``pressure_*`` the share of
time in percent over the last ten seconds in which some task waited for that resource.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

Figures = dict[str, Any]
OF_PROCESSES = ("threads", "open_files", "tcp_sockets", "network_bytes", "io_read", "io_written")


def snapshot(folders: Sequence[Path], pids: Iterable[int]) -> Figures:
    """The figures of the processes ``pids`` in the control groups ``folders`` (one per hierarchy)."""
    figures: Figures = {}
    for folder in folders:
        for name, read in _FILES.items():
            try:
                text = (folder / name).read_text("ascii")
            except (OSError, ValueError):
                continue  # not in this hierarchy, or the group has just been removed
            for figure, value in read(text).items():
                figures.setdefault(figure, value)
    pids = list(pids)
    figures.setdefault("tasks", sum(_count(pid, "task") for pid in pids))
    figures["processes"] = len(pids)
    if pids:
        figures["threads"] = sum(_count(pid, "task") for pid in pids)
        figures["open_files"] = sum(map(_open_files, pids))
        figures.update(_sockets(pids))
        if "io_read" not in figures:
            figures.update(_io_of_processes(pids))
    return figures


def _single(figure: str) -> Callable[[str], Figures]:
    def read(text: str) -> Figures:
        return {figure: int(text)} if text.strip().isdigit() else {}

    return read


def _nanoseconds(figure: str) -> Callable[[str], Figures]:
    def read(text: str) -> Figures:
        return {figure: int(text) // 1000} if text.strip().isdigit() else {}

    return read


def _table(text: str) -> dict[str, int]:
    """``KEY NUMBER`` lines."""
    pairs = (line.split() for line in text.splitlines())
    return {pair[0]: int(pair[1]) for pair in pairs if len(pair) == 2 and pair[1].isdigit()}


def _cpu(text: str) -> Figures:
    table, figures = _table(text), Figures()
    # v2 counts in microseconds under these names; v1's cpu.stat only knows throttling, in nanoseconds.
    for key, figure in (("usage_usec", "cpu_us"), ("user_usec", "user_us"), ("system_usec", "system_us")):
        if key in table:
            figures[figure] = table[key]
    if "throttled_usec" in table:
        figures["throttled_us"] = table["throttled_usec"]
    elif "throttled_time" in table:
        figures["throttled_us"] = table["throttled_time"] // 1000
    if "nr_throttled" in table:
        figures["throttled"] = table["nr_throttled"]
    return figures


def _memory(text: str) -> Figures:
    table, figures = _table(text), Figures()
    for key, figure in (
        ("anon", "anonymous"),
        ("total_rss", "anonymous"),
        ("file", "cached"),
        ("total_cache", "cached"),
    ):
        if key in table:
            figures.setdefault(figure, table[key])
    return figures


def _memory_events(text: str) -> Figures:
    table = _table(text)
    return {"oom_kills": table["oom_kill"]} if "oom_kill" in table else {}


def _io(text: str) -> Figures:
    """v2 ``io.stat``: ``MAJ:MIN rbytes=… wbytes=…`` a device."""
    total = {"rbytes": 0, "wbytes": 0}
    for line in text.splitlines():
        for field in line.split()[1:]:
            key, _, value = field.partition("=")
            if key in total and value.isdigit():
                total[key] += int(value)
    return {"io_read": total["rbytes"], "io_written": total["wbytes"]}


def _blkio(text: str) -> Figures:
    """v1 ``blkio``: ``MAJ:MIN Read N`` a device and direction."""
    total = {"Read": 0, "Write": 0}
    for line in text.splitlines():
        fields = line.split()
        if len(fields) == 3 and fields[1] in total:
            total[fields[1]] += int(fields[2])
    return {"io_read": total["Read"], "io_written": total["Write"]}


def _pressure(figure: str) -> Callable[[str], Figures]:
    def read(text: str) -> Figures:
        for line in text.splitlines():
            kind, _, rest = line.partition(" ")
            if kind == "some" and rest.startswith("avg10="):
                return {figure: float(rest[6:].split(" ", 1)[0])}
        return {}

    return read


_FILES: dict[str, Callable[[str], Figures]] = {
    "cpu.stat": _cpu,
    "cpuacct.usage": _nanoseconds("cpu_us"),
    "memory.current": _single("memory"),
    "memory.usage_in_bytes": _single("memory"),
    "memory.peak": _single("memory_peak"),
    "memory.max_usage_in_bytes": _single("memory_peak"),
    "memory.swap.current": _single("swap"),
    "memory.stat": _memory,
    "memory.events": _memory_events,
    "memory.oom_control": _memory_events,
    "pids.current": _single("tasks"),
    "pids.peak": _single("tasks_peak"),
    "io.stat": _io,
    "blkio.throttle.io_service_bytes": _blkio,
    "cpu.pressure": _pressure("pressure_cpu"),
    "memory.pressure": _pressure("pressure_memory"),
    "io.pressure": _pressure("pressure_io"),
}


def _count(pid: int, what: str) -> int:
    try:
        return len(os.listdir(f"/proc/{pid}/{what}"))
    except OSError:
        return 0


def _open_files(pid: int) -> int:
    """The number itself where the kernel tells it (6.2): a plugin may have millions, which nobody should list."""
    try:
        return os.stat(f"/proc/{pid}/fd").st_size or _count(pid, "fd")
    except OSError:
        return 0


def _sockets(pids: list[int]) -> Figures:
    """The cage's network, which all its processes share: sockets in use, bytes that were sent in it."""
    for pid in pids:
        try:
            sockets = Path(f"/proc/{pid}/net/sockstat").read_text("ascii").splitlines()
            devices = Path(f"/proc/{pid}/net/dev").read_text("ascii").splitlines()[2:]
        except OSError:
            continue
        figures: Figures = {"network_bytes": sum(int(line.partition(":")[2].split()[8]) for line in devices)}
        for words in map(str.split, sockets):
            if words[:2] == ["TCP:", "inuse"]:
                figures["tcp_sockets"] = int(words[2])
        return figures
    return {}


def _io_of_processes(pids: list[int]) -> Figures:
    """Without an io controller: what the living processes read and wrote; those that ended are not in it."""
    read = written = 0
    for pid in pids:
        try:
            table = _table(Path(f"/proc/{pid}/io").read_text("ascii").replace(":", ""))
        except OSError:
            continue
        read, written = read + table.get("read_bytes", 0), written + table.get("write_bytes", 0)
    return {"io_read": read, "io_written": written}
