"""JSON Schemas of shapes, as plugins' authors are shown them; each can be read as a shape again."""

from __future__ import annotations

import re
from typing import Any

from host.schemas.shape import Choice, Many, Property, Record, Scalar, Shape, Table

_OF_TYPES = {str: "string", int: "integer", bool: "boolean"}


def json_schema(shape: Record, title: str, description: str = "") -> dict[str, Any]:
    """The JSON Schema of a payload; objects in it are named in ``$defs``."""
    writer = _Writer()
    whole = writer.record(shape) | {"title": title}
    if description:
        whole["description"] = description
    if writer.named:
        whole["$defs"] = dict(sorted(writer.named.items()))
    return dict(sorted(whole.items()))


class _Writer:
    def __init__(self) -> None:
        self.named: dict[str, dict[str, Any]] = {}
        self._names: dict[int, str] = {}
        """Names by the identity of their shapes."""

    def record(self, shape: Record) -> dict[str, Any]:
        """The schema of an object, without a name for it."""
        fields = {key: self._property(key, one) for key, one in shape.fields.items()}
        required = [key for key, one in shape.fields.items() if one.required]
        found = {"additionalProperties": False, "properties": fields, "title": shape.name, "type": "object"}
        return dict(sorted(({**found, "required": required} if required else found).items()))

    def _property(self, key: str, one: Property) -> dict[str, Any]:
        rule = self._rule(one.shape)
        if not one.required:
            rule = {"anyOf": [rule, {"type": "null"}], "default": None}
        if not isinstance(one.shape, Record):
            rule["title"] = key.title().replace("_", " ").strip()
        for note, value in (("description", one.description), ("examples", one.examples)):
            if value is not None:
                rule[note] = value
        return dict(sorted(rule.items()))

    def _rule(self, shape: Shape) -> dict[str, Any]:
        match shape:
            case Record():
                return {"$ref": f"#/$defs/{self._name(shape)}"}
            case Table():
                return {"additionalProperties": self._rule(shape.value), "type": "object"}
            case Many():
                return dict(sorted({"items": self._rule(shape.item), "type": "array", **shape.limits}.items()))
            case Choice():
                return _choice(shape)
            case Scalar():
                limits = dict(shape.limits)
                if shape.kind == "object":
                    limits = {key.replace("Length", "Properties"): value for key, value in limits.items()}
                    limits["additionalProperties"] = True
                if shape.examples:
                    limits["examples"] = list(shape.examples)
                return dict(sorted({**limits, "type": shape.kind}.items()))

    def _name(self, shape: Record) -> str:
        if id(shape) not in self._names:
            name = plain = re.sub(r"[^a-zA-Z0-9.\-_]", "_", shape.name).replace(".", "__")
            while name in self.named:
                name = f"{plain}__{len(self.named)}"
            self._names[id(shape)] = name
            self.named[name] = {}  # its place, before those of what is in it
            self.named[name] = self.record(shape)
        return self._names[id(shape)]


def _choice(shape: Choice) -> dict[str, Any]:
    kinds = {type(one) for one in shape.values}
    rule: dict[str, Any] = {"enum": list(shape.values)} if len(shape.values) > 1 else {"const": shape.values[0]}
    return rule if len(kinds) > 1 else {**rule, "type": _OF_TYPES[kinds.pop()]}
