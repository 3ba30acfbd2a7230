"""Compatibility of two shapes, as the reader of a payload sees it: a plugin that was written for one of them.

Such a plugin relies on each required field being there, on each value being of the type and within the limits that it
knows, and ignores fields that it does not know. So a payload may gain fields and narrow what is in it, and do nothing
else.
"""

from __future__ import annotations

from typing import Any

from host.schemas.shape import Choice, Many, Property, Record, Scalar, Shape, Table

_KINDS: dict[str, type | tuple[type, ...]] = {
    "string": str,
    "integer": int,
    "number": (int, float),
    "boolean": bool,
    "object": dict,
}
_WHOLE = ("number", "integer")
"""Kinds of a reader and of a payload whose every value it takes."""
_LEAST = {"minLength", "minimum", "minItems"}


def difference(reader: Shape, payload: Shape, *, keeps_optional: bool = False) -> str | None:
    """The first way in which a payload may surprise a reader of another shape, with its field; None if none can.

    ``keeps_optional``: the payload must also have the reader's optional fields, which filters and texts may use.
    """
    return _Comparison(keeps_optional).find(reader, payload, "")


class _Comparison:
    def __init__(self, keeps_optional: bool) -> None:
        self._keeps_optional = keeps_optional
        self._compared = set[tuple[int, int]]()
        """Pairs of shapes by identity, without a difference: what is named twice is compared once."""

    def find(self, reader: Shape, payload: Shape, at: str) -> str | None:
        if (id(reader), id(payload)) in self._compared:
            return None
        found = self._compare(reader, payload, at)
        if found is None:
            self._compared.add((id(reader), id(payload)))
        return found

    def _compare(self, reader: Shape, payload: Shape, at: str) -> str | None:
        match reader, payload:
            case Record(), Record():
                found = (self._field(key, wanted, payload, at) for key, wanted in reader.fields.items())
                return next((one for one in found if one is not None), None)
            case Table(), Table():
                return self.find(reader.value, payload.value, f"{at}.*")
            case Many(), Many():
                return _limits(reader, payload, at) or self.find(reader.item, payload.item, f"{at}[]")
            case Scalar(kind="object"), Record() | Table():
                return None
            case Scalar(), Scalar() if reader.kind == payload.kind or (reader.kind, payload.kind) == _WHOLE:
                return _limits(reader, payload, at)
            case Choice(), Choice():
                further = next((one for one in payload.values if one not in reader.values), None)
                return None if further is None else f"field {at} may be {further!r}"
            case Scalar(), Choice() if not reader.limits and all(_is(one, reader.kind) for one in payload.values):
                return None
        return f"field {at} is {_name(payload)} instead of {_name(reader)}"

    def _field(self, key: str, wanted: Property, payload: Record, at: str) -> str | None:
        field, inside = payload.fields.get(key), f"{at}.{key}" if at else key
        if field is None:
            return f"field {inside} is not in it" if wanted.required or self._keeps_optional else None
        if wanted.required and not field.required:
            return f"field {inside} may be missing"
        return self.find(wanted.shape, field.shape, inside)


def _is(value: Any, kind: str) -> bool:
    return isinstance(value, _KINDS[kind]) and isinstance(value, bool) == (kind == "boolean")


def _limits(reader: Scalar | Many, payload: Scalar | Many, at: str) -> str | None:
    for keyword, limit in reader.limits.items():
        now = payload.limits.get(keyword)
        kept = now == limit if keyword == "pattern" else now is not None and (
            now >= limit if keyword in _LEAST else now <= limit
        )  # fmt: skip
        if not kept:
            return f"field {at} has {'no' if now is None else 'another'} {keyword}"
    return None


def _name(shape: Shape) -> str:
    match shape:
        case Record():
            return f"an object {shape.name}"
        case Table():
            return "an object of values"
        case Many():
            return "a list"
        case Choice():
            return f"one of {', '.join(map(str, shape.values))}"
        case Scalar():
            return "any object" if shape.kind == "object" else shape.kind
