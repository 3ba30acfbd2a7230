"""Methods of the host API that Isolator brings, and the terms that any method is written in."""

from __future__ import annotations

import json
import sqlite3
import time
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import Any

from host.channel.reply import QUOTA_EXCEEDED, UNSUPPORTED_PROTOCOL
from host.channel.stream import PROTOCOLS
from host.database.store import Store
from host.plugins.registry import Plugin
from host.wire.strict_json import dumps

KV_KEYS, KV_KEY, KV_VALUE, KV_TOTAL = 1024, 256, 64 * 1024, 1 << 20


class ApiError(Exception):
    """Error answer: JSON-RPC code, text, data."""

    def __init__(self, code: int, message: str, **data: Any) -> None:
        super().__init__(message)
        self.code, self.data = code, data


@dataclass(frozen=True)
class Context:
    """Caller of a method."""

    plugin: Plugin
    run: str | None


Handler = Callable[[Context, Mapping[str, Any]], Awaitable[Any]]


@dataclass(frozen=True)
class ApiMethod:
    """Method and the permission it needs; None needs none."""

    permission: str | None
    handler: Handler


class KeyValue:
    """Small private store per plugin: 1024 keys, 64 KiB a value, 1 MiB in all; a value may expire."""

    def __init__(self, store: Store) -> None:
        self._store = store

    async def get(self, context: Context, params: Mapping[str, Any]) -> dict[str, Any]:
        """Serve ``{key}`` → ``{value, found}``; the value is null when there is none."""
        where = (context.plugin.name, key_of(params))
        row = self._store.row("SELECT value, expires FROM kv WHERE plugin=? AND key=?", where)
        found = row is not None and (not isinstance(row[1], int | float) or row[1] > time.time())
        try:
            return {"value": json.loads(row[0]) if found else None, "found": found}
        except (ValueError, TypeError, RecursionError):
            raise ApiError(-32603, "the stored value is damaged; set it again") from None

    async def set(self, context: Context, params: Mapping[str, Any]) -> dict[str, Any]:
        """Serve ``{key, value, ttl?}`` → ``{}``; ``ttl`` in seconds. The answer means that the value is on disk."""
        name, key = context.plugin.name, key_of(params)
        if "value" not in params:
            raise ApiError(-32602, "value is missing")
        text = dumps(params["value"])
        if len(text.encode()) > KV_VALUE:
            raise ApiError(QUOTA_EXCEEDED, f"a value may have {KV_VALUE} bytes")
        ttl, now = ttl_of(params), time.time()
        expires = now + ttl if ttl is not None else None

        def write(db: sqlite3.Connection) -> str | None:
            db.execute("DELETE FROM kv WHERE plugin=? AND expires <= ?", (name, now))
            count, size = db.execute(
                "SELECT count(*), coalesce(sum(length(CAST(value AS BLOB)) + length(CAST(key AS BLOB))), 0)"
                " FROM kv WHERE plugin=? AND key<>?",
                (name, key),
            ).fetchone()
            if count >= KV_KEYS:
                return f"at most {KV_KEYS} keys"
            if size + len(text.encode()) + len(key.encode()) > KV_TOTAL:
                return f"at most {KV_TOTAL} bytes in all"
            db.execute("INSERT OR REPLACE INTO kv VALUES (?,?,?,?)", (name, key, text, expires))
            return None

        refused = await self._store.run(write)
        if refused is not None:
            raise ApiError(QUOTA_EXCEEDED, refused)
        return {}

    async def delete(self, context: Context, params: Mapping[str, Any]) -> dict[str, Any]:
        """Serve ``{key}`` → ``{deleted}``."""
        where = (context.plugin.name, key_of(params))
        count = await self._store.run(lambda db: db.execute("DELETE FROM kv WHERE plugin=? AND key=?", where).rowcount)
        return {"deleted": bool(count)}

    async def list(self, context: Context, params: Mapping[str, Any]) -> dict[str, Any]:
        """Serve ``{prefix?}`` → ``{keys}``, in order."""
        prefix = params.get("prefix", "")
        if not isinstance(prefix, str):
            raise ApiError(-32602, "prefix must be text")
        query = (
            "SELECT key FROM kv WHERE plugin=? AND substr(key, 1, ?)=? AND (expires IS NULL OR expires>?) ORDER BY key"
        )
        rows = self._store.rows(query, (context.plugin.name, len(prefix), prefix, time.time()))
        return {"keys": [key for (key,) in rows]}


async def hello(context: Context, params: Mapping[str, Any]) -> dict[str, Any]:
    wanted = str(params.get("api_version", "1"))
    if wanted.partition(".")[0] not in PROTOCOLS:
        raise ApiError(UNSUPPORTED_PROTOCOL, f"api_version {wanted[:20]} is not spoken", supported=list(PROTOCOLS))
    name = params.get("name")
    if name is not None and name != context.plugin.name:
        raise ApiError(-32602, f"this socket belongs to {context.plugin.name}")
    return {"protocol": PROTOCOLS[-1], **await whoami(context, params)}


async def whoami(context: Context, _: Mapping[str, Any]) -> dict[str, Any]:
    plugin = context.plugin
    return {
        "name": plugin.name,
        "version": plugin.version,
        "run": context.run,
        "hooks": sorted(plugin.hooks.values()),
        "permissions": list(plugin.effective.permissions) if plugin.effective is not None else [],
    }


def ttl_of(params: Mapping[str, Any]) -> float | None:
    """The ``ttl`` of a call, in seconds; raises ApiError."""
    ttl = params.get("ttl")
    if ttl is not None and (isinstance(ttl, bool) or not isinstance(ttl, (int, float)) or not 0 < ttl < 1e9):
        raise ApiError(-32602, "ttl must be seconds")
    return ttl


def key_of(params: Mapping[str, Any]) -> str:
    """The ``key`` of a call; raises ApiError."""
    key = params.get("key")
    if not isinstance(key, str) or not 0 < len(key.encode()) <= KV_KEY:
        raise ApiError(-32602, f"key must be text of 1 to {KV_KEY} bytes")
    return key
