"""Copies of the fold at earlier places, for hosts that come when the log's beginning is gone.

Every host makes one a day, or when an eighth of the log has been replaced, and gives the oldest from which the log is
whole: whoever takes it folds all that the log still has. A false one is noticed by the first digest that follows.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import sqlite3
import zlib
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any, Final

from host.cluster.log import Facts, Log, LogUnavailableError
from host.cluster.store import dump, restore, size
from host.database.store import Store as Database

EVERYBODY: Final = "iso.ask"
CHUNK: Final = 200 << 10
LARGEST: Final = 64 << 20
UNPACKED: Final = 256 << 20
"""Bytes of a copy, compressed and not."""
EVERY: Final = 86400.0
LEAST: Final = 10_000
"""Places between two copies, at least; seconds by the log's time, otherwise."""
_KEEP = 20
_FORMAT = 1
_logger = logging.getLogger(__name__)


def subject_of(host: str) -> str:
    """Subject of questions to a host."""
    return f"{EVERYBODY}.{host}"


class Snapshots:
    """The copies of one host, in a folder of its own."""

    def __init__(self, host: str, database: Database, folder: Path) -> None:
        self._host, self._database, self._folder = host, database, folder
        self._made_at = 0.0
        self._making: asyncio.Task[None] | None = None

    def look(self, facts: Facts, place: int, time: float) -> None:
        """Have a copy made beside everything else, if one is due."""
        if self._making is None or self._making.done():
            self._making = asyncio.create_task(self.keep_up(facts, place, time), name="copy of the fold")

    async def close(self) -> None:
        """Return when no copy is being made."""
        if self._making is not None:
            await asyncio.gather(self._making, return_exceptions=True)

    def _known(self) -> list[tuple[int, Path]]:
        with contextlib.suppress(OSError):
            return sorted((int(path.stem), path) for path in self._folder.glob("*.fold") if path.stem.isdigit())
        return []

    async def keep_up(self, facts: Facts, place: int, time: float) -> None:
        """Make a copy if one is due, at a place and time of the log; drop those that nobody can use any more."""
        known = self._known()
        for behind, path in known[:-_KEEP] + [one for one in known[-_KEEP:] if one[0] < facts.first - 1]:
            path.unlink(missing_ok=True)
            known.remove((behind, path))
        newest = known[-1][0] if known else 0
        step = max(LEAST, (facts.last - facts.first) // 8)
        if place - newest < LEAST or (place - newest < step and time - self._made_at < EVERY):
            return
        self._made_at = time
        await self._database.scan(lambda db: self._make(db, facts.created))

    def _make(self, db: sqlite3.Connection, created: str) -> None:
        db.execute("BEGIN")
        if size(db) > UNPACKED:  # nobody would take it, and it would be in this process's memory
            _logger.warning("cluster: the fold is too large to be copied for new hosts")
            return
        found = {"format": _FORMAT, "log": created, **dump(db)}
        packed = zlib.compress(json.dumps(found, separators=(",", ":")).encode(), 6)
        if len(packed) > LARGEST:
            return
        self._folder.mkdir(mode=0o700, exist_ok=True)
        draft = self._folder / "draft"
        draft.write_bytes(packed)
        draft.rename(self._folder / f"{found['place']}.fold")

    def answer(self, question: bytes) -> bytes | None:
        """Answer another host: which copy there is for its log, or a piece of one; None: nothing, or no question."""
        try:
            asked = json.loads(question)
            known = self._known()
            if "first" in asked:
                place, path = next(one for one in known if one[0] >= int(asked["first"]) - 1)
                return json.dumps({"host": self._host, "place": place, "size": path.stat().st_size}).encode()
            path, offset = dict(known)[int(asked["place"])], int(asked["offset"])
            with path.open("rb") as file:
                file.seek(max(0, offset))
                return file.read(CHUNK)
        except (ValueError, TypeError, KeyError, StopIteration, OSError, OverflowError, RecursionError):
            return None


async def fetch(log: Log, facts: Facts) -> dict[str, Any]:
    """A copy of the fold from which the log is whole, from any host; raises LogUnavailableError, ValueError."""
    offer = json.loads(await log.ask(EVERYBODY, json.dumps({"first": facts.first}).encode()))
    host, place, whole = str(offer["host"]), int(offer["place"]), int(offer["size"])
    if not 0 < whole <= LARGEST or place < facts.first - 1 or place > facts.last:
        raise ValueError(f"{host[:64]} offers a copy of {whole} bytes at {place}")
    packed = b""
    while len(packed) < whole:
        piece = await log.ask(subject_of(host), json.dumps({"place": place, "offset": len(packed)}).encode())
        if len(piece) != min(CHUNK, whole - len(packed)):
            raise LogUnavailableError(f"{host[:64]} has dropped the copy that it offered")
        packed += piece
    opener = zlib.decompressobj()
    found: dict[str, Any] = json.loads(opener.decompress(packed, UNPACKED))
    if found.get("format") != _FORMAT or found.get("log") != facts.created or found.get("place") != place:
        raise ValueError(f"{host[:64]} sent a copy of another log or version")
    return found


_UNUSABLE = (
    *(ValueError, TypeError, KeyError, AttributeError, OverflowError, RecursionError),
    *(zlib.error, sqlite3.Error),
)


async def adopt(
    log: Log, facts: Facts, write: Callable[[Callable[[sqlite3.Connection], None]], Awaitable[None]]
) -> None:
    """Put a copy of the fold in the place of this host's; raises LogUnavailableError if there is none to be used."""
    try:
        found = await fetch(log, facts)
        await write(lambda db: restore(db, found))
    except _UNUSABLE as error:
        raise LogUnavailableError(f"no copy of the fold can be used: {error}") from None
