# SPDX-FileCopyrightText: Isolator contributors
# SPDX-License-Identifier: Apache-2.0
"""The audit trail as it arrives: where to go on, and whether each record continues the one before.

A record is a line of ASCII that ends in ``,"prev":"HEX64","hash":"HEX64"}``. ``hash`` is the SHA-256 of the bytes of
the line before ``,"hash":``; ``prev`` is the ``hash`` of the line before, and 64 zeros in record 1; ``seq`` counts from
1 without a gap. A follower that checks all three notices by itself when a record was changed, left out, repeated or
exchanged. Signatures are not checked here: that takes the public key, and ``isolator audit verify``.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from isolator_client import calls
from isolator_client.errors import IsolatorError, UnavailableError
from isolator_client.protocol import Notification

HASH_PART = len(',"hash":"') + 64 + len('"}')
"""Bytes at the end of a line that its hash does not cover."""

GENESIS = "0" * 64
"""``prev`` of record 1."""


@dataclass(frozen=True)
class Recorded:
    """One record: its line, byte for byte as it stands in the trail, and its fields.

    ``time`` is in UTC (RFC 3339, microseconds). ``data`` depends on ``type``, see docs/audit.md. ``cut`` tells the full
    length and SHA-256 of strings that were too long to be kept whole, by their path.
    """

    line: str
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
    def event_ids(self) -> tuple[str, ...]:
        """Every event that the record may belong to: its own, or all that were in flight."""
        several = self.data.get("event_ids")
        own = (self.event_id,) if self.event_id is not None else ()
        return own + tuple(several if isinstance(several, list) else ())


class Trail:
    """A position in the trail; it outlives the connections over which the records come."""

    def __init__(self, after: int | None = None, lines: int = 0) -> None:
        self._lines = lines
        self._known = after is not None
        self._seq = after or 0
        self._hash = ""
        self.begun = False
        """Whether the daemon has ever agreed to send the trail."""

    def follow(self) -> calls.Call[int | None]:
        """Make the request that goes on here."""
        return calls.follow({"after": self._seq} if self._known else {"lines": self._lines})

    def begins(self, after: int | None) -> None:
        """Take the answer to ``follow``: the place is known from now on, even before the first record."""
        self.begun = True
        if not self._known and isinstance(after, int):
            self._known, self._seq = True, after

    def away(self, error: IsolatorError) -> IsolatorError:
        """Choose the error for a socket that cannot be connected to: one that is being made anew is only away."""
        return UnavailableError(*error.args) if self.begun else error

    def take(self, message: Notification) -> Iterator[Recorded]:
        """Yield the records of a notification. Raises IsolatorError at the first that does not continue the chain."""
        lines = message.params.get("lines") if message.method == "audit.records" else None
        for line in lines if isinstance(lines, list) else ():
            yield self._next(str(line))

    def _next(self, line: str) -> Recorded:
        record = _parse(line)
        if record is None or record.hash != _hash(line):
            raise _broken(f"record {self._seq + 1} is no record, or its hash does not fit its bytes")
        expected = self._seq + 1
        # Old records are deleted when their time has come: who asks for all of them gets those that are left.
        if record.seq > expected > 1:
            raise _broken(f"record {expected} is missing: {record.seq} came instead")
        if record.seq < expected:
            raise _broken(f"record {record.seq} came again, or too late: {expected} was to come")
        if record.prev != (self._hash or (GENESIS if record.seq == 1 else record.prev)):
            raise _broken(f"record {record.seq} does not continue the record before it: the trail was rewritten")
        self._known, self._seq, self._hash = True, record.seq, record.hash
        return record


def _broken(why: str) -> IsolatorError:
    return IsolatorError("audit trail", why, "isolator audit verify")


def _hash(line: str) -> str:
    return hashlib.sha256(line[:-HASH_PART].encode("ascii")).hexdigest()


def _parse(line: str) -> Recorded | None:
    try:
        fields = json.loads(line)
    except (ValueError, RecursionError):
        return None
    if not isinstance(fields, Mapping) or not line.isascii() or not line.endswith(f',"hash":"{fields.get("hash")}"}}'):
        return None
    texts: dict[str, Any] = {name: fields.get(name) for name in ("time", "type", "origin", "prev", "hash")}
    optional: dict[str, Any] = {name: fields.get(name) for name in ("plugin", "run", "event_id", "delivery_id")}
    seq, data, cut = fields.get("seq"), fields.get("data"), fields.get("cut", {})
    if type(seq) is not int or not isinstance(data, dict) or not isinstance(cut, dict):
        return None
    if not all(isinstance(text, str) for text in texts.values()):
        return None
    return Recorded(line, seq=seq, data=data, cut=cut, **texts, **optional)
