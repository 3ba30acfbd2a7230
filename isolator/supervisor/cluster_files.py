"""Files that ``[cluster]`` of host.toml names: credentials, which root alone reads, and an authority's certificates."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

from isolator.errors import IsolatorError
from isolator.policy.authority import context_of
from isolator.policy.cluster import Cluster, stranger_in
from isolator.supervisor.secret_file import secrets_of


def credentials_of(cluster: Cluster) -> str:
    """``USER:PASSWORD`` of a host, empty where its servers ask for none; raises IsolatorError if there should be."""
    if not cluster.credentials:
        return ""
    remedy = f"put {cluster.name}.secret of 'isolator cluster users' there, one line: USER:PASSWORD"
    found = secrets_of(Path(cluster.credentials), remedy, remedy)
    if len(found) != 1 or ":" not in found[0]:
        raise IsolatorError(cluster.credentials, "is not one line, USER:PASSWORD", remedy)
    return found[0]


def check(cluster: Cluster, uid: int, gid: int) -> None:
    """Raise IsolatorError for files that the host process, which is that user, can do nothing with."""
    secret = credentials_of(cluster)
    if stranger := stranger_in(secret, cluster.name):
        raise IsolatorError(cluster.credentials, *stranger)
    if cluster.tls and cluster.ca:
        with _as_user(uid, gid):
            context_of(cluster.ca)


@contextlib.contextmanager
def _as_user(uid: int, gid: int) -> Iterator[None]:
    """Open files as a user does. For a process that does nothing else meanwhile."""
    groups = os.getgroups()
    os.setgroups([])
    os.setegid(gid)
    os.seteuid(uid)
    try:
        yield
    finally:
        os.seteuid(0)
        os.setegid(0)
        os.setgroups(groups)
