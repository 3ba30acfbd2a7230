"""Present use of one run, read from its control groups and from /proc: the ``data`` of a ``resources`` record.

Works on cgroup v2 and on hybrid hosts, where the counters of one plugin are spread over the folders of several
hierarchies: each field is taken from the first folder that has it. A field that this host does not count is left out,
never guessed. Nothing here raises because a process ended meanwhile. Names and units: ``schema.Resources``.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

Usage = dict[str, Any]
OF_PROCESSES = ("threads", "open_files", "tcp_sockets", "network_bytes", "io_read", "io_written")
"""Fields that end with the processes; the others are the control group's until it is removed."""


def snapshot(folders: Sequence[Path], pids: Iterable[int], *, totals: bool = False) -> Usage:
    """Use by the processes ``pids`` in the control groups ``folders`` (one per hierarchy).

    ``totals``: of the groups' figures those of ``_TOTALS`` alone, which takes a fraction of the time.
    """
    usage: Usage = {}
    for folder in folders:
        names = _names(folder)
        for name, read in (_TOTALS if totals else _FILES).items():
            if name not in names:
                continue
            text = _text(f"{folder}/{name}")  # none: the group has just been removed
            for field, value in read(text).items() if text else ():
                usage.setdefault(field, value)
    pids = list(pids)
    if totals:
        return usage | _network(pids) | (_io_of_processes(pids) if pids and "io_read" not in usage else {})
    usage["processes"], threads = len(pids), sum(_count(pid, "task") for pid in pids)
    usage.setdefault("tasks", threads)
    if pids:
        usage["threads"] = threads
        usage["open_files"] = sum(map(_open_files, pids))
        usage.update(_network(pids))
        if "io_read" not in usage:
            usage.update(_io_of_processes(pids))
    return usage


def refreshed(before: Usage, folders: Sequence[Path], pid: int, *, settled: bool = False) -> Usage | None:
    """The snapshot ``before`` as of now if no process of the groups has run since, cheaply; else None.

    What only a process can change is as it was then. ``pid`` is any of them. ``settled``: ``before`` was refreshed
    itself, so nothing waits, computes or is yet to be written that has not shown by then.
    """
    names = [(f"{folder}/", _names(folder)) for folder in folders]
    times = next((found for found in _read(_TIMES, names) if "cpu_us" in found), {})
    if times.get("cpu_us") != before.get("cpu_us", -1):
        return None
    at_rest = settled and not any(map(before.get, _SIGNS))
    usage: Usage = {}
    for found in _read(_ALWAYS if at_rest else _IN_MOTION, names):
        usage = found | usage
    if at_rest and usage.get("memory") != before.get("memory"):
        for found in _read(_IN_MOTION, names):
            usage = found | usage
    network = _network([pid], known=before if settled else None)
    return before | usage | network


def _read(wanted: frozenset[str], names: Iterable[tuple[str, frozenset[str]]]) -> Iterator[Usage]:
    """Figures of the files that there are in the groups, first those of the first."""
    for folder, there in names:
        for name in there & wanted:
            yield _FILES[name](_text(folder + name))


def _names(folder: Path) -> frozenset[str]:
    """The names of a group's files, of those that are read here; the groups beside it have the same."""
    hierarchy = os.path.dirname(folder)
    if hierarchy not in _known:
        try:
            _known[hierarchy] = frozenset(_FILES.keys() & os.listdir(folder))
        except OSError:
            return frozenset()
    return _known[hierarchy]


def _text(path: str) -> str:
    """The content of a file of the kernel's, empty if it cannot be read; each end of a run reads dozens of them."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return ""
    try:
        return os.read(fd, 1 << 16).decode("ascii", "replace")
    except OSError:
        return ""
    finally:
        os.close(fd)


def _single(field: str, unit: int = 1) -> Callable[[str], Usage]:
    """A file that is one number; ``unit``: how many of it are one of the field."""

    def read(text: str) -> Usage:
        return {field: int(text) // unit} if text.strip().isdigit() else {}

    return read


def _table(text: str) -> dict[str, int]:
    """``KEY NUMBER`` lines; what is no number is left out."""
    words = iter(text.split())
    return {key: int(number) for key, number in zip(words, words, strict=False) if number.isdigit()}


def _figures(*fields: tuple[str, str, int]) -> Callable[[str], Usage]:
    """Lines of a table: key, field, and how many of its unit are one of the field's; of a field the first that is."""

    def read(text: str) -> Usage:
        table, usage = _table(text), Usage()
        for key, field, unit in fields:
            if key in table:
                usage.setdefault(field, table[key] // unit)
        return usage

    return read


_cpu = _figures(
    ("usage_usec", "cpu_us", 1), ("user_usec", "user_us", 1), ("system_usec", "system_us", 1),
    ("throttled_usec", "throttled_us", 1), ("throttled_time", "throttled_us", 1000), ("nr_throttled", "throttled", 1),
)  # fmt: skip
"""v2 counts in microseconds under these names; v1's cpu.stat only knows throttling, in nanoseconds."""
_memory = _figures(
    ("anon", "anonymous", 1), ("total_rss", "anonymous", 1), ("file", "cached", 1), ("total_cache", "cached", 1)
)
_memory_events = _figures(("oom_kill", "oom_kills", 1))


def _io(text: str) -> Usage:
    """v2 ``io.stat``: ``MAJ:MIN rbytes=… wbytes=…`` a device."""
    total = {"rbytes": 0, "wbytes": 0}
    for line in text.splitlines():
        for field in line.split()[1:]:
            key, _, value = field.partition("=")
            if key in total and value.isdigit():
                total[key] += int(value)
    return {"io_read": total["rbytes"], "io_written": total["wbytes"]}


def _blkio(text: str) -> Usage:
    """v1 ``blkio``: ``MAJ:MIN Read N`` a device and direction."""
    total = {"Read": 0, "Write": 0}
    for line in text.splitlines():
        fields = line.split()
        if len(fields) == 3 and fields[1] in total:
            total[fields[1]] += int(fields[2])
    return {"io_read": total["Read"], "io_written": total["Write"]}


def _pressure(field: str) -> Callable[[str], Usage]:
    def read(text: str) -> Usage:
        for line in text.splitlines():
            kind, _, rest = line.partition(" ")
            if kind == "some" and rest.startswith("avg10="):
                return {field: float(rest[6:].split(" ", 1)[0])}
        return {}

    return read


_FILES: dict[str, Callable[[str], Usage]] = {
    "cpu.stat": _cpu,
    "cpuacct.usage": _single("cpu_us", 1000),
    "cpu.idle": _single("background"),
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


_known: dict[str, frozenset[str]] = {}

_TOTALS = {
    name: _FILES[name]
    for name in (
        "cpu.stat", "cpuacct.usage", "memory.peak", "memory.max_usage_in_bytes", "io.stat",
        "blkio.throttle.io_service_bytes",
    )
}  # fmt: skip
"""Those that tell what was used in all."""

_TIMES = frozenset(("cpu.stat", "cpuacct.usage"))
"""Files that tell whether a process has run: the first that there is."""
_ALWAYS = frozenset((
    "memory.current", "memory.usage_in_bytes", "io.stat", "blkio.throttle.io_service_bytes",
))  # fmt: skip
"""Files that change at any time while no process runs: memory is taken back, pages are written later."""
_IN_MOTION = _ALWAYS | {
    "cpu.idle", "memory.stat", "memory.swap.current", "cpu.pressure", "memory.pressure", "io.pressure",
}  # fmt: skip
"""With them those that change for a while after a process has run, or as the memory does."""
_SIGNS = ("background", "pressure_cpu", "pressure_memory", "pressure_io")
"""Fields that are 0 of a group in which nothing waits or has computed of late."""


def _count(pid: int, what: str) -> int:
    try:
        return len(os.listdir(f"/proc/{pid}/{what}"))
    except OSError:
        return 0


def _open_files(pid: int) -> int:
    """The kernel's count (6.2), else the length of the list: a plugin may have millions, which nobody should list."""
    try:
        return os.stat(f"/proc/{pid}/fd").st_size or _count(pid, "fd")
    except OSError:
        return 0


def _network(pids: Iterable[int], *, known: Usage | None = None) -> Usage:
    """The cage's network, which all its processes share: bytes sent, and sockets in use unless they are as ``known``.

    No connection comes or goes without a byte.
    """
    for pid in pids:
        devices = _text(f"/proc/{pid}/net/dev").splitlines()[2:]
        if not devices:
            continue
        usage: Usage = {"network_bytes": sum(int(line.partition(":")[2].split()[8]) for line in devices)}
        if known is not None and usage["network_bytes"] == known.get("network_bytes"):
            return {}
        for words in map(str.split, _text(f"/proc/{pid}/net/sockstat").splitlines()):
            if words[:2] == ["TCP:", "inuse"]:
                usage["tcp_sockets"] = int(words[2])
        return usage
    return {}


def _io_of_processes(pids: list[int]) -> Usage:
    """Bytes that the living processes read and wrote, for hosts without an io controller."""
    read = written = 0
    for pid in pids:
        table = _table(_text(f"/proc/{pid}/io").replace(":", ""))
        read, written = read + table.get("read_bytes", 0), written + table.get("write_bytes", 0)
    return {"io_read": read, "io_written": written}
