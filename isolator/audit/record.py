"""One record of the trail: the check of what a source sent, the form on disk, and the part that the hash covers.

The canonical form of a record is the line itself. A line is ASCII and looks like this (one line, no spaces):

    {"seq":7,"time":"2026-01-02T03:04:05.000006Z","type":"net.denied","origin":"broker:5f2a9c10:42","plugin":…,
     "run":…,"event_id":…,"delivery_id":…,"data":{…},"prev":"HEX64","hash":"HEX64"}

``hash`` is the SHA-256 of every byte of the line before ``,"hash":`` and ``prev``, which those bytes include, is the
``hash`` of the line before (64 zeros for the first). ``hash`` is always the last key, so the hashed part is the line
without its last 75 characters and the newline: a verifier needs neither a JSON serialiser nor this program.

What a source sends is parsed, checked against the types that this source may write (`schema.py`), and spelled anew:
every string is escaped to ASCII (no control character, terminal escape, bidirectional or invisible character survives
as itself), a string over ``MAX_TEXT`` (an identifier over ``MAX_ID``) is cut, and ``cut`` then holds its full length
and SHA-256.
"""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, TypeVar

from isolator.audit.schema import AUDIT, IDENTIFIERS, MAX_ID, may_write
from isolator.base import core

T = TypeVar("T")

GENESIS = "0" * 64
"""``prev`` of the very first record."""
MAX_TEXT = 4096
"""Longest string kept whole, in UTF-8 bytes."""
MAX_DEPTH = 32
HASH_TAIL = 75
"""Length of ``,"hash":"HEX64"}``: the part of a line that its hash does not cover."""
PREV_TAIL = HASH_TAIL + 74
"""Length of ``,"prev":"HEX64","hash":"HEX64"}``."""

GAUGES = b'{"gauges":'
"""Beginning of a line that is no record but present values for the metrics."""

_is_time = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{6}Z", re.ASCII).fullmatch
_TYPE = re.compile(r"[a-z][a-z0-9_]{0,31}(?:\.[a-z][a-z0-9_]{0,31}){0,3}")
_is_number = re.compile(r"[0-9a-f]{8}:[1-9][0-9]{0,14}").fullmatch
_PLAIN = re.compile(r"[A-Za-z0-9_.:@/+-]{1,256}")
_SURROGATE = re.compile(r"[\ud800-\udfff]")
_FLAT = frozenset({str, int, float, bool, type(None)})
"""Types of the JSON values that hold no others."""
_encode = json.JSONEncoder(separators=(",", ":"), ensure_ascii=True, allow_nan=False).encode


class RejectedError(ValueError):
    """A line that is no record, or not one that this source may send; the text is the reason."""


@dataclass(slots=True)
class Incoming:
    """A record as a source sent it, checked, before it has a place in the chain."""

    time: str
    type: str
    plugin: str | None = None
    run: str | None = None
    event_id: str | None = None
    delivery_id: str | None = None
    data: dict[str, Any] = field(default_factory=dict)
    source: str = AUDIT
    number: str = ""
    """``SESSION:NUMBER`` of this record in its source, from 1 on; empty when the source does not number them."""
    happened: int | None = None
    """CLOCK_MONOTONIC in ns when it happened, comparable between the processes of one host; never on disk."""
    began: int | None = None
    """For a record that stands for several things: when the first happened."""
    cut: dict[str, dict[str, Any]] | None = None


def parse_incoming(source: str, line: bytes, awaited: str = "") -> Incoming:
    """Check one line of a source; raises RejectedError with a reason fit for the trail.

    ``awaited``: a number as it should be, which the record probably has.
    """
    try:
        value = core.from_json_of_few_keys(line)
    except ValueError:
        value = _parse_leniently(line)
    if not isinstance(value, dict):
        raise RejectedError("not a JSON object")
    get = value.get
    type_, time, data = get("type"), get("time"), get("data")
    if not isinstance(type_, str):
        raise RejectedError("no valid type")
    if not may_write(source, type_):
        raise RejectedError(f"the {source} may not send {type_}" if _TYPE.fullmatch(type_) else "no valid type")
    if not isinstance(time, str) or not _is_time(time):
        raise RejectedError("no valid time")
    if data is None:
        data = {}
    if not isinstance(data, dict):
        raise RejectedError("data is not an object")
    happened, began, number = get("mono"), get("since"), get("n")
    if number != awaited and not (isinstance(number, str) and _is_number(number)):
        number = ""
    cuts: dict[str, dict[str, Any]] = {}
    ids = plugin, run, event, delivery = get("plugin"), get("run"), get("event_id"), get("delivery_id")
    for text in ids:
        if text is not None and (type(text) is not str or len(text) > MAX_ID):
            plugin, run, event, delivery = [
                _identifier(id, key, cuts) for id, key in zip(ids, IDENTIFIERS, strict=True)
            ]
            break
    # A string over the cap only fits into a long line, a deep nest only into a bracketed one: most lines need no walk.
    if len(line) > MAX_TEXT or (
        not _FLAT.issuperset(map(type, data.values())) and line.count(b"{") + line.count(b"[") > MAX_DEPTH
    ):
        data = cap(data, cuts)
    return Incoming(
        time,
        type_,
        plugin,
        run,
        event,
        delivery,
        data,
        source,
        number,
        happened if isinstance(happened, int) else None,
        began if isinstance(began, int) else None,
        cuts or None,
    )


def _parse_leniently(line: bytes) -> Any:
    """Parse with the standard library, which takes lone surrogates: plugins' text may hold them. They become U+FFFD."""
    try:
        return _mended(json.loads(line))
    except (ValueError, RecursionError):
        raise RejectedError("not JSON") from None


def _mended(value: Any) -> Any:
    if isinstance(value, str):
        return _SURROGATE.sub("\ufffd", value)
    if isinstance(value, dict):
        return {_mended(key): _mended(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_mended(item) for item in value]
    return value


def _identifier(text: Any, key: str, cuts: dict[str, dict[str, Any]]) -> str | None:
    """An identifier, cut like any string: a caller may name a plugin as it likes, and is on record all the same."""
    if text is None:
        return None
    if not isinstance(text, str):
        raise RejectedError(f"{key} is not a string")
    if len(text) <= MAX_ID:
        return text
    _note_cut(text.encode("utf-8", "replace"), key, cuts)
    return text[:MAX_ID]


def cap(data: dict[str, Any], cuts: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Cut every string over ``MAX_TEXT``; adds to ``cuts``, by path, length and SHA-256 of each that was cut.

    Raises RejectedError for a nest deeper than ``MAX_DEPTH``: recursion here and in every reader stays bounded.
    """
    kept = _capped(data, "data", 0, cuts)
    assert isinstance(kept, dict)
    return kept


def _capped(value: Any, path: str, depth: int, cuts: dict[str, dict[str, Any]]) -> Any:
    if depth > MAX_DEPTH:
        raise RejectedError(f"nested more than {MAX_DEPTH} deep")
    if isinstance(value, str):
        return _short(value, path, cuts)
    if isinstance(value, dict):
        kept = {}
        for key, item in value.items():
            name = _short(key, f"{path}.(key)", cuts)
            kept[name] = _capped(item, f"{path}.{name[:64]}", depth + 1, cuts)
        return kept
    if isinstance(value, list):
        return [_capped(item, f"{path}.{i}", depth + 1, cuts) for i, item in enumerate(value)]
    return value


def _short(text: str, path: str, cuts: dict[str, dict[str, Any]]) -> str:
    if len(text) <= MAX_TEXT // 4:
        return text
    raw = text.encode("utf-8", "replace")
    if len(raw) <= MAX_TEXT:
        return text
    _note_cut(raw, path, cuts)
    return raw[:MAX_TEXT].decode("utf-8", "ignore")


def _note_cut(raw: bytes, path: str, cuts: dict[str, dict[str, Any]]) -> None:
    cuts[path] = {"bytes": len(raw), "sha256": hashlib.sha256(raw).hexdigest()}


@lru_cache(maxsize=8192)
def quoted(text: str | None) -> str:
    """An identifier as it stands in a line."""
    if text is None:
        return "null"
    return f'"{text}"' if _PLAIN.fullmatch(text) else _ascii(text)


def _ascii(value: Any) -> str:
    """Spell a value as JSON in ASCII; raises ValueError, TypeError or RecursionError for one that JSON cannot hold."""
    try:
        quick = core.to_json(value).decode()
    except ValueError:
        quick = "\x7f"
    if quick.isascii() and "\x7f" not in quick and "NaN" not in quick and "Infinity" not in quick:
        return quick
    # DEL is the one control character that JSON encoders leave alone.
    return _encode(value).replace("\x7f", "\\u007f")


def spell(seq: int, record: Incoming, prev: str) -> tuple[bytes, str]:
    """The line of a record, newline included, and its hash; raises RejectedError for NaN and the like."""
    try:
        data = _ascii(record.data)
    except (ValueError, TypeError, RecursionError):
        raise RejectedError("data has a value that JSON cannot hold") from None
    if record.cut:
        data = f'{data},"cut":{_ascii(record.cut)}'
    origin = f"{record.source}:{record.number}" if record.number else record.source
    body = (
        f'{{"seq":{seq},"time":"{record.time}","type":"{record.type}","origin":"{origin}"'
        f',"plugin":{quoted(record.plugin)},"run":{quoted(record.run)},"event_id":{quoted(record.event_id)}'
        f',"delivery_id":{quoted(record.delivery_id)},"data":{data},"prev":"{prev}"'
    ).encode("ascii")
    digest = hashlib.sha256(body).hexdigest()
    return b'%b,"hash":"%b"}\n' % (body, digest.encode()), digest


@dataclass(frozen=True)
class Record:
    """A record as readers see it."""

    seq: int
    time: str
    type: str
    origin: str
    plugin: str | None
    run: str | None
    event_id: str | None
    delivery_id: str | None
    data: dict[str, Any]
    prev: str
    hash: str
    cut: dict[str, Any]

    @property
    def events(self) -> tuple[str, ...]:
        """Every event this record belongs to: its own, or those that were in flight."""
        several = self.data.get("event_ids")
        ids = tuple(i for i in several if isinstance(i, str)) if isinstance(several, list) else ()
        return (self.event_id, *ids) if self.event_id else ids


def parse(line: bytes) -> Record | None:
    """A line of the trail as a Record, or None when it is not one; its place in the chain is not checked."""
    try:
        value = core.from_json_of_few_keys(line)
        data, cut = value["data"], value.get("cut") or {}
        if not isinstance(data, dict) or not isinstance(cut, dict):
            return None
        return Record(
            _typed(value["seq"], int),
            _typed(value["time"], str),
            _typed(value["type"], str),
            str(value.get("origin", "")),
            _optional(value["plugin"]),
            _optional(value["run"]),
            _optional(value["event_id"]),
            _optional(value["delivery_id"]),
            data,
            _typed(value["prev"], str),
            _typed(value["hash"], str),
            cut,
        )
    except (ValueError, KeyError, TypeError):
        return None


def _typed(value: Any, kind: type[T]) -> T:
    if not isinstance(value, kind):
        raise TypeError(kind)
    return value


def _optional(value: Any) -> str | None:
    return None if value is None else str(value)


def own_hash_fits(line: bytes) -> bool:
    """Whether ``line`` (without its newline) ends in the hash of what comes before; the chain is another question."""
    return (
        len(line) > PREV_TAIL
        and line[-HASH_TAIL:-66] == b',"hash":"'
        and line.endswith(b'"}')
        and line[-66:-2] == hashlib.sha256(line[:-HASH_TAIL]).hexdigest().encode()
    )
