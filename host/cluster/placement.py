"""Which host takes which shard: rendezvous hashing, so that a host that comes or goes moves no shard of the others."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable

from host.cluster.fold import Shard


def pick(shard: Shard, hosts: Iterable[str]) -> str | None:
    """The host among these whose hash with the shard is the highest; None if there is none."""
    return max(hosts, key=lambda host: _weight(shard, host), default=None)


def shard_of(key: str, shards: int) -> int:
    """The shard of an order key, the same on every host and version."""
    return int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "big") % shards


def _weight(shard: Shard, host: str) -> bytes:
    return hashlib.sha256(f"{host}\n{shard[0]}\n{shard[1]}".encode()).digest()
