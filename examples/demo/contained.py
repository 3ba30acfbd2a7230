"""The attempts of the hostile plugin, what it is told for each, and how to tell which layer stopped it.

The plugin's own word (success, errno) is never the whole evidence: it is held against the audit's records of the
same event, what the far side saw, and the kernel's own files. Each attempt names the layers that have to be the ones
that stop it: were one of them missing, another wall might still hold, but the demo would say so.
"""

from __future__ import annotations

import re
import urllib.parse
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from daemon import Record

Known = dict[str, str | list[str]]
Fact = tuple[str, str]
"""A layer, and the evidence that it was the one."""


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
    """One attack: its name in the plugin, what it tries, the layers that must stop it, how errno tells of them."""

    name: str
    tries: str
    by: frozenset[str]
    meaning: Mapping[str, Fact]
    """For each errno the layer that answers so, and what it means."""
    records: tuple[str, ...] = ()
    """Types of records that must exist."""
    tells: Callable[[Target], Known] = field(default=lambda _: {})
    also: frozenset[str] = frozenset()
    """Layers that answer on some hosts besides, for what is not on all."""
    during: bool = False
    """Is the notifier to work while this one runs?"""

    def expected(self, layers: set[str]) -> bool:
        """Whether these are the layers that must have stopped it."""
        return self.by <= layers <= self.by | self.also


VIEW, LOOPBACK, NFT, NAMES = "file system view", "net namespace", "nftables", "DNS"
SECCOMP, CAPS, PIDS = "seccomp", "capabilities", "pid namespace"
RLIMIT, STATE, TASKS, MEMORY, LOG = "rlimits", "state image", "cgroup tasks", "cgroup memory", "log capture"

FILES = {
    "ENOENT": (VIEW, "not there"),
    "ENOTDIR": (VIEW, "not there"),
    "EROFS": (VIEW, "read-only"),
    "EACCES": ("user", "the file mode says no"),
    "EPERM": ("user", "not permitted"),
}
NETWORK = {
    "ECONNREFUSED": (NFT, "reset"),
    "ECONNRESET": ("broker", "reset"),
    "ConnectionError": ("broker", "closed"),
    "EPERM": (NFT, "dropped"),
    "EAI_NONAME": (NAMES, "no such name here"),
    "EAI_NODATA": (NAMES, "no such name here"),
}
# With the filter off it would be the missing capabilities that answer EPERM: then no record names the call.
KERNEL = {"EPERM": (SECCOMP, "refused"), "ENOSYS": (SECCOMP, "no such call")}
PROCESS = {**KERNEL, "ESRCH": (PIDS, "no such process"), "ENOENT": (PIDS, "not there"), "EACCES": ("user", "refused")}

ATTEMPTS = (
    Attempt("read-shadow", "read /etc/shadow", frozenset({VIEW}), FILES),
    Attempt(
        "read-secret",
        "read the notifier's secret: store, key, state, environment",
        frozenset({VIEW}),
        FILES,
        tells=lambda t: {"paths": t.secrets, "pid": str(t.pid)},
    ),
    Attempt(
        "write-outside",
        "write outside its state, and to the kernel's settings",
        frozenset({VIEW}),
        FILES,
        tells=lambda t: {"places": t.places},
        also=frozenset({"user"}),  # the mode of what covers /proc/sysrq-trigger, where the kernel has that
    ),
    Attempt(
        "host-loopback",
        "reach a database on the host's loopback",
        frozenset({LOOPBACK, NFT}),
        NETWORK,
        ("net.denied",),
        lambda t: {"port": str(t.port), "hosts": [t.address]},
    ),
    Attempt("metadata", "fetch the cloud's credentials", frozenset({NFT}), NETWORK, ("net.denied",)),
    Attempt(
        "other-socket",
        "connect to the notifier's socket and the daemon's",
        frozenset({VIEW}),
        FILES,
        tells=lambda t: {"paths": t.sockets, "pid": str(t.pid)},
    ),
    Attempt("ungranted-name", "reach a name that is not granted", frozenset({NAMES}), NETWORK, ("net.query",)),
    Attempt("resolver-udp", "ask an outside resolver, UDP", frozenset({NFT}), NETWORK, ("net.denied",)),
    Attempt("resolver-tcp", "ask an outside resolver, TCP", frozenset({NFT}), NETWORK, ("net.denied",)),
    Attempt("mount", "mount a file system", frozenset({SECCOMP}), KERNEL, ("syscall.denied",)),
    Attempt("user-namespace", "make a user namespace", frozenset({SECCOMP}), KERNEL, ("syscall.denied",)),
    Attempt("ptrace-init", "take over process 1 of its cage", frozenset({SECCOMP, PIDS}), PROCESS, ("syscall.denied",)),
    Attempt(
        "ptrace-outside",
        "take over the notifier by its process id",
        frozenset({SECCOMP, PIDS}),
        PROCESS,
        ("syscall.denied",),
        lambda t: {"pid": str(t.pid)},
    ),
    Attempt("setuid-root", "become root", frozenset({CAPS}), {"EPERM": (CAPS, "refused")}),
    Attempt("open-files", "open 5000 files", frozenset({RLIMIT}), {"EMFILE": (RLIMIT, "no more")}),
    Attempt("fill-tmp", "write 64 MiB to /tmp", frozenset({VIEW}), {"ENOSPC": (VIEW, "full")}),
    Attempt("fill-state", "write 64 MiB to its state", frozenset({STATE}), {"ENOSPC": (STATE, "full")}),
    Attempt("flood-stdout", "write 16 MiB to its output", frozenset({LOG}), {}, during=True),
    Attempt("fork-bomb", "start 500 processes", frozenset({TASKS}), {"EAGAIN": (TASKS, "no more")}, during=True),
    Attempt("memory-bomb", "take 1 GiB of memory", frozenset({MEMORY}), {}, during=True),
)


def payload(attempt: Attempt, target: Target) -> dict[str, Any]:
    """The event that makes the plugin try it."""
    known = urllib.parse.urlencode(attempt.tells(target), doseq=True)
    fields = {"project_id": "shop", "error_id": f"err_{attempt.name}", "fingerprint": "demo", "level": "error"}
    return {
        **fields,
        "count": 1,
        "title": attempt.name,
        **({"url": f"https://known.invalid/?{known}"} if known else {}),
    }


def facts(attempt: Attempt, said: Mapping[str, Any], records: Sequence[Record]) -> list[Fact]:
    """Which layers stopped it, one entry each: what the plugin was told, and the records of it."""
    found: dict[str, list[str]] = {}
    for word, places in _told(str(said["detail"])) if attempt.meaning else ():
        targets = places
        layer, means = attempt.meaning.get(word, ("unexplained", "?"))
        if layer == NFT and (own := [target for target in targets if re.match(r"127\.|::1", target)]):
            # Its loopback is its own: nobody listens there, and there is nothing to refuse or to record.
            found.setdefault(LOOPBACK, []).append(f"{word} at {', '.join(own)}: its own, empty")
            targets = [target for target in targets if target not in own]
            if not targets:
                continue
        found.setdefault(layer, []).append(f"{word}, {means}{_shown(targets)}")
    calls = recorded(records, "syscall.denied", "call")
    if SECCOMP in found:
        if calls:
            found[SECCOMP].append(f"on record: {', '.join(calls)}")
        else:
            found[CAPS] = found.pop(SECCOMP)
    denied = [f"{data['address']}:{data['port']}, rule {data['rule']}" for data in _data(records, "net.denied")]
    for layer in (NFT, "broker"):
        if layer in found and denied:
            found[layer].append(f"on record: {'; '.join(dict.fromkeys(denied))}")
    names = [
        f"{data['name']} {data['verdict']}" for data in _data(records, "net.query") if data["verdict"] != "allowed"
    ]
    if NAMES in found and names:
        found[NAMES] = [f"{found[NAMES][0].partition(' (')[0]}; on record: {', '.join(dict.fromkeys(names))}"]
    return [(layer, "; ".join(texts)) for layer, texts in found.items()]


def calls_refused(attempt: Attempt, said: Mapping[str, Any]) -> list[str]:
    """The system calls that the plugin was refused by EPERM: each must be on record."""
    told = _told(str(said["detail"])) if SECCOMP in attempt.by else []
    return [target for word, targets in told if word == "EPERM" for target in targets]


def _told(detail: str) -> list[tuple[str, list[str]]]:
    """``ENOENT (No such file): a, b; EROFS (...): c`` → errno and targets, in order; what is no errno is its own."""
    told: dict[str, list[str]] = {}
    for part in detail.split("; "):
        if match := re.match(r"(E[A-Z0-9]+(?:_[A-Z]+)?|ConnectionError)\b[^:]*(?:: (.*))?$", part):
            told.setdefault(match[1], []).extend((match[2] or "").split(", ") if match[2] else [])
        elif not part.startswith("raising the limit"):
            told.setdefault(part, [])
    return list(told.items())


def _shown(targets: list[str]) -> str:
    if not targets:
        return ""
    text = ", ".join(targets)
    return f" ({text})" if len(text) <= 48 else f" ({len(targets)} places)"


def recorded(records: Sequence[Record], kind: str, key: str) -> list[str]:
    """One field of the records of one type, without repetitions."""
    return list(dict.fromkeys(str(data[key]) for data in _data(records, kind)))


def _data(records: Sequence[Record], kind: str) -> list[dict[str, Any]]:
    return [record.get("data") or {} for record in records if record["type"] == kind]


def privileges(pid: int) -> str:
    """What the kernel says a process may, in its own words; raises OSError when it is gone."""
    fields = dict(
        line.split(":\t", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines() if ":\t" in line
    )
    wanted = ("CapEff", "CapPrm", "CapBnd", "NoNewPrivs")
    return ", ".join(f"{key} {int(fields[key], 16):x}" for key in wanted)


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
