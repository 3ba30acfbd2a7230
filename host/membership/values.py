"""Values of plugins in a cluster (``kv.*``): kept by the log, so that they are where the plugin is.

A value is answered for when it was read back; one that a holder of before writes late is void. A plugin of which every
host has its own copy keeps its values here alone.
"""

from __future__ import annotations

import json
import sqlite3
import time
from collections.abc import Awaitable, Callable, Mapping
from typing import Any

from host.channel.reply import QUOTA_EXCEEDED, RETRY_LATER
from host.cluster.delivery.follower import QueueFollower
from host.cluster.entries import KeyValue as Entry
from host.cluster.fold import Applied
from host.cluster.log import LogUnavailableError
from host.cluster.store import value_of
from host.database.store import Store
from host.host_api.methods import KV_KEYS, KV_TOTAL, KV_VALUE, ApiError, Context, KeyValue, key_of, ttl_of
from host.wire.strict_json import dumps


class ClusterKeyValue(KeyValue):
    """See ``host.host_api.methods.KeyValue``; ``decide`` has the log decide something."""

    def __init__(self, store: Store, follower: QueueFollower, decide: Callable[[Entry], Awaitable[Applied]]) -> None:
        super().__init__(store)
        self._follower, self._decide = follower, decide

    async def get(self, context: Context, params: Mapping[str, Any]) -> dict[str, Any]:
        if self._follower.epoch(context.plugin.name) is None:
            return await super().get(context, params)
        plugin, key = context.plugin.name, key_of(params)
        found = _read(self._store.read(lambda db: value_of(db, plugin, key)))
        return {"value": found[0] if found is not None else None, "found": found is not None}

    async def set(self, context: Context, params: Mapping[str, Any]) -> dict[str, Any]:
        if self._follower.epoch(context.plugin.name) is None:
            return await super().set(context, params)
        plugin, key, ttl = context.plugin.name, key_of(params), ttl_of(params)
        if "value" not in params:
            raise ApiError(-32602, "value is missing")
        if len(dumps(params["value"]).encode()) > KV_VALUE:
            raise ApiError(QUOTA_EXCEEDED, f"a value may have {KV_VALUE} bytes")
        text = dumps([params["value"], time.time() + ttl if ttl is not None else None])
        count, size = self._store.read(lambda db: _used(db, plugin, key))
        if count >= KV_KEYS:
            raise ApiError(QUOTA_EXCEEDED, f"at most {KV_KEYS} keys")
        if size + len(text.encode()) + len(key.encode()) > KV_TOTAL:
            raise ApiError(QUOTA_EXCEEDED, f"at most {KV_TOTAL} bytes in all")
        await self._write(plugin, key, text)
        return {}

    async def delete(self, context: Context, params: Mapping[str, Any]) -> dict[str, Any]:
        if self._follower.epoch(context.plugin.name) is None:
            return await super().delete(context, params)
        plugin, key = context.plugin.name, key_of(params)
        found = self._store.read(lambda db: value_of(db, plugin, key))
        if found is not None:
            await self._write(plugin, key, None)
        return {"deleted": found is not None}

    async def list(self, context: Context, params: Mapping[str, Any]) -> dict[str, Any]:
        if self._follower.epoch(context.plugin.name) is None:
            return await super().list(context, params)
        plugin, prefix = context.plugin.name, params.get("prefix", "")
        if not isinstance(prefix, str):
            raise ApiError(-32602, "prefix must be text")
        query = "SELECT key, value FROM cluster_values WHERE plugin=? AND substr(key, 1, ?)=? ORDER BY key"
        rows = self._store.rows(query, (plugin, len(prefix), prefix))
        return {"keys": [key for key, text in rows if _read(text) is not None]}

    async def _write(self, plugin: str, key: str, text: str | None) -> None:
        held = self._follower.epoch(plugin)
        try:
            if held is None:
                raise LogUnavailableError("another host has the plugin now")
            applied = await self._decide(Entry(plugin, *held, key, text))
        except LogUnavailableError as error:
            raise ApiError(RETRY_LATER, f"whether the value is kept is unknown: {error}") from None
        if applied.void:
            raise ApiError(RETRY_LATER, "the value is not kept: another host has the plugin now")


def _read(text: str | None) -> tuple[Any] | None:
    """The value of a row; None if there is none, or its time is over."""
    if text is None:
        return None
    try:
        value, expires = json.loads(text)
    except (ValueError, TypeError):
        return None
    return (value,) if expires is None or expires > time.time() else None


def _used(db: sqlite3.Connection, plugin: str, key: str) -> tuple[int, int]:
    """How many other keys a plugin has, and their bytes, but for those whose time is over."""
    rows = db.execute("SELECT key, value FROM cluster_values WHERE plugin=? AND key<>?", (plugin, key)).fetchall()
    kept = [len(one.encode()) + len(text.encode()) for one, text in rows if _read(text) is not None]
    return len(kept), sum(kept)
