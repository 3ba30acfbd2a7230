"""The part of a cage's /proc and /sys that is the same for every cage: made once, in the launcher's template.

In the template the folder /proc is no file system of processes yet: it holds what will cover the entries of one, each
under the entry's name, with ``.file`` and ``.folder`` for the rest. A cage mounts its /proc over that folder and binds
from below it (isolator.layers.proc.layer). Standard library only.
"""

from __future__ import annotations

import os

FILE, FOLDER = ".file", ".folder"
"""Empty ones, in the template's /proc."""
CAGE, VIEW = ".cage", ".view"
"""Mount points in the template's /proc for the figures of one cage: first both, then ``VIEW`` alone, read-only."""

FILES = ("cpu/online", "proc/cpuinfo", "proc/loadavg", "proc/meminfo", "proc/stat")
"""The files of one cage's figures, by their place in its file system for them."""

_SETTINGS = (
    "crypto/fips_enabled", "fs/file-max", "fs/inotify/max_queued_events", "fs/inotify/max_user_instances",
    "fs/inotify/max_user_watches", "fs/nr_open", "fs/pipe-max-size", "kernel/cap_last_cap", "kernel/ngroups_max",
    "kernel/osrelease", "kernel/ostype", "kernel/overflowgid", "kernel/overflowuid", "kernel/pid_max",
    "kernel/randomize_va_space", "kernel/threads-max", "kernel/version", "vm/max_map_count", "vm/mmap_min_addr",
    "vm/overcommit_memory", "vm/overcommit_ratio", "vm/swappiness",
)  # fmt: skip
"""Kernel settings that programs read to adapt themselves; as they are when the template is made."""
_OF_NEW_NETWORKS = {"net/core/somaxconn": "4096\n", "net/ipv4/ip_local_port_range": "32768\t60999\n"}
"""Settings of a network namespace as the kernel makes it: the template is made in the host's."""
_LIVE = ("kernel/hostname", "kernel/random/uuid")
"""Files of the kernel's own: the first is that of the reader's namespace, the second another one at each read."""
_COUNTERS = ("pgpgin", "pgpgout", "pswpin", "pswpout", "pgfault", "pgmajfault")
"""Counters of /proc/vmstat that programs insist on."""
_LARGEST = 4096

GROUP_PLACES = ("", "memory", "cpu", "cpuacct", "cpuset", "pids")
"""Places below /sys/fs/cgroup where a cage may see groups of its own."""


def texts() -> dict[str, str]:
    """Files of the template by their place in it; from the host's /proc."""
    files = {
        FILE: "",
        "cgroups": _cgroups(_read("/proc/cgroups")),
        "filesystems": "".join(f"nodev\t{kind}\n" for kind in ("tmpfs", "proc", "devpts", "cgroup2")) + "\text4\n",
        "swaps": "Filename\t\t\t\tType\t\tSize\t\tUsed\t\tPriority\n",
        "vmstat": "".join(f"{name} 0\n" for name in _COUNTERS),
    }
    files |= {f"sys/{name}": text for name in _SETTINGS if (text := _read(f"/proc/sys/{name}"))}
    files |= {f"sys/{name}": text for name, text in _OF_NEW_NETWORKS.items()}
    number = os.urandom(16).hex()  # the host's boot_id would name it
    parts = (number[:8], number[8:12], f"4{number[13:16]}", f"a{number[17:20]}", number[20:])
    files["sys/kernel/random/boot_id"] = "-".join(parts) + "\n"
    return {f"proc/{name}": text for name, text in files.items()}


def folders() -> tuple[str, ...]:
    """Folders of the template by their place in it."""
    groups = (f"sys/fs/cgroup/{name}".rstrip("/") for name in GROUP_PLACES)
    return (*(f"proc/{name}" for name in (FOLDER, CAGE, VIEW)), *groups, "sys/devices/system/cpu")


def binds() -> dict[str, str]:
    """Files of the kernel's that the template shows as they are: the host's path by the place in the template."""
    return {f"proc/sys/{name}": path for name in _LIVE if os.path.exists(path := f"/proc/sys/{name}")}


def _read(path: str) -> str:
    try:
        with open(path) as file:  # noqa: PTH123  # the launcher avoids importing pathlib
            return file.read(_LARGEST)
    except OSError:
        return ""  # this kernel has no such file: neither has a cage


def _cgroups(text: str) -> str:
    """/proc/cgroups without the number of the host's groups: name, hierarchy, number, enabled."""
    title, *lines = text.splitlines() or [""]
    shown = ["\t".join((name, hierarchy, "1", enabled)) for name, hierarchy, _, enabled in map(str.split, lines)]
    return "\n".join((title, *shown)) + "\n"
