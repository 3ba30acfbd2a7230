"""The table of record types in docs/audit.md, and a JSON Schema (draft 2020-12) of each in docs/schemas/."""

from __future__ import annotations

import ast
import inspect
import json
import types
import typing
from collections.abc import Iterator
from typing import Any

from isolator.audit.schema import RECORDS, Field, RecordData

FOLDER = "docs/schemas"
_HASH = {"type": "string", "pattern": "^[0-9a-f]{64}$"}
_TEXT_OR_NULL = {"type": ["string", "null"]}


def types_table() -> str:
    """One row for each record type: who writes it, its meaning, and the fields of its ``data``."""
    rows = ["| type | from | meaning | `data` |", "|---|---|---|---|"]
    for type, kind in RECORDS.items():
        names = [f"`{field.name}`" if field.required else f"[`{field.name}`]" for _, field in fields(kind)]
        meaning = " ".join(_docs(kind)[""].replace("``", "`").split())
        if kind.SUMMED is not None:
            meaning += f" Summed up beyond the budget: {kind.SUMMED.which}."
        rows.append(f"| [{type}](schemas/{type}.json) | {', '.join(kind.SOURCES)} | {meaning} | {', '.join(names)} |")
    return "\n".join(rows)


def json_schema(type: str) -> str:
    """The JSON Schema of one record type, as the text of its file."""
    kind = RECORDS[type]
    hints = typing.get_type_hints(kind)
    data: dict[str, Any] = {}
    for attribute, field in fields(kind):
        data[field.name] = _described(_schema_of(hints[attribute]), _docs(kind).get(attribute, ""))
    if kind.CAUSED:
        ids = {"type": "array", "items": {"type": "string"}}
        why = "Events in flight, one of which caused it, when there were several; then event_id is null."
        data |= {"event_ids": {**ids, "description": why}, "delivery_ids": {"type": "array", "items": _TEXT_OR_NULL}}
    record = {
        "seq": {"type": "integer", "minimum": 1},
        "time": {"type": "string", "format": "date-time"},
        "type": {"const": type},
        "origin": {"type": "string", "pattern": f"^({'|'.join(kind.SOURCES)})(:|$)"},
        "plugin": _TEXT_OR_NULL,
        "run": _TEXT_OR_NULL,
        "event_id": _TEXT_OR_NULL,
        "delivery_id": _TEXT_OR_NULL,
        "data": {
            "type": "object",
            "properties": data,
            "required": [field.name for _, field in fields(kind) if field.required],
        },
        "cut": {"type": "object", "description": "By path, full length and SHA-256 of a string that was cut."},
        "prev": _HASH,
        "hash": _HASH,
    }
    text = {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": type,
        "description": _plain(_docs(kind)[""]),
        "type": "object",
        "properties": record,
        "required": [name for name in record if name != "cut"],
    }
    return json.dumps(text, indent=1, ensure_ascii=False) + "\n"


def fields(kind: type[RecordData]) -> Iterator[tuple[str, Field]]:
    """The fields of a record type by attribute, the required ones first, in the order of their declaration."""
    found = [
        (name, vars(base)[name])
        for base in kind.__mro__
        for name in inspect.get_annotations(base)
        if isinstance(vars(base).get(name), Field)
    ]
    return iter(sorted(found, key=lambda pair: not pair[1].required))


def _docs(kind: type[RecordData]) -> dict[str, str]:
    """The docstrings of a record type's fields by attribute; its own under the empty name."""
    found = {"": inspect.getdoc(kind) or ""}
    for base in kind.__mro__:
        if base in (RecordData, object):
            continue
        (definition,) = ast.parse(inspect.getsource(base)).body
        assert isinstance(definition, ast.ClassDef)
        for declared, text in zip(definition.body, definition.body[1:], strict=False):
            if isinstance(declared, ast.AnnAssign) and isinstance(declared.target, ast.Name):
                match text:
                    case ast.Expr(ast.Constant(str(doc))):
                        found.setdefault(declared.target.id, inspect.cleandoc(doc))
    return found


def _schema_of(hint: Any) -> dict[str, Any]:
    origin, inner = typing.get_origin(hint), typing.get_args(hint)
    simple = {str: "string", int: "integer", float: "number", bool: "boolean", types.NoneType: "null"}
    if hint is Any:
        return {}
    if hint in simple:
        return {"type": simple[hint]}
    if origin is typing.Literal:
        return {"enum": list(inner)} if len(inner) > 1 else {"const": inner[0]}
    if origin is list:
        return {"type": "array", "items": _schema_of(inner[0])}
    if origin is dict:
        return {"type": "object", "additionalProperties": _schema_of(inner[1])}
    if origin is types.UnionType:
        return {"type": [simple[kind] for kind in inner]}
    raise TypeError(f"no JSON Schema is known for {hint}")


def _described(value: dict[str, Any], text: str) -> dict[str, Any]:
    return {**value, "description": _plain(text)} if text else value


def _plain(text: str) -> str:
    return " ".join(text.replace("``", "").split())
