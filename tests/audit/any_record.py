"""A record of any type with any data, as a sender of another version, or one with a fault, may send it."""

from __future__ import annotations

from typing import Any

from isolator.audit.schema import RecordData


def any_record(kind: str, /, **data: Any) -> RecordData:
    """A record of type ``kind`` whose data no schema has to know."""
    return type("AnyRecord", (RecordData,), {"TYPE": kind})(**data)
