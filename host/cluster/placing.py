"""Placement of a plugin of the cluster: an operator's decision, which all hosts read."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Literal

from host.cluster.entries import Plugin
from host.cluster.log import LogUnavailableError
from host.cluster.node import Node
from isolator.errors import UnavailableError, UsageError, translated
from isolator.policy.cluster import parse_label

Placement = Literal["one", "all"]


async def place(
    node: Node,
    name: str,
    *,
    placement: Placement | None = None,
    shards: int | None = None,
    labels: Sequence[str] | None = None,
    anew: bool = False,
    here: str | None = None,
    hooks: Sequence[str] = (),
) -> Plugin:
    """Change where a plugin runs; None leaves a setting as it is. Returns the plugin as the log has it then.

    ``here`` is the digest of the plugin that this host has, and ``hooks`` what it wants: the cluster gets it if it does
    not know the plugin.
    Another ``placement``, or number of ``shards``, takes ``anew``: the plugin begins anew, and what waits for it is
    dropped; so it does with ``anew`` alone. Raises UsageError, and UnavailableError if the log does not take it.
    """
    known = node.state.plugins.get(name)
    if known is None and here is None:
        raise UsageError(f"plugin {name}", "is none of the cluster", "isolator plugin add it on a host of the cluster")
    before = known.plugin if known is not None else Plugin(name, here or "", hooks=tuple(hooks))
    with translated(ValueError, UsageError, "labels"):
        found = before.labels if labels is None else tuple(sorted({parse_label(label) for label in labels}))
    parts = before.shards if shards is None else shards
    wanted = replace(before, placement=placement or before.placement, shards=parts, labels=found)
    if wanted.placement == "all" and wanted.shards > 1:
        why = "has no shards where every host has its own copy"
        raise UsageError(f"plugin {name}", why, "leave --shards out, or 1")
    changes = (wanted.placement, wanted.shards) != (before.placement, before.shards)
    alone = anew and placement is None and shards is None and labels is None
    begins = known is not None and (changes or alone)
    if begins and not anew:
        why = "placement and shards change only as it begins anew, without the events that wait for it"
        raise UsageError(f"plugin {name}", why, "--anew, if nothing waits or that is meant")
    try:
        if begins:
            await node.decide(replace(before, removed=True))
        void = (await node.decide(wanted)).void
    except LogUnavailableError as error:
        why = f"may not be changed: {error}"
        raise UnavailableError(f"plugin {name}", why, "see 'isolator cluster status', then place it again") from None
    if void:
        raise UnavailableError(f"plugin {name}", f"is not changed: {void}", "place it again")
    return wanted
