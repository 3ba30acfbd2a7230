"""Checks of shapes: pydantic's core validates payloads by them, without the models that pydantic would make of them.

The models, and what makes them, would be a sixth of the host's memory and a third of the time in which it starts.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from host.schemas.shape import Choice, Many, Record, Scalar, Shape, Table
from isolator.base.core import SchemaError, SchemaValidator
from isolator.errors import UsageError

_KINDS = {"string": "str", "integer": "int", "number": "float", "boolean": "bool"}
_STRICT = {"strict": True}
"""No value is made of one of another type. The setting of the whole does not reach what is named."""
_OBJECT = {"type": "dict", "keys_schema": {"type": "str", **_STRICT}, **_STRICT}
_SIZES = {"maxLength": "max_length", "minLength": "min_length"}
_RANGE = {"minimum": "ge", "maximum": "le"}
_LIMITS = {"string": {**_SIZES, "pattern": "pattern"}, "integer": _RANGE, "number": _RANGE, "object": _SIZES}
_LENGTHS = {"maxItems": "max_length", "minItems": "min_length"}


def check_of(event: str, shape: Record, filled: str | None = None, value: Callable[[], Any] = str) -> SchemaValidator:
    """Make the check of an event's payload; raises UsageError for a shape that cannot be checked.

    The check returns the fields that are there, in the shape's order, and raises pydantic_core's ValidationError. The
    field ``filled`` is always there: where it is missing or null it has the ``value``.
    """
    maker = _Maker()
    try:
        top = maker.schema(shape)
        if filled is not None:
            field = maker.field(shape.fields[filled].shape, False)
            given = _after(lambda one: value() if one is None else one, field["schema"])
            field["schema"] = {"type": "default", "default": None, "validate_default": True, "schema": given}
            maker.records[id(shape)]["schema"]["fields"][filled] = field
        whole: Any = {"type": "definitions", "schema": top, "definitions": list(maker.records.values())}
        return SchemaValidator(whole)
    except (SchemaError, ValueError) as error:
        lines = str(error).strip().splitlines()
        why = lines[-1 if isinstance(error, SchemaError) else 0].strip()
        raise UsageError(f"event {event}", f"no model can be made of its schema: {why}", "mend that") from None


class _Maker:
    def __init__(self) -> None:
        self.records: dict[int, dict[str, Any]] = {}
        """Schemas of records by the identity of their shapes: a record that is named twice is one."""

    def schema(self, shape: Shape) -> dict[str, Any]:
        """The schema of pydantic's core for a shape; of a record a reference."""
        match shape:
            case Record():
                ref = f"{shape.name}:{id(shape)}"
                if id(shape) not in self.records:
                    fields = {key: self.field(one.shape, one.required) for key, one in shape.fields.items()}
                    record = {"type": "typed-dict", "fields": fields, "extra_behavior": "forbid", **_STRICT}
                    self.records[id(shape)] = {**_after(_present, record), "ref": ref}
                return {"type": "definition-ref", "schema_ref": ref}
            case Table():
                return {**_OBJECT, "values_schema": self.schema(shape.value)}
            case Choice():
                return {"type": "literal", "expected": list(shape.values)}
            case Many():
                limits = _limits(shape.limits, _LENGTHS)
                return {"type": "list", "items_schema": self.schema(shape.item), **limits, **_STRICT}
            case Scalar():
                kind = _OBJECT if shape.kind == "object" else {"type": _KINDS[shape.kind], **_STRICT}
                plain = {**kind, **_limits(shape.limits, _LIMITS.get(shape.kind, {}))}
                return _after(shape.then, plain) if shape.then is not None else plain

    def field(self, shape: Shape, required: bool) -> dict[str, Any]:
        schema = self.schema(shape)
        schema = schema if required else {"type": "nullable", "schema": schema}
        return {"type": "typed-dict-field", "schema": schema, "required": required}


def _after(function: Any, schema: dict[str, Any]) -> dict[str, Any]:
    return {"type": "function-after", "schema": schema, "function": {"type": "no-info", "function": function}}


def _limits(limits: Any, known: dict[str, str]) -> dict[str, Any]:
    unknown = next((keyword for keyword in limits if keyword not in known), None)
    if unknown is not None:
        raise ValueError(f"{unknown} says nothing about values of its type")
    return {known[keyword]: value for keyword, value in limits.items()}


def _present(fields: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in fields.items() if value is not None} if None in fields.values() else fields
