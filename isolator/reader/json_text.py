"""JSON without surprises, in time that grows with its size alone.

``load_json_with_lines`` refuses everything on which two JSON readers may disagree (duplicate keys, NaN, huge numbers,
lone surrogates, bad UTF-8), because the author's linter and this daemon must see the same request. One pass over the
tokens, before the real parser, bounds depth and number of values and remembers the line of every key.
"""

from __future__ import annotations

import json
import math
import re
from typing import Any, NoReturn

from isolator.errors import UsageError
from isolator.policy.parse.strict import Path
from isolator.policy.units import shown

MAX_VALUES = 20_000
"""Values and keys of one text: each costs the processes that hold it far more than its bytes."""

_TOKEN = re.compile(r'"(?:[^"\\\n]|\\.)*"?|[{}\[\]:,]|\n|[^\s{}\[\]:,"]+')
"""A token ends where the search for it ended. An unterminated string is one too, up to the end of its line: a pattern
that demanded the closing quote would search the same text again from each further quote, in quadratic time."""


def load_json_with_lines(
    text: bytes, *, max_bytes: int = 256 * 1024, max_depth: int = 16, name: str = "plugin.json"
) -> tuple[dict[str, Any], dict[Path, int]]:
    """Parse one JSON object; returns it, and the line of every key and array element by its path.

    ``name`` is the file in errors. Raises UsageError that names the line.
    """
    if len(text) > max_bytes:
        raise UsageError(name, f"{len(text)} bytes; at most {max_bytes} are read", "make it smaller")
    try:
        source = text.decode("utf-8")
    except UnicodeDecodeError as error:
        line = text.count(b"\n", 0, error.start) + 1
        raise UsageError(f"{name}:{line}", "not UTF-8", "save the file as UTF-8") from None
    if source.startswith("\ufeff"):
        why = "not JSON: it begins with a byte order mark"
        raise UsageError(f"{name}:1", why, "save the file as UTF-8 without one")
    lines = _scan(source, max_depth, name)

    def refuse_constant(constant: str) -> NoReturn:
        raise ValueError(f"{constant} is not JSON")

    def finite(number: str) -> float:
        value = float(number)
        if not math.isfinite(value):
            raise ValueError(f"{shown(number)} is out of range")
        return value

    try:
        value = json.loads(source, parse_constant=refuse_constant, parse_float=finite)
        # A lone surrogate can be written as an escape but not as UTF-8; it would fail later, far from its cause.
        json.dumps(value, ensure_ascii=False).encode()
    except json.JSONDecodeError as error:
        raise UsageError(f"{name}:{error.lineno}", f"not JSON: {error.msg} at column {error.colno}") from None
    except UnicodeEncodeError:
        raise UsageError(name, "a string holds half of a surrogate pair") from None
    except ValueError as error:
        why = "a number is too long" if "digits" in str(error) else str(error)
        raise UsageError(f"{name}:{_line_of_number(source)}", why) from None
    if not isinstance(value, dict):
        raise UsageError(f"{name}:1", "not a JSON object", "it must start with {")
    return value, lines


def _line_of_number(source: str) -> int:
    """The line of the first number that JSON cannot hold; only called when there is one."""
    line = 1
    for token in _TOKEN.findall(source):
        if token == "\n":
            line += 1
        elif re.fullmatch(r"-?Infinity|NaN", token) or len(token) > 4000:
            return line
        elif token[0] in "-0123456789":
            try:
                if not math.isfinite(float(token)):
                    return line
            except ValueError:
                return line
    return 1


def _scan(source: str, max_depth: int, name: str) -> dict[Path, int]:
    """Walk the tokens once: bound the depth, refuse duplicate keys, note lines; syntax is the parser's business."""
    lines: dict[Path, int] = {}
    # One entry per open bracket: its path, the keys seen (None for an array), and the index or key being read.
    stack: list[tuple[Path, set[str] | None, list[str | int]]] = []
    line, previous, previous_line, values = 1, "", 1, 0

    def here() -> Path:
        return (*stack[-1][0], *stack[-1][2]) if stack else ()

    for match in _TOKEN.finditer(source):
        token = match[0]
        if token == "\n":
            line += 1
            continue
        if token not in "]},:":
            values += 1
            if values > MAX_VALUES:
                raise UsageError(f"{name}:{line}", f"more than {MAX_VALUES} keys and values", "make it smaller")
        if stack and stack[-1][1] is None and token not in "]},:":
            lines.setdefault(here(), line)
        if token in "{[":
            if len(stack) >= max_depth:
                raise UsageError(f"{name}:{line}", f"nested deeper than {max_depth} levels", "flatten it")
            stack.append((here(), set(), []) if token == "{" else (here(), None, [0]))
        elif token in "}]" and stack:
            stack.pop()
        elif token == "," and stack:
            _, keys, position = stack[-1]
            if keys is None:
                position[0] = int(position[0]) + 1
            else:
                position.clear()
        elif token == ":" and stack and previous.startswith('"'):
            path, keys, position = stack[-1]
            if keys is not None and not position:
                try:
                    key = json.loads(previous, strict=False)
                except ValueError:
                    key = previous
                if key in keys:
                    raise UsageError(f"{name}:{previous_line}", f'"{shown(key)}" is there twice', "remove one of them")
                keys.add(key)
                position.append(key)
                lines[(*path, key)] = previous_line
        previous, previous_line = token, line
    return lines
