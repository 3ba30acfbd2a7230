"""Denials of a plugin, each once: how often, when last, and the line that would grant it or why none can.

Beside refusals there are failures (the other side or the host's DNS did not answer, which no policy mends), and limits
that it has run into. They are read from the audit trail, so runs that have ended count too. What is alike (in
everything but times, counts and the connection's own number) is one row.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from host.cli.output import safe
from isolator.audit.failures import failure
from isolator.audit.record import Record
from isolator.audit.schema import (
    ApiCalled,
    FsDenied,
    NetConnect,
    NetDenied,
    NetQuery,
    PluginCrashed,
    PluginHealth,
    PluginStopped,
    Resources,
    SyscallDenied,
)
from isolator.policy.destinations import normal_name
from isolator.policy.keys import BY_NAME
from isolator.policy.meet.advice import Advice, advise, raise_limit
from isolator.policy.model import EffectivePolicy, EgressRule
from isolator.policy.names import parse_egress

REFUSALS = (NetDenied.TYPE, NetQuery.TYPE, SyscallDenied.TYPE, FsDenied.TYPE, ApiCalled.TYPE)
TROUBLES = (
    NetQuery.TYPE, NetConnect.TYPE, PluginCrashed.TYPE, PluginStopped.TYPE, PluginHealth.TYPE, Resources.TYPE,
)  # fmt: skip
"""Types of records that tell of failures, and of limits that were reached."""
TYPES = (*REFUSALS, *TROUBLES)
_DIFFERS = frozenset({"count", "flow", "detail", "asked", "latency_us", "protocol", "event_ids", "cut"})
_BREACH = "protocol: "
"""Begin of the detail of a record about a message that breaks the protocol."""
_ENDED = "it broke the protocol, so the daemon ended the connection; see docs/host-api.md (docs/mcp.md)"
_FULL = 64
"""A file system counts as full when less than this part of it is free: a file of some size does not fit any more."""
_RAN_INTO = {
    "memory": "killed for its memory",
    "tasks": "no further process or thread",
    "state": "/state is full",
    "state_inodes": "/state holds no further file",
    "tmp": "/tmp is full",
    "tmp_inodes": "/tmp holds no further file",
}


@dataclass
class Denial:
    """One row, however often it happened; ``count`` sums up the counts of its records.

    ``kind``: ``refusal``, ``failure``, or ``limit`` (whose name is in ``data``).
    """

    kind: str
    type: str
    data: Mapping[str, Any]
    advice: Advice
    count: int = 0
    first: str = ""
    last: str = ""
    events: set[str] = field(default_factory=set)

    def to_json(self) -> dict[str, Any]:
        """The row of ``--json``."""
        advice = self.advice
        grant = {"file": advice.file, "table": advice.table, "line": advice.line} if advice.line else None
        return {
            "kind": self.kind, "type": self.type, "data": dict(self.data), "count": self.count, "first": self.first,
            "last": self.last, "events": sorted(self.events), "why": advice.why, "grant": grant,
        }  # fmt: skip


def collect(
    records: Iterable[Record], entry: Mapping[str, Any], lines: Iterable[Mapping[str, Any]] = ()
) -> list[Denial]:
    """List each denial once, the latest last.

    ``entry`` is the plugin as ``plugin.show`` gives it, ``lines`` those of ``plugin.explain``.
    """
    effective = entry.get("effective")
    policy = EffectivePolicy.model_validate(effective) if effective else EffectivePolicy(plugin=str(entry["name"]))
    manifest = entry.get("manifest") or {}
    requested, permissions = _requested(manifest), manifest.get("permissions") or []
    explained = {line["field"]: line for line in lines}

    def advice(kind: str, type: str, data: Mapping[str, Any]) -> Advice:
        if kind == "failure":
            return Advice(_ENDED if type == PluginHealth.TYPE else failure(type, data) or "")
        if kind == "limit":
            name = str(data["limit"])
            return raise_limit(name, policy, _number(manifest, name), explained.get(name))
        return advise(type, data, policy, requested, permissions)

    found: dict[tuple[Any, ...], Denial] = {}
    for record in records:
        for kind, data, count in _rows(record, policy):
            key = (kind, record.type if kind != "limit" else "", *sorted((name, str(v)) for name, v in data.items()))
            denial = found.pop(key, None)
            if denial is None:
                denial = Denial(kind, record.type, data, advice(kind, record.type, data), first=record.time)
            found[key] = denial
            denial.count += count
            denial.last = record.time
            denial.events.update(record.events)
    return list(found.values())


def lines(denials: Iterable[Denial], name: str) -> Iterator[str]:
    """Denials for people: count and attempt, then the line that would grant it."""
    for denial in denials:
        events = f", during {', '.join(sorted(denial.events)[:3])}" if denial.events else ""
        yield f"{denial.count:>6} ×  {attempt(denial)}  (last {denial.last[:19]}Z{events})"
        advice = denial.advice
        yield f"          {safe(advice.why)}"
        if advice.line is not None:
            where = f"policies/{name}.toml" if advice.file == "policy" else advice.file
            yield f"          to allow it, in [{advice.table}] of {where}:  {safe(advice.line)}"


def _rows(record: Record, policy: EffectivePolicy) -> Iterator[tuple[str, dict[str, Any], int]]:
    """Kind, data and count of everything in a record that is worth a row."""
    data, type = record.data, record.type
    if type in (PluginCrashed.TYPE, PluginStopped.TYPE):
        for name, field_ in (("memory", "oom_kills"), ("tasks", "task_denials")):
            count = data.get(field_)
            if isinstance(count, int) and count > 0:
                yield "limit", {"limit": name}, count
        return
    if type == Resources.TYPE:
        files = policy.filesystem
        most = min(files.state_inodes, files.state // 4096)
        sizes = (
            ("state", "state_free", files.state), ("state_inodes", "state_files_free", most),
            ("tmp", "tmp_free", files.tmp), ("tmp_inodes", "tmp_files_free", files.tmp_inodes),
        )  # fmt: skip
        for name, field_, size in sizes:
            free = data.get(field_)
            if isinstance(free, int) and free < size // _FULL:
                yield "limit", {"limit": name}, 1
        return
    if type == PluginHealth.TYPE:
        detail = str(data.get("detail"))
        if detail.startswith(_BREACH):
            yield "failure", {"detail": detail}, 1
        return
    failed = failure(type, data) is not None
    if not failed and not refused(record):
        return
    kept = {key: value for key, value in data.items() if key not in _DIFFERS}
    if type == NetQuery.TYPE:
        kept.pop("type", None)  # a program asks for A and AAAA; it was refused one name
    count = data.get("count", 1)
    yield "failure" if failed else "refusal", kept, count if isinstance(count, int) else 1


def refused(record: Record) -> bool:
    """Whether a record of one of ``TYPES`` tells of something that was refused."""
    verdict = record.data.get("verdict")
    if record.type == ApiCalled.TYPE:
        return verdict != "granted"
    return record.type in REFUSALS and (record.type != NetQuery.TYPE or verdict in {"denied", "withheld"})


def attempt(denial: Denial) -> str:
    """The thing that did not happen, in a few words."""
    data = denial.data
    if denial.kind == "limit":
        return _RAN_INTO[data["limit"]]
    if denial.type == PluginHealth.TYPE:
        return safe(data["detail"])
    failed = "failed, " if denial.kind == "failure" else ""
    if denial.type == NetQuery.TYPE:
        return f"lookup of {safe(data.get('name'))}: {failed}{safe(data.get('rule'))}"
    if denial.type in (NetDenied.TYPE, NetConnect.TYPE):
        place = safe(data.get("name") or data.get("address") or "several destinations")
        port = f" port {data['port']}" if data.get("port") else ""
        way = "connection from" if data.get("direction") == "in" else "connection to"
        return f"{way} {place}{port}: {failed}{safe(data.get('error') or data.get('rule'))}"
    if denial.type == SyscallDenied.TYPE:
        return f"system call {safe(data.get('call'))}"
    if denial.type == FsDenied.TYPE:
        return f"file {safe(data.get('path'))}: {safe(data.get('why'))}"
    return f"host API {safe(data.get('method'))}: {safe(data.get('verdict'))}"


def _number(manifest: Mapping[str, Any], name: str) -> Any:
    """The number that a manifest asks for, as it stands there; None where it asks for none."""
    found: Any = manifest
    for key in BY_NAME[name].manifest.split("."):
        found = found.get(key) if isinstance(found, Mapping) else None
    return found


def _requested(manifest: Mapping[str, Any]) -> list[str] | None:
    """The ``NAME:PORT`` rules that a manifest lists, or None when it lists none."""
    try:
        egress = manifest["sandbox"]["network"]["egress"]
        if egress == "public":
            return None
        rules = [
            parse_egress(rule)
            if isinstance(rule, str)
            else EgressRule(host=rule["host"], ports=rule.get("ports", [443]))
            for rule in egress
        ]
        return [f"{normal_name(rule.host) or rule.host}:{port}" for rule in rules for port in rule.ports]
    except (KeyError, TypeError, AttributeError, ValueError):
        return None
