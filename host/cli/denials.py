"""Denials of a plugin, each once: how often, when last, and the line that would grant it or why none can.

They are read from the audit trail, so runs that have ended count too. Denials that are alike (in everything but times,
counts and the connection's own number) are one row.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import click

from host.cli.output import safe
from isolator.audit.record import Record
from isolator.audit.schema import ApiCalled, FsDenied, NetDenied, NetQuery, SyscallDenied
from isolator.policy.destinations import normal_name
from isolator.policy.meet.advice import Advice, advise
from isolator.policy.model import EffectivePolicy, EgressRule
from isolator.policy.names import parse_egress

TYPES = (NetDenied.TYPE, NetQuery.TYPE, SyscallDenied.TYPE, FsDenied.TYPE, ApiCalled.TYPE)
_DIFFERS = frozenset({"count", "flow", "detail", "asked", "latency_us", "protocol", "event_ids", "cut"})


@dataclass
class Denial:
    """One denial, however often it happened; ``count`` sums up the counts of its records."""

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
            "type": self.type, "data": dict(self.data), "count": self.count, "first": self.first, "last": self.last,
            "events": sorted(self.events), "why": advice.why, "grant": grant,
        }  # fmt: skip


def collect(records: Iterable[Record], entry: Mapping[str, Any]) -> list[Denial]:
    """List each denial once, the latest last. ``entry`` is the plugin as ``plugin.show`` gives it."""
    effective = entry.get("effective")
    policy = EffectivePolicy.model_validate(effective) if effective else EffectivePolicy(plugin=str(entry["name"]))
    manifest = entry.get("manifest") or {}
    requested, permissions = _requested(manifest), manifest.get("permissions") or []
    found: dict[tuple[Any, ...], Denial] = {}
    for record in records:
        if not refused(record):
            continue
        data = {key: value for key, value in record.data.items() if key not in _DIFFERS}
        if record.type == NetQuery.TYPE:
            data.pop("type", None)  # a program asks for A and AAAA; it was refused one name
        key = (record.type, *sorted((name, str(value)) for name, value in data.items()))
        denial = found.pop(key, None) or Denial(
            record.type, data, advise(record.type, data, policy, requested, permissions), first=record.time
        )
        found[key] = denial
        count = record.data.get("count", 1)
        denial.count += count if isinstance(count, int) else 1
        denial.last = record.time
        denial.events.update(record.events)
    return list(found.values())


def show(denials: Iterable[Denial], name: str) -> None:
    """Print denials for people: count and attempt, then the line that would grant it."""
    for denial in denials:
        events = f", during {', '.join(sorted(denial.events)[:3])}" if denial.events else ""
        click.echo(f"{denial.count:>6} ×  {attempt(denial)}  (last {denial.last[:19]}Z{events})")
        advice = denial.advice
        click.echo(f"          {safe(advice.why)}")
        if advice.line is not None:
            where = f"policies/{name}.toml" if advice.file == "policy" else advice.file
            click.echo(f"          to allow it, in [{advice.table}] of {where}:  {safe(advice.line)}")


def refused(record: Record) -> bool:
    """Whether a record of one of ``TYPES`` tells of something that was refused."""
    verdict = record.data.get("verdict")
    if record.type == ApiCalled.TYPE:
        return verdict != "granted"
    return record.type != NetQuery.TYPE or verdict in {"denied", "withheld"}


def attempt(denial: Denial) -> str:
    """The attempt in a few words, printable."""
    data = denial.data
    if denial.type == NetQuery.TYPE:
        return f"lookup of {safe(data.get('name'))}: {safe(data.get('rule'))}"
    if denial.type == NetDenied.TYPE:
        place = safe(data.get("name") or data.get("address") or "several destinations")
        port = f" port {data['port']}" if data.get("port") else ""
        way = "connection from" if data.get("direction") == "in" else "connection to"
        return f"{way} {place}{port}: {safe(data.get('rule'))}"
    if denial.type == SyscallDenied.TYPE:
        return f"system call {safe(data.get('call'))}"
    if denial.type == FsDenied.TYPE:
        return f"file {safe(data.get('path'))}: {safe(data.get('why'))}"
    return f"host API {safe(data.get('method'))}: {safe(data.get('verdict'))}"


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
