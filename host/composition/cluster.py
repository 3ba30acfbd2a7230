"""Part of this host in a cluster, loaded only where it has one: with ``[cluster]`` in host.toml, or until it has left.

A host whose ``[cluster]`` was removed before it has left is one that is cut off: what others may hold does not run here
beside them, events wait, and ``cluster leave`` is the way out.
"""

from __future__ import annotations

import functools
import sqlite3
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from host.database.store import Store
from host.events import Catalogue
from host.fence.fences import Fences
from host.plugins.registry import Registry
from host.queue.sqlite import SqliteQueue
from isolator.audit.client import AuditClient
from isolator.policy.cluster import Cluster

if TYPE_CHECKING:
    from host.membership.member import Member


def cluster_of(settings: Cluster | None, store: Store) -> Cluster | None:
    """``[cluster]``; without it, a host that follows a log and has not left it keeps its name and reaches no server."""
    name = store.read(_member) if settings is None else None
    return settings if name is None else Cluster(name=name, servers=())


def queue_class(cluster: Cluster | None) -> Callable[..., SqliteQueue]:
    """The class of this host's queue."""
    if cluster is None:
        return SqliteQueue
    from host.cluster.delivery.queue import ClusterQueue

    return functools.partial(ClusterQueue, host=cluster.name)


def accepted_here(db: sqlite3.Connection) -> str:
    """Condition of events ``e`` that were not accepted by another host of a cluster, which this one may have left."""
    if not db.execute("SELECT 1 FROM sqlite_master WHERE name='cluster_self'").fetchone():
        return ""
    other = "SELECT 1 FROM cluster_events c, cluster_self s WHERE c.seq=e.seq AND c.plugin IS NULL AND c.host<>s.host"
    return f" AND NOT EXISTS ({other})"


def new_member(
    cluster: Cluster | None,
    store: Store,
    queue: SqliteQueue,
    registry: Registry,
    catalogue: Catalogue,
    fences: Fences,
    audit: AuditClient,
    folder: Path,
) -> Member | None:
    """This host as a member, which has not begun; ``folder`` is for copies of the fold."""
    if cluster is None:
        return None
    from host.cluster.delivery.queue import ClusterQueue
    from host.membership.member import Member

    assert isinstance(queue, ClusterQueue)
    return Member(cluster, store, queue, registry, catalogue, fences, audit, folder)


def _member(db: sqlite3.Connection) -> str | None:
    if not db.execute("SELECT 1 FROM sqlite_master WHERE name='cluster_self'").fetchone():
        return None
    row = db.execute("SELECT host FROM cluster_self WHERE log<>''").fetchone()
    return str(row[0]) if row is not None else None
