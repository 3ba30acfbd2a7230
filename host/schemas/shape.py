"""Shapes: what a JSON Schema lets a value be, for the part of JSON Schema that is understood.

That part is objects with properties, lists, objects whose values are all of one shape, texts, numbers, booleans and
enumerations, each named by ``$ref`` if need be, as pydantic writes it for nested models. A keyword beyond it is refused
rather than ignored, so that no rule goes unchecked.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from isolator.base.structs import field, struct_class
from isolator.errors import UsageError

KINDS = ("string", "integer", "number", "boolean", "object")
"""Kinds of a scalar; ``object``: an object of any content."""
LIMITS = ("maxLength", "minLength", "pattern", "minimum", "maximum")
SIZES = ("maxItems", "minItems")
MAX_DEPTH = 24
"""Levels of objects, lists and references in a payload's schema."""
_NOTES = {"title", "description", "default", "examples", "deprecated", "$comment"}
"""Keywords that restrict nothing."""


@struct_class(frozen=True)
class Scalar:
    """One of ``KINDS``, within ``LIMITS``."""

    kind: str
    limits: Mapping[str, Any] = field(default_factory=dict)
    examples: tuple[Any, ...] = ()
    then: Callable[[Any], Any] | None = None
    """Further check of a value that fits; returns the value to go on with, or raises ValueError."""


@struct_class(frozen=True)
class Choice:
    """One of several values."""

    values: tuple[Any, ...]


@struct_class(frozen=True)
class Many:
    """A list, within ``SIZES``."""

    item: Shape
    limits: Mapping[str, Any] = field(default_factory=dict)


@struct_class(frozen=True)
class Table:
    """An object with any keys, and values of one shape."""

    value: Shape


@struct_class(frozen=True)
class Property:
    """One field of a record."""

    shape: Shape
    required: bool
    description: str | None = None
    examples: list[Any] | None = None


@struct_class(frozen=True)
class Record:
    """An object with these fields and no others."""

    name: str
    fields: Mapping[str, Property]


Shape = Scalar | Choice | Many | Table | Record


def read(event: str, schema: Mapping[str, Any], *, stored: bool = False) -> Record:
    """Read the schema of an event's payload; ``stored``: one that was registered before. Raises UsageError.

    A release once ignored some keywords. What it has stored is still read so, and registered no more.
    """
    if schema.get("type") != "object" or not isinstance(schema.get("properties"), dict):
        raise UsageError(f"event {event}", "the schema must describe an object with properties")
    return _Reader(event, schema, stored).record(schema, "payload", event, ())


class _Reader:
    def __init__(self, event: str, schema: Mapping[str, Any], stored: bool) -> None:
        self._event, self._schema, self._stored = event, schema, stored
        self._found: dict[str, Shape] = {}
        """Shapes by reference: each is read once, however often it is named."""

    def record(self, rule: Mapping[str, Any], where: str, name: str, above: tuple[str, ...]) -> Record:
        """Read an object with properties; ``above``: what it lies in, references too."""
        known = {"type", "properties", "required", "additionalProperties", "$schema", "$id", "$defs", "definitions"}
        self._know(rule, known, where)
        if rule.get("additionalProperties") not in (None, False) and not self._stored:
            raise self._refusal(where, "unknown fields are never let through", "leave additionalProperties out")
        properties, required = rule.get("properties") or {}, rule.get("required", ())
        if not isinstance(properties, dict) or not isinstance(required, (list, tuple)):
            raise self._refusal(where, "properties is no object, or required no list", "see docs/events.md")
        nobody = [name for name in required if name not in properties]
        if nobody and not self._stored:
            raise self._refusal(where, f"required names no field: {nobody[0]!r}", "spell it as in properties")
        fields = {}
        for key, inner in properties.items():
            inside = key if where == "payload" else f"{where}.{key}"
            if key.startswith("_"):
                raise self._refusal(inside, "begins with an underscore", "such names are the daemon's; choose another")
            shape = self._shape(inner, inside, (*above, key))
            about, examples = inner.get("description"), inner.get("examples")
            fields[key] = Property(
                shape,
                key in required,
                about if isinstance(about, str) else None,
                examples if isinstance(examples, list) else None,
            )
        return Record(str(rule.get("title") or name), fields)

    def _shape(self, rule: Any, where: str, above: tuple[str, ...]) -> Shape:
        if not isinstance(rule, dict):
            raise self._refusal(where, "its schema is no object", "see docs/events.md")
        if len(above) > MAX_DEPTH:
            raise self._refusal(where, f"lies more than {MAX_DEPTH} levels deep", "make the payload flatter")
        for combined in ("anyOf", "allOf"):
            if combined in rule:
                return self._shape(self._only(rule, combined, where), where, above)
        if "$ref" in rule:
            return self._named(rule, where, above)
        if "enum" in rule or "const" in rule:
            return self._choice(rule, where)
        kind = rule.get("type")
        if isinstance(kind, list) and len(named := [one for one in kind if one != "null"]) == 1:
            kind = named[0]
        if kind == "array":
            self._know(rule, {"type", "items", *SIZES}, where)
            item = self._shape(rule.get("items", {}), f"{where}[]", (*above, "[]"))
            return Many(item, self._limits(rule, SIZES, where))
        others = rule.get("additionalProperties")
        if kind == "object" and ("properties" in rule or others is False):
            return self.record(rule, where, where.rpartition(".")[2], above)
        if kind == "object" and isinstance(others, dict):
            self._know(rule, {"type", "additionalProperties"}, where)
            return Table(self._shape(others, f"{where}.*", (*above, "*")))
        if kind not in KINDS:
            raise self._refusal(where, f"type {kind!r} is not supported", f"use one of {', '.join(KINDS)}, array")
        self._know(rule, {"type", *LIMITS, *(["additionalProperties"] if kind == "object" else ())}, where)
        return Scalar(kind, self._limits(rule, LIMITS, where))

    def _only(self, rule: Mapping[str, Any], combined: str, where: str) -> Any:
        """The one shape of a combination that has no other, null set aside, as pydantic writes an optional field."""
        self._know(rule, {combined}, where)
        options = rule[combined]
        options = options if isinstance(options, list) else []
        real = [one for one in options if not (isinstance(one, dict) and one.get("type") == "null")]
        if len(real) != 1:
            raise self._refusal(where, f"{combined} of several types is not supported", "choose one of them")
        return real[0]

    def _named(self, rule: Mapping[str, Any], where: str, above: tuple[str, ...]) -> Shape:
        self._know(rule, {"$ref"}, where)
        reference = rule["$ref"]
        if reference in above:
            raise self._refusal(where, f"{reference} contains itself, which has no bound", "use a list of ids")
        if reference not in self._found:
            place: Any = self._schema
            steps = reference.split("/") if isinstance(reference, str) and reference.startswith("#/") else ["#", ""]
            for step in steps[1:]:
                place = place.get(step) if isinstance(place, dict) else None
            if place is None:
                raise self._refusal(where, f"$ref {reference!r} leads nowhere", "refer to '#/$defs/NAME'")
            name = steps[-1]
            titled = {"title": name, **place} if isinstance(place, dict) else place
            self._found[reference] = self._shape(titled, where, (*above, reference))
        return self._found[reference]

    def _choice(self, rule: Mapping[str, Any], where: str) -> Choice:
        self._know(rule, {"type", "enum", "const"}, where)
        values = rule["enum"] if "enum" in rule else [rule["const"]]
        if not isinstance(values, list) or not values or not all(isinstance(one, str | int | bool) for one in values):
            raise self._refusal(where, "enum lists something else than texts, whole numbers and booleans", "")
        return Choice(tuple(values))

    def _limits(self, rule: Mapping[str, Any], named: tuple[str, ...], where: str) -> dict[str, Any]:
        limits = {keyword: rule[keyword] for keyword in named if keyword in rule}
        for keyword, value in limits.items():
            fits = isinstance(value, str) if keyword == "pattern" else isinstance(value, int | float)
            if not fits or isinstance(value, bool):
                raise self._refusal(where, f"{keyword} is {'no text' if keyword == 'pattern' else 'no number'}", "")
        return limits

    def _know(self, rule: Mapping[str, Any], known: set[str], where: str) -> None:
        unknown = sorted(set(rule) - known - _NOTES)
        if unknown and not self._stored:
            supported = sorted(known - {"type"})
            more = f"leave it out; supported here: {', '.join(supported)}" if supported else "leave it out"
            raise self._refusal(where, f"keyword {unknown[0]!r} is not supported", more)

    def _refusal(self, where: str, why: str, remedy: str) -> UsageError:
        return UsageError(f"event {self._event}", f"{where}: {why}", remedy)
