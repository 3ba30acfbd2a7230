"""Filters on the payload of events: the dialect of CloudEvents Subscriptions, on payload fields.

    {"exact": {"project_id": "shop"}}      also prefix, suffix: every named field has that text, begins, ends so
    {"all": [F, ...]}, {"any": [F, ...]}, {"not": F}

A filter is kept as canonical JSON, one text for each. Numbers and booleans of a payload compare as their JSON text; a
field that is missing, or is a list or an object, matches no text. So every filter is decided by the payload alone, in
steps that its own size bounds.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import Any

DEPTH, PARTS, TEXT = 6, 64, 256
"""The most that a filter is deep, the texts and lists that it has, and the characters of one text."""
MOST = 16
"""Filters of one plugin."""

_TEXTS: dict[str, tuple[str, Callable[[str, str], bool]]] = {
    "exact": ("is", str.__eq__),
    "prefix": ("begins with", str.startswith),
    "suffix": ("ends with", str.endswith),
}


def parse_filter(value: Any) -> str:
    """The canonical text of a filter; raises ValueError for anything else."""
    if _check(value, DEPTH) > PARTS:
        raise ValueError(f"has more than {PARTS} parts")
    return json.dumps(value, sort_keys=True, separators=(",", ":"))


def read_filter(text: str) -> str:
    """The canonical text of a filter that somebody calls one; raises ValueError."""
    try:
        return parse_filter(json.loads(text))
    except RecursionError:
        raise ValueError("is no filter") from None


def passes(filters: tuple[str, ...], payload: Mapping[str, Any]) -> bool:
    """Whether a payload passes all of these filters."""
    return all(_holds(json.loads(text), payload) for text in filters)


def phrase(text: str) -> str:
    """A filter in words: ``project_id is "shop"``."""
    return _words(json.loads(text))


def _check(value: Any, depth: int) -> int:
    """The number of a filter's parts."""
    if not isinstance(value, dict) or len(value) != 1:
        raise ValueError('must have one key, as {"exact": {"FIELD": "TEXT"}}: exact, prefix, suffix, all, any or not')
    ((kind, inner),) = value.items()
    if depth == 0:
        raise ValueError(f"is more than {DEPTH} deep")
    if kind in _TEXTS:
        if not isinstance(inner, dict) or not inner:
            raise ValueError(f"{kind} must name a field and its text")
        for name, text in inner.items():
            if not isinstance(name, str) or not isinstance(text, str) or not name or max(len(name), len(text)) > TEXT:
                raise ValueError(f"{kind}: fields and values are texts of at most {TEXT} characters")
            if not (name + text).isprintable():
                raise ValueError(f"{kind}: has a character that cannot be shown")
        return len(inner)
    if kind == "not":
        return 1 + _check(inner, depth - 1)
    if kind in ("all", "any"):
        if not isinstance(inner, list | tuple) or not 0 < len(inner) <= PARTS:
            raise ValueError(f"{kind} must be a list of filters")
        return 1 + sum(_check(one, depth - 1) for one in inner)
    raise ValueError(f'"{str(kind)[:40]}" is none of exact, prefix, suffix, all, any, not')


def _holds(value: dict[str, Any], payload: Mapping[str, Any]) -> bool:
    ((kind, inner),) = value.items()
    if kind == "not":
        return not _holds(inner, payload)
    if kind in ("all", "any"):
        return (all if kind == "all" else any)(_holds(one, payload) for one in inner)
    matches = _TEXTS[kind][1]
    return all((found := _text(payload.get(name))) is not None and matches(found, text) for name, text in inner.items())


def _text(value: Any) -> str | None:
    if isinstance(value, str):
        return value
    return json.dumps(value) if isinstance(value, bool | int | float) else None


def _words(value: dict[str, Any]) -> str:
    ((kind, inner),) = value.items()
    if kind == "not":
        return f"not ({_words(inner)})"
    if kind in ("all", "any"):
        words = (" and " if kind == "all" else " or ").join(_words(one) for one in inner)
        return f"({words})" if len(inner) > 1 else words
    means = _TEXTS[kind][0]
    return " and ".join(f"{name} {means} {json.dumps(text, ensure_ascii=False)}" for name, text in inner.items())
