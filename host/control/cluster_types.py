"""Types of the verbs of a cluster."""

from __future__ import annotations

from typing import Annotated, Literal, TypedDict

from host.control.parameters import Flag, ListOf, OneOf, Request, Whole
from host.control.terms import Name


class ClusterLog(TypedDict):
    """The log, as its servers described it last; sizes in bytes."""

    first: int
    last: int
    created: str
    replicas: int
    servers: list[str]
    bytes: int
    max_bytes: int


class ClusterOutbox(TypedDict):
    """Events of this host that wait for the log."""

    events: int
    bytes: int
    max_bytes: int


class ClusterProblem(TypedDict):
    kind: str
    line: str


class ClusterHost(TypedDict):
    """A host by its newest beat; ``clock_ahead`` in seconds, by this host's wall clock.

    ``stopped``: its daemon was ended in order, and has given its plugins to others.
    """

    name: str
    here: bool
    alive: bool
    stopped: bool
    labels: list[str]
    version: str
    place: int
    clock_ahead: float | None
    holds: list[str]
    ready: list[str]


class ClusterShard(TypedDict):
    shard: int
    host: str | None
    epoch: int | None


class ClusterPlugin(TypedDict):
    """A plugin of the cluster; no shards where every host has its own copy.

    ``problem``: why nobody can hold it, and what to do.
    """

    name: str
    digest: str
    placement: str
    labels: list[str]
    problem: str | None
    shards: list[ClusterShard]


class ClusterStanding(TypedDict):
    """This host in its cluster; ``seconds_left`` is how long it may act on what it has read."""

    host: str
    member: bool
    seconds_left: float
    place: int
    log: ClusterLog | None
    outbox: ClusterOutbox
    problems: list[ClusterProblem]
    hosts: list[ClusterHost]
    plugins: list[ClusterPlugin]


class ClusterLeft(TypedDict):
    left_behind: int


class ClusterStatus(Request, verb="cluster.status", role="viewer", result=ClusterStanding):
    """Show this host's part in its cluster, the log, the other hosts, and who holds which plugin."""


class PlacedPlugin(TypedDict):
    """``problem``: why nobody can hold it with these labels, and what to do."""

    name: str
    placement: str
    shards: int
    labels: list[str]
    problem: str | None


class ClusterPlace(Request, verb="cluster.place", role="operator", recorded=True, result=PlacedPlugin):
    """Say where a plugin runs: on one host or on all, on hosts with these labels, its events in so many shards.

    ``placement`` is ``one`` or ``all``; what is left out stays. Another placement, or number of shards, takes ``anew``:
    events that wait for the plugin are dropped, as they are with ``anew`` alone.
    """

    name: Name
    placement: Annotated[Literal["one", "all"] | None, OneOf(("one", "all"))] = None
    shards: Annotated[int, Whole(64)] = 0
    labels: Annotated[list[str] | None, ListOf(str)] = None
    anew: Annotated[bool, Flag()] = False


class ClusterLeave(Request, verb="cluster.leave", role="operator", recorded=True, result=ClusterLeft):
    """Give up every plugin of the cluster, send what waits, and forget the cluster.

    With ``force`` also where the log is out of reach: events that wait stay in the outbox, ``left_behind`` of them.
    """

    force: Annotated[bool, Flag()] = False
