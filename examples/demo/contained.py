"""The attempts of the hostile plugin, what it is told for each, and how to tell which layer stopped it.

The plugin's own word (success, errno) is never the whole evidence: it is held against the audit's records of the
same event and against the cgroup's own counters.
"""

from __future__ import annotations

import re
import urllib.parse
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from daemon import Record

Known = dict[str, str | list[str]]


@dataclass(frozen=True)
class Target:
    """What the attacker is assumed to know about the host and its victim."""

    pid: int
    secrets: list[str]
    sockets: list[str]
    places: list[str]
    address: str
    port: int


@dataclass(frozen=True)
class Attempt:
    """One attack: its name in the plugin, what it tries, the layers by errno, and the records that must exist."""

    name: str
    tries: str
    layers: Mapping[str, str]
    records: tuple[str, ...] = ()
    tells: Callable[[Target], Known] = field(default=lambda _: {})
    during: bool = False
    """Is the notifier to work while this one runs?"""


FILES = {
    "ENOENT": "filesystem view: it is not there",
    "EACCES": "user: the file mode says no",
    "EROFS": "filesystem view: read-only",
    "EPERM": "user: not permitted",
    "ENOTDIR": "filesystem view: it is not there",
}
NETWORK = {
    "ECONNREFUSED": "network namespace",
    "ECONNRESET": "network: the broker",
    "EPERM": "network: nftables",
    "EACCES": "network: nftables",
    "ENETUNREACH": "network namespace",
    "EHOSTUNREACH": "network namespace",
    "ConnectionError": "network: the broker",
    "EAI_NONAME": "network: DNS, the name is not granted",
    "EAI_NODATA": "network: DNS, the name is not granted",
    "EAI_AGAIN": "network: DNS",
}
KERNEL = {"EPERM": "no capabilities", "ENOSYS": "seccomp: no such call", "ESRCH": "pid namespace: not there"}
PROCESS = {**KERNEL, "ENOENT": "pid namespace: not there", "EACCES": "init is not dumpable"}

ATTEMPTS = (
    Attempt("read-shadow", "read /etc/shadow", FILES),
    Attempt(
        "read-secret",
        "read another plugin's secret: its state, its environment, the store and its key",
        FILES,
        tells=lambda t: {"paths": t.secrets, "pid": str(t.pid)},
    ),
    Attempt("write-outside", "write outside its state", FILES, tells=lambda t: {"places": t.places}),
    Attempt(
        "host-loopback",
        "connect to the database on the host's loopback, also by the host's address",
        NETWORK,
        ("net.denied",),
        lambda t: {"port": str(t.port), "hosts": [t.address]},
    ),
    Attempt("metadata", "fetch credentials from the metadata service 169.254.169.254", NETWORK, ("net.denied",)),
    Attempt(
        "other-socket",
        "connect to the notifier's socket and to the daemon's own",
        FILES,
        tells=lambda t: {"paths": t.sockets, "pid": str(t.pid)},
    ),
    Attempt("ungranted-name", "reach collector.example.net, which is not granted", NETWORK, ("net.query",)),
    Attempt("resolver-udp", "ask an outside resolver: 8.8.8.8, UDP", NETWORK, ("net.denied",)),
    Attempt("resolver-tcp", "ask an outside resolver: 8.8.8.8, TCP", NETWORK, ("net.denied",)),
    Attempt("mount", "mount a file system", KERNEL, ("syscall.denied",)),
    Attempt("user-namespace", "make a user namespace", KERNEL, ("syscall.denied",)),
    Attempt("ptrace-init", "take over process 1 of its cage", PROCESS, ("syscall.denied",)),
    Attempt(
        "ptrace-outside",
        "take over the notifier by its process id",
        PROCESS,
        ("syscall.denied",),
        lambda t: {"pid": str(t.pid)},
    ),
    Attempt("setuid-root", "become root", KERNEL),
    Attempt("open-files", "open 5000 files", {"EMFILE": "rlimits: nofile"}),
    Attempt("fill-tmp", "write 64 MiB to /tmp", {"ENOSPC": "filesystem view: /tmp has a size"}),
    Attempt("fill-state", "write 64 MiB to its state", {"ENOSPC": "state image: has a size"}),
    Attempt("flood-stdout", "write 16 MiB to its output", {}, during=True),
    Attempt("fork-bomb", "start 500 processes", {"EAGAIN": "cgroup: pids.max"}, during=True),
    Attempt("memory-bomb", "take 1 GiB of memory", {"ENOMEM": "cgroup: memory.max"}, during=True),
)


def payload(attempt: Attempt, target: Target) -> dict[str, Any]:
    """The event that makes the plugin try it."""
    known = urllib.parse.urlencode(attempt.tells(target), doseq=True)
    fields = {"project_id": "proj_abc123", "error_id": f"err_{attempt.name}", "fingerprint": "demo", "level": "error"}
    return {
        **fields,
        "count": 1,
        "title": attempt.name,
        **({"url": f"https://known.invalid/?{known}"} if known else {}),
    }


def layers_said(attempt: Attempt, detail: str) -> list[str]:
    """The layers that the errno values point to, in the order in which they appear."""
    words = re.findall(r"\b(?:E[A-Z]+(?:_[A-Z]+)?|ConnectionError)\b", detail)
    return list(dict.fromkeys(attempt.layers.get(word, f"unexplained {word}") for word in words))


def layers_recorded(records: list[Record]) -> list[str]:
    """What the audit says stopped it: a layer and the evidence, one text each."""
    found: dict[str, None] = {}
    for record in records:
        data = record.get("data") or {}
        match record["type"]:
            case "syscall.denied":
                found[f"seccomp: {data.get('call') or data.get('name')}"] = None
            case "fs.denied":
                found[f"landlock: {data.get('path')}"] = None
            case "net.denied":
                where = f"{data.get('name') or data.get('address')}:{data.get('port')}"
                found[f"network: {where} ({data.get('rule') or data.get('verdict')})"] = None
            case "net.query" if data.get("verdict") not in {"allow", "allowed", "granted", "ok"}:
                found[f"DNS: {data.get('name')} ({data.get('verdict')})"] = None
            case "plugin.crashed" | "plugin.stopped" if data.get("cause"):
                found[f"{record['type']}: {data['cause']}"] = None
    return list(found)


def cgroup_counter(pid: int, controller: str, file: str, key: str) -> int | None:
    """One counter of the cgroup of a process, wherever the controller is mounted; None when it cannot be read."""
    places: dict[str, str] = {}
    for line in Path("/proc/self/mountinfo").read_text().splitlines():
        place, (kind, _, options) = line.split()[4], line.split(" - ")[1].split()[:3]
        if kind in {"cgroup", "cgroup2"}:
            places.update(dict.fromkeys(options.split(",") if kind == "cgroup" else [""], place))
    try:
        groups = [line.split(":", 2) for line in Path(f"/proc/{pid}/cgroup").read_text().splitlines()]
    except OSError:
        return None
    for wanted in (controller, ""):
        for _, names, path in groups:
            if wanted in names.split(",") and wanted in places:
                try:
                    pairs = [line.split() for line in Path(places[wanted] + path, file).read_text().splitlines()]
                    return int(dict(pairs)[key])
                except (OSError, KeyError, ValueError):
                    continue
    return None
