"""Verbs of the cluster. They are served always, and refuse where there is no ``[cluster]``: nothing else is loaded."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, cast

from host.control import cluster_types
from host.control.endpoints import Caller, Verbs, serves
from host.plugins.registry import Registry
from isolator.errors import UnavailableError, UsageError

if TYPE_CHECKING:
    from host.cluster.node import Node


class ClusterVerbs(Verbs):
    """The cluster. ``node``: this host's, where there is one; ``problems``: why there is none although it is wanted."""

    def __init__(
        self, node: Callable[[], Node | None], registry: Registry, problems: Callable[[], Iterable[str]] = tuple
    ) -> None:
        self._node, self._registry, self._problems = node, registry, problems

    def _here(self) -> Node:
        node = self._node()
        if node is None and (problem := next(iter(self._problems()), None)) is not None:
            raise UnavailableError("cluster", problem)
        if node is None:
            why = "this host has no [cluster] in host.toml"
            raise UsageError("cluster", why, "docs/cluster.md says how to set it up")
        return node

    @serves(cluster_types.ClusterStatus)
    async def status(self, _: cluster_types.ClusterStatus, __: Caller) -> cluster_types.ClusterStanding:
        node = self._here()
        from host.cluster.standing import standing
        from isolator.linux.boottime import boottime

        return cast(cluster_types.ClusterStanding, standing(node, boottime()))

    @serves(cluster_types.ClusterPlace)
    async def place(self, request: cluster_types.ClusterPlace, _: Caller) -> cluster_types.PlacedPlugin:
        node = self._here()
        from host.cluster.placing import place
        from host.cluster.unheld import why_unheld

        plugin = self._registry.get(request.name)
        placed = await place(
            node, request.name, placement=request.placement, shards=request.shards or None, labels=request.labels,
            anew=request.anew, here=plugin.digest if plugin is not None else None,
            hooks=plugin.wanted if plugin is not None else (),
        )  # fmt: skip
        return {
            "name": placed.name,
            "placement": placed.placement,
            "shards": placed.shards,
            "labels": list(placed.labels),
            "problem": why_unheld(node.state, placed.name, node.alive()) if placed.labels else None,
        }

    @serves(cluster_types.ClusterLeave)
    async def leave(self, request: cluster_types.ClusterLeave, _: Caller) -> cluster_types.ClusterLeft:
        node = self._here()
        from host.cluster.log import LogUnavailableError

        try:
            return {"left_behind": await node.leave(force=request.force)}
        except LogUnavailableError as error:
            why = f"this host has not left its cluster: {error}"
            remedy = "see 'isolator cluster status'; --force leaves without the log"
            raise UnavailableError("cluster", why, remedy) from None
