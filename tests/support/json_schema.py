"""A JSON Schema validator for the keywords that docs/schemas/ uses; any other keyword is an error."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

_KINDS: dict[str, tuple[type, ...]] = {
    "string": (str,),
    "integer": (int,),
    "number": (int, float),
    "boolean": (bool,),
    "object": (dict,),
    "array": (list,),
    "null": (type(None),),
}
_NOTES = {"$schema", "title", "description", "format"}
"""Keywords that restrict nothing."""
_KEYWORDS = {"type", "const", "enum", "pattern", "minimum", "items", "properties", "required", "additionalProperties"}


def violations(value: Any, schema: dict[str, Any], path: str = "$") -> Iterator[str]:
    """Every place where ``value`` does not follow the schema. A key that ``properties`` does not name is one too:
    the schemas allow it, for the sake of later versions, and this version writes none."""
    unknown = schema.keys() - _NOTES - _KEYWORDS
    assert not unknown, f"{path}: this validator does not know {unknown}"
    kinds = schema.get("type", [])
    kinds = [kinds] if isinstance(kinds, str) else kinds
    if kinds and not any(_is(value, kind) for kind in kinds):
        yield f"{path}: {value!r} is not {' or '.join(kinds)}"
        return
    if "const" in schema and value != schema["const"]:
        yield f"{path}: {value!r} is not {schema['const']!r}"
    if "enum" in schema and value not in schema["enum"]:
        yield f"{path}: {value!r} is none of {schema['enum']}"
    if isinstance(value, str) and not re.search(schema.get("pattern", ""), value):
        yield f"{path}: {value!r} does not match {schema['pattern']}"
    if isinstance(value, int) and value < schema.get("minimum", value):
        yield f"{path}: {value} is below {schema['minimum']}"
    if isinstance(value, list) and "items" in schema:
        for index, item in enumerate(value):
            yield from violations(item, schema["items"], f"{path}[{index}]")
    if isinstance(value, dict):
        yield from _object(value, schema, path)


def _object(value: dict[str, Any], schema: dict[str, Any], path: str) -> Iterator[str]:
    properties, others = schema.get("properties", {}), schema.get("additionalProperties")
    for key in schema.get("required", ()):
        if key not in value:
            yield f"{path}.{key} is missing"
    for key, item in value.items():
        if key in properties:
            yield from violations(item, properties[key], f"{path}.{key}")
        elif others is not None:
            yield from violations(item, others, f"{path}.{key}")
        elif properties:
            yield f"{path}.{key} is not in the schema"


def _is(value: Any, kind: str) -> bool:
    return isinstance(value, _KINDS[kind]) and (kind == "boolean" or not isinstance(value, bool))
