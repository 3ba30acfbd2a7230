"""Arguments of a tool, made of an event's payload.

A template is JSON. In each of its texts ``{{ field }}`` stands for a field of the payload: a text that is nothing else
becomes the field's value with its type, in any other the value is written out. A field that the payload lacks is null,
or nothing in the middle of a text; in an object it is left out. Nothing is ever evaluated, and the value of a field is
no template.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

from host.wire.strict_json import dumps

_FIELD = re.compile(r"\{\{\s*([A-Za-z_][A-Za-z0-9_]{0,63})\s*\}\}")


def check(template: Any) -> None:
    """Raise ValueError for braces that are no field: a typing mistake would otherwise be sent as it stands."""
    for text in _texts(template):
        rest = _FIELD.sub("", text)
        if "{{" in rest or "}}" in rest:
            raise ValueError(f"{text[:80]!r} has braces that are no field; write {{{{ field }}}}")


def fields(template: Any) -> set[str]:
    """The names of the fields that a template uses."""
    return {name for text in _texts(template) for name in _FIELD.findall(text)}


def fill(template: Any, payload: Mapping[str, Any]) -> Any:
    """The template with the payload's values."""
    if isinstance(template, str):
        whole = _FIELD.fullmatch(template)
        if whole is not None:
            return payload.get(whole[1])
        return _FIELD.sub(lambda found: _written(payload.get(found[1])), template)
    if isinstance(template, list):
        return [fill(item, payload) for item in template]
    if isinstance(template, dict):
        return {key: fill(value, payload) for key, value in template.items() if not _is_missing(value, payload)}
    return template


def _is_missing(template: Any, payload: Mapping[str, Any]) -> bool:
    whole = _FIELD.fullmatch(template) if isinstance(template, str) else None
    return whole is not None and payload.get(whole[1]) is None


def _written(value: Any) -> str:
    return "" if value is None else value if isinstance(value, str) else dumps(value)


def _texts(template: Any) -> Iterator[str]:
    level = [template]
    while level:
        item = level.pop()
        if isinstance(item, str):
            yield item
        elif isinstance(item, dict):
            level.extend(item.values())
        elif isinstance(item, list):
            level.extend(item)
