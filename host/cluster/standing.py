"""The picture of ``isolator cluster status``: this host, the log and the other hosts, as this host knows them."""

from __future__ import annotations

from typing import Any

from host.cluster.fold import State
from host.cluster.node import Node

_OF_THE_LOG = ("first", "last", "created", "replicas", "bytes", "max_bytes")


def standing(node: Node, now: float) -> dict[str, Any]:
    """The answer to ``cluster.status``; ``now`` is a time of the node's clock."""
    state, facts = node.state, node.facts
    events, waiting = node.waiting()
    return {
        "host": node.host,
        "member": node.is_member,
        "seconds_left": round(max(0.0, node.deadline - now), 1),
        "place": node.place,
        "log": {**{key: getattr(facts, key) for key in _OF_THE_LOG}, "servers": list(facts.servers)}
        if facts is not None
        else None,
        "outbox": {"events": events, "bytes": waiting, "max_bytes": node.settings.outbox},
        "problems": [{"kind": kind, "line": line} for kind, line in node.problems.lines.items()],
        "hosts": [_host(node, name) for name in sorted(state.members) if _is_listed(state, name)],
        "plugins": [plugin(node, name) for name in sorted(state.plugins)],
    }


def _is_listed(state: State, name: str) -> bool:
    """A host that has left is listed no more, until it writes again or while it still holds something."""
    left = state.members[name].beat.parting == "left"
    return not left or any(lease.holder == name for lease in state.leases.values())


def _host(node: Node, name: str) -> dict[str, Any]:
    member = node.state.members[name]
    beat = member.beat
    return {
        "name": name,
        "here": name == node.host,
        "alive": node.is_member if name == node.host else not (beat.parting or node.is_silent(name)),
        "stopped": beat.parting == "stopped",
        "labels": list(beat.labels),
        "version": beat.version,
        "place": beat.place,
        "clock_ahead": None if name == node.host else round(node.clocks[name], 1) if name in node.clocks else None,
        "holds": sorted({shard[0] for shard, lease in node.state.leases.items() if lease.holder == name}),
        "ready": sorted(beat.ready),
    }


def plugin(node: Node, name: str) -> dict[str, Any]:
    """One plugin of the cluster; raises KeyError."""
    known = node.state.plugins[name].plugin
    shards = range(known.shards if known.placement == "one" else 0)
    leases = [(number, node.state.leases.get((name, number))) for number in shards]
    return {
        "name": name,
        "digest": known.digest,
        "placement": known.placement,
        "labels": list(known.labels),
        "problem": node.unheld.get(name),
        "shards": [
            {"shard": number, "host": lease.holder if lease else None, "epoch": lease.epoch if lease else None}
            for number, lease in leases
        ],
    }
