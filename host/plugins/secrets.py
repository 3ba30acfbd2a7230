"""Config and secrets: encrypted at rest, typed by the schema, injected as variables, kept out of every listing.

Each value is sealed with AES-256-GCM under a key that lies beside the database in a file of the host's user, mode
0600. The plugin's name and the key's name are authenticated with the value, so that a row moved to another plugin does
not open. ``rotate`` keeps old and new key in the file until every row is sealed with the new one, so that a crash at
any instant leaves all rows readable.

Values that come with an update belong to that version until it has proved itself: they are kept apart under its
digest, count while it is the version in use, and become the plugin's config when it is confirmed. When it fails or is
never approved, the config is as before, whoever was killed meanwhile.

Redaction is by value: wherever text of a plugin is stored or shown, each secret value (of at least four characters),
as it is, JSON-escaped, percent-encoded or base64-encoded, becomes ``[redacted]``. That protects from accidents; a
plugin that *wants* to print its own secret can always spell it differently.
"""

from __future__ import annotations

import asyncio
import base64
import json
import os
import re
import sqlite3
import time
import urllib.parse
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from host.database.store import Store
from host.plugins.keyfile import KeyFile
from host.plugins.manifest import (
    MAX_CONFIG,
    MAX_FILES,
    Manifest,
    check_values,
    environment_names,
)
from isolator.base.structs import struct_class
from isolator.errors import IsolatorError, NotFoundError, UsageError
from isolator.ipc.messages import Environment

FILES_AT = "/run/isolator/config"
"""Folder of values of type ``file`` in the cage: one 0400 file each, named by its key."""
REDACTED = "[redacted]"
Beside = Callable[[sqlite3.Connection], object]
"""Something to write in the transaction of a change, which may run again."""
_SHORTEST = 4
_A_LINE = 12
"""Characters from which a line of a longer value is looked for by itself."""


class Redactor:
    """Replaces every known secret value in a text."""

    def __init__(self, values: Iterable[str] = ()) -> None:
        forms: set[str] = set()
        for value in values:
            # A log has lines: a newline at a value's end, as an editor writes it, is never part of one.
            pieces = {value, value.strip(), *(line for line in value.strip().splitlines() if len(line) >= _A_LINE)}
            for piece in pieces:
                if len(piece) < _SHORTEST:
                    continue
                forms |= {piece, json.dumps(piece)[1:-1], json.dumps(piece, ensure_ascii=False)[1:-1]}
                forms |= {urllib.parse.quote(piece, safe=""), urllib.parse.quote(piece)}
                forms.add(base64.b64encode(piece.encode()).decode().rstrip("="))
        # Longest first: a value that contains another must not be left half shown.
        ordered = sorted((f for f in forms if len(f) >= _SHORTEST), key=len, reverse=True)
        self._pattern = re.compile("|".join(map(re.escape, ordered))) if ordered else None
        raw = sorted((f.encode("utf-8", "surrogatepass") for f in ordered), key=len, reverse=True)
        self._raw = re.compile(b"|".join(map(re.escape, raw))) if raw else None
        self.longest = len(raw[0]) if raw else 0
        """Bytes of the longest form of a value."""

    def __call__(self, text: str) -> str:
        return self._pattern.sub(REDACTED, text) if self._pattern is not None else text

    def cut(self, data: bytes, at: int) -> int:
        """Return the place of a cut of ``data`` near ``at``: not within a value, whose halves nobody would recognise.

        What follows ``at`` has to be there for ``longest`` bytes, or to the end of the text.
        """
        if self._raw is not None:
            for found in self._raw.finditer(data, max(0, at - self.longest), at + self.longest):
                if found.start() < at < found.end():
                    return found.start() or found.end()
        return at


@struct_class()
class _Value:
    """A value of a plugin's config."""

    text: str
    secret: bool
    type: str


class ConfigStore:
    """Config of every plugin, decrypted in memory and sealed on disk."""

    def __init__(self, store: Store, key_file: Path) -> None:
        self._store = store
        self._keys = KeyFile(key_file)
        self._values: dict[str, dict[str, _Value]] = {}
        self._next: dict[str, dict[str, dict[str, _Value]]] = {}
        """Per plugin and digest: the values of a version that is not confirmed."""
        self._redactors: dict[str, Redactor] = {}
        self._changing = asyncio.Lock()
        """Held while values or the key change: memory and disk change together, one change after the other."""
        self.broken: dict[str, IsolatorError] = {}
        """Plugins whose config cannot be read, with the reason; they are not started."""
        rows = store.rows(
            "SELECT plugin, NULL, key, secret, type, value FROM config"
            " UNION ALL SELECT plugin, digest, key, secret, type, value FROM config_next"
        )
        self._unusable: IsolatorError | None = None
        try:
            if not self._keys.load():
                if rows:
                    why = "is missing"
                    raise IsolatorError(str(key_file), why, "restore it from a backup, or set all config again")
                self._keys.save([os.urandom(32)])
        except IsolatorError as error:
            self._unusable = error
        self.problem = str(self._unusable) if self._unusable is not None else None
        """Why the key file is of no use, if so."""
        for plugin, digest, key, secret, kind, sealed in rows:
            if not isinstance(plugin, str):
                continue  # damaged: nobody knows whose it was
            try:
                if self._unusable is not None:
                    raise self._unusable
                if not isinstance(key, str) or not isinstance(kind, str) or not isinstance(sealed, bytes):
                    raise IsolatorError(f"config {key} of {plugin}", "is damaged", "set it again")
                text = self._keys.open(plugin, key, sealed)
                values = self._values if digest is None else self._next.setdefault(plugin, {})
                values.setdefault(plugin if digest is None else digest, {})[key] = _Value(text, bool(secret), kind)
            except IsolatorError as error:
                self.broken[plugin] = error

    def redactor(self, plugin: str) -> Redactor:
        """Return the redactor of a plugin's secret values."""
        redactor = self._redactors.get(plugin)
        if redactor is None:
            sets = [self._values.get(plugin, {}), *self._next.get(plugin, {}).values()]
            redactor = self._redactors[plugin] = Redactor(
                v.text for values in sets for v in values.values() if v.secret
            )
        return redactor

    def _given(
        self, plugin: str, manifest: Manifest, values: Mapping[str, str], beside: Mapping[str, _Value]
    ) -> dict[str, _Value]:
        """The values as they are kept, ``beside`` others; raises IsolatorError."""
        if self._unusable is not None:
            raise self._unusable
        checked = check_values(manifest, values)
        given = {key: _Value(text, spec.secret, spec.type) for key, (spec, text) in checked.items()}
        _check_size(plugin, {**beside, **given})
        return given

    def _rows(self, values: Mapping[str, _Value], *place: str) -> list[tuple[Any, ...]]:
        """The rows of values; ``place``: the plugin, and the digest of a version that is not confirmed."""
        now = time.time()
        return [
            (*place, key, value.secret, value.type, self._keys.seal(place[0], key, value.text), now)
            for key, value in values.items()
        ]

    async def set(
        self, plugin: str, manifest: Manifest, values: Mapping[str, str], *, replace: bool = False,
        beside: Beside = lambda _: None,
    ) -> None:  # fmt: skip
        """Store values; ``replace`` deletes all others first (a plugin of that name is new)."""
        async with self._changing:
            current = {} if replace else self._values.get(plugin, {})
            given = self._given(plugin, manifest, values, current)
            rows = self._rows(given, plugin)

            def write(db: sqlite3.Connection) -> None:
                if replace:
                    db.execute("DELETE FROM config WHERE plugin=?", (plugin,))
                db.executemany("INSERT OR REPLACE INTO config VALUES (?,?,?,?,?,?)", rows)
                beside(db)

            await self._store.run(write)
            self._values[plugin] = {**current, **given}
            self._redactors.pop(plugin, None)
            self.broken.pop(plugin, None)

    async def set_next(
        self, plugin: str, digest: str, manifest: Manifest, values: Mapping[str, str], *,
        beside: Beside = lambda _: None,
    ) -> None:  # fmt: skip
        """Keep values for the version of that digest; those of an earlier attempt at it are dropped."""
        async with self._changing:
            kept = self._given(plugin, manifest, values, self._values.get(plugin, {}))
            rows = self._rows(kept, plugin, digest)

            def write(db: sqlite3.Connection) -> None:
                db.execute("DELETE FROM config_next WHERE plugin=? AND digest=?", (plugin, digest))
                db.executemany("INSERT INTO config_next VALUES (?,?,?,?,?,?,?)", rows)
                beside(db)

            await self._store.run(write)
            versions = self._next.setdefault(plugin, {})
            versions.pop(digest, None)
            if kept:
                versions[digest] = kept
            self._redactors.pop(plugin, None)

    def settle(self, plugin: str, digest: str) -> None:
        """Make the values of a confirmed version the plugin's config."""
        kept = self._next.get(plugin, {}).pop(digest, None)
        if kept is None:
            return
        self._values[plugin] = {**self._values.get(plugin, {}), **kept}

        def move(db: sqlite3.Connection) -> None:
            db.execute(
                "INSERT OR REPLACE INTO config SELECT plugin, key, secret, type, value, updated FROM config_next"
                " WHERE plugin=? AND digest=?",
                (plugin, digest),
            )
            db.execute("DELETE FROM config_next WHERE plugin=? AND digest=?", (plugin, digest))

        self._store.submit(move)

    def drop_next(self, plugin: str, digest: str, *, beside: Beside = lambda _: None) -> None:
        """Drop the values of a version that was not confirmed."""

        def drop(db: sqlite3.Connection) -> None:
            db.execute("DELETE FROM config_next WHERE plugin=? AND digest=?", (plugin, digest))
            beside(db)

        if self._next.get(plugin, {}).pop(digest, None) is not None:
            self._redactors.pop(plugin, None)
        self._store.submit(drop)

    def unsettled(self) -> list[tuple[str, str]]:
        """Return (plugin, digest) of the versions for which values are kept."""
        return [(plugin, digest) for plugin, versions in self._next.items() for digest in versions]

    async def unset(self, plugin: str, key: str, *, beside: Beside = lambda _: None) -> None:
        """Delete a value; raises NotFoundError."""

        def delete(db: sqlite3.Connection) -> None:
            db.execute("DELETE FROM config WHERE plugin=? AND key=?", (plugin, key))
            beside(db)

        async with self._changing:
            if key not in self._values.get(plugin, {}):
                raise NotFoundError(f"config {key} of {plugin}", "is not set")
            await self._store.run(delete)
            del self._values[plugin][key]
            self._redactors.pop(plugin, None)

    async def forget(self, plugin: str, *, beside: Beside = lambda _: None) -> None:
        """Delete the config of a removed plugin."""

        def delete(db: sqlite3.Connection) -> None:
            db.execute("DELETE FROM config WHERE plugin=?", (plugin,))
            db.execute("DELETE FROM config_next WHERE plugin=?", (plugin,))
            beside(db)

        async with self._changing:
            await self._store.run(delete)
            self._values.pop(plugin, None)
            self._next.pop(plugin, None)
            self._redactors.pop(plugin, None)
            self.broken.pop(plugin, None)

    def listing(self, plugin: str, manifest: Manifest | None) -> list[dict[str, Any]]:
        """List every key of the schema and every key that is set, as listings show it; secrets without their value."""
        values = self._values.get(plugin, {})
        items = []
        fields = {f.key: f for f in manifest.config or ()} if manifest is not None else {}
        for key in sorted({*fields, *values}):
            spec, value = fields.get(key), values.get(key)
            secret = (value.secret if value else False) or (spec.secret if spec else False)
            items.append({
                "key": key, "type": spec.type if spec else value.type if value else "string", "secret": secret,
                "required": spec.required if spec else False, "is_set": value is not None,
                "value": None if secret or value is None else value.text, "default": spec.default if spec else None,
            })  # fmt: skip
        return items

    def _in_use(self, plugin: str, digest: str) -> dict[str, _Value]:
        return {**self._values.get(plugin, {}), **self._next.get(plugin, {}).get(digest, {})}

    def missing(self, plugin: str, manifest: Manifest, digest: str = "") -> list[str]:
        """Find required keys without a value, for the version of that digest."""
        values = self._in_use(plugin, digest) if manifest.required else {}
        return [key for key in manifest.required if key not in values]

    def check_whole(self, plugin: str, manifest: Manifest | None, digest: str = "") -> None:
        """Raise IsolatorError if a version cannot start: a required value is missing, or the config cannot be read."""
        if plugin in self.broken:
            raise self.broken[plugin]
        if manifest is not None and manifest.config and (missing := self.missing(plugin, manifest, digest)):
            remedy = f"isolator plugin config {plugin} set {missing[0]}=@FILE"
            raise UsageError(f"config of {plugin}", f"{', '.join(missing)} is required and not set", remedy)

    def environment(self, plugin: str, manifest: Manifest | None, digest: str = "") -> Environment:
        """Build the environment of the next start of a version; raises IsolatorError as ``check_whole`` does."""
        self.check_whole(plugin, manifest, digest)
        values = self._in_use(plugin, digest)
        if manifest is not None and manifest.config is not None:
            fields = {f.key: f for f in manifest.config}
            values = {key: value for key, value in values.items() if key in fields}
            for key, spec in fields.items():
                if key not in values and spec.default is not None:
                    values[key] = _Value(spec.default, spec.secret, spec.type)
        env: dict[str, str] = {}
        files: dict[str, str] = {}
        hidden: list[str] = []
        for key, value in sorted(values.items()):
            text = value.text
            if value.type == "file":
                files[key] = text
                text = f"{FILES_AT}/{key}"
            for variable in environment_names(key):
                env[variable] = text
                if value.secret:
                    hidden.append(variable)
        return Environment(env=env, files=files, secrets=tuple(hidden))

    def value(self, plugin: str, manifest: Manifest | None, digest: str, key: str) -> str | None:
        """The text of one value, or its default; None when there is neither."""
        found = self._in_use(plugin, digest).get(key)
        if found is not None:
            return found.text
        field = manifest.field(key) if manifest is not None else None
        return field.default if field is not None else None

    async def rotate(self, beside: Callable[[sqlite3.Connection, int], object] = lambda _, __: None) -> int:
        """Make a new key and seal every value with it; returns how many. Safe to interrupt at any instant.

        ``beside`` gets that number, too.
        """
        async with self._changing:
            if self._unusable is not None:
                raise self._unusable
            old = self._keys.keys
            self._keys.save([os.urandom(32), *old])
            now = time.time()
            rows = [
                (self._keys.seal(plugin, key, value.text), now, plugin, key)
                for plugin, values in self._values.items()
                for key, value in values.items()
            ]
            rows_next = [
                (self._keys.seal(plugin, key, value.text), plugin, digest, key)
                for plugin, versions in self._next.items()
                for digest, values in versions.items()
                for key, value in values.items()
            ]

            def write(db: sqlite3.Connection) -> None:
                db.executemany("UPDATE config SET value=?, updated=? WHERE plugin=? AND key=?", rows)
                db.executemany("UPDATE config_next SET value=? WHERE plugin=? AND digest=? AND key=?", rows_next)
                beside(db, len(rows) + len(rows_next))

            await self._store.run(write)
            # Rows that could not be opened before cannot be sealed anew: the old keys stay while there are any.
            if not self.broken:
                self._keys.save(self._keys.keys[:1])
            return len(rows) + len(rows_next)


def _check_size(plugin: str, values: Mapping[str, _Value]) -> None:
    files = sum(len(value.text.encode()) for value in values.values() if value.type == "file" and not value.secret)
    if files > MAX_FILES:
        raise UsageError(f"config of {plugin}", f"has files of more than {MAX_FILES} bytes in all")
    if (sum(len(value.text.encode()) + len(key) for key, value in values.items()) - files) * 2 > MAX_CONFIG:
        raise UsageError(f"config of {plugin}", f"is larger than {MAX_CONFIG // 2} bytes in all, besides public files")
