"""Examples of payloads, and limits of their fields in words, from the JSON Schemas that the daemon has of events."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from host.schemas.flat import Rule, plain
from isolator.errors import UsageError

_NUMBERS = {"integer": 1, "number": 1.5, "boolean": True, "object": {}, "array": []}


def example_of(name: str, schema: Mapping[str, Any], filled: str | None) -> dict[str, Any]:
    """A payload with every required field but ``filled``, which the host fills in.

    Raises UsageError where a schema has a pattern and no example of it.
    """
    named = schema.get("$defs", {})
    required = set(schema.get("required", ())) - {filled}
    fields = {key: plain(rule, named) for key, rule in schema["properties"].items() if key in required}
    return {key: _value(name, key, rule, named) for key, rule in fields.items()}


def limits_of(rule: Rule) -> str:
    """The limits of one field, as people read them: ``1 to 128 characters``."""
    rule, words = plain(rule, {}), []
    if length := _range(rule.get("minLength"), rule.get("maxLength")):
        words.append(f"{length} characters")
    if size := _range(rule.get("minimum"), rule.get("maximum")):
        words.append(size)
    if "pattern" in rule:
        words.append(f"like {rule['pattern']}")
    return ", ".join(words)


def _range(low: Any, high: Any) -> str:
    if low is not None and high is not None:
        return f"{low} to {high}"
    return f"at most {high}" if high is not None else f"at least {low}" if low is not None else ""


def _value(event: str, field: str, rule: Rule, named: Rule) -> Any:
    for choices in (rule.get("examples"), rule.get("enum")):
        if isinstance(choices, list) and choices:
            return choices[0]
    if "properties" in rule:
        inner = {key: plain(one, named) for key, one in rule["properties"].items() if key in rule.get("required", ())}
        return {key: _value(event, f"{field}.{key}", one, named) for key, one in inner.items()}
    if rule.get("minItems"):
        return [_value(event, f"{field}[]", plain(rule.get("items", {}), named), named)] * rule["minItems"]
    kind = rule.get("type")
    if kind in _NUMBERS:
        return max(_NUMBERS[kind], rule["minimum"]) if "minimum" in rule else _NUMBERS[kind]
    last = field.rpartition(".")[2].removesuffix("[]")
    text = f"{last.removesuffix('_id')}-1" if last.endswith("_id") else last.replace("_", "-")
    text = text[: rule.get("maxLength", 256)].ljust(rule.get("minLength", 0), "-")
    if not re.search(rule.get("pattern", ""), text):
        remedy = "add 'examples' to it in the event's schema"
        raise UsageError(f"event {event}", f"{field} has a pattern, and no example that matches it", remedy)
    return text
