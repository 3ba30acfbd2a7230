"""Fields of a published schema in one list, those of nested objects too, for people."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

Rule = Mapping[str, Any]


def fields(schema: Rule) -> Iterator[tuple[str, Rule, bool]]:
    """Yield each field with its rule and whether it is required: ``items``, ``items[].sku``, ``notes.*.sku``.

    References and null are resolved in the rules. For schemas that the daemon has made, which have an end.
    """
    yield from _fields(schema, schema.get("$defs", {}), "")


def _fields(rule: Rule, named: Rule, above: str) -> Iterator[tuple[str, Rule, bool]]:
    for key, inner in rule["properties"].items():
        path, found = f"{above}{key}", plain(inner, named)
        yield path, found, key in rule.get("required", ())
        while True:
            if "items" in found:
                path, found = f"{path}[]", plain(found["items"], named)
            elif isinstance(found.get("additionalProperties"), dict):
                path, found = f"{path}.*", plain(found["additionalProperties"], named)
            else:
                break
        if "properties" in found:
            yield from _fields(found, named, f"{path}.")


def plain(rule: Rule, named: Rule) -> Rule:
    """The rule of a field without the null that it may also be, and with what it refers to by name."""
    while True:
        options = [option for option in rule.get("anyOf", ()) if option.get("type") != "null"]
        if options:
            rule = {**{key: value for key, value in rule.items() if key != "anyOf"}, **options[0]}
        elif "$ref" in rule:
            rule = {**named[rule["$ref"].rpartition("/")[2]], **{k: v for k, v in rule.items() if k != "$ref"}}
        else:
            return rule
