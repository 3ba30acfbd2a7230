"""Strict JSON: parsing the bytes of untrusted peers, and writing JSON that they can read.

``parse`` accepts exactly one JSON value of bounded depth, in valid UTF-8, without NaN or infinities; everything
else is a ``WireError`` whose text is safe to show. Two things that common writers write although no standard has them
are read all the same: a byte order mark at the beginning (.NET), and the escape of half a surrogate pair (Node and
Python, of a text that was cut in the middle of an emoji), which is read as U+FFFD.
"""

from __future__ import annotations

import json
import math
import re
from typing import Any

from isolator.base import core

MAX_DEPTH = 64

MAX_VALUES = 100_000
"""Most values of one message: more take so long to read that others would notice. Counted as commas and brackets."""

_SHAPE = bytes(48 if 48 <= c <= 57 else 101 if c in b"eE" else 32 for c in range(256))
"""Every digit as 0, every E as e, and no plus: a number that may be huge is found at the speed of memory.

Only exponents of three digits and runs of 200 can overflow to infinity, which the JSON reader itself lets pass: fewer
digits with a shorter exponent are below 1e299.
"""

_NO_MARKS = bytes(c for c in range(256) if c not in b"[{,")
"""The number of these marks bounds that of a text's values: the text without all other bytes, in one pass."""
_SHORT_TEXT = 4096
"""Bytes below which it is quicker to count in the text itself."""
_BYTE_ORDER_MARK = b"\xef\xbb\xbf"
_HIGH, _LOW = rb"\\u[dD][89abAB][0-9a-fA-F]{2}", rb"\\u[dD][c-fC-F][0-9a-fA-F]{2}"
_HALF_PAIR = re.compile(rb"%b(?!%b)|(?<!%b)%b" % (_HIGH, _LOW, _HIGH, _LOW))


class WireError(ValueError):
    """Bytes that the protocol does not allow; ``code`` is the JSON-RPC error code."""

    def __init__(self, why: str, code: int = -32700) -> None:
        super().__init__(why)
        self.code = code


def parse(data: bytes, *, max_depth: int = MAX_DEPTH) -> Any:
    """Parse one JSON value; raises WireError."""
    marks = data if len(data) < _SHORT_TEXT else data.translate(None, _NO_MARKS)
    if len(marks) > MAX_VALUES:
        raise WireError(f"more than {MAX_VALUES} values", -32600)
    brackets = marks.count(b"[") + marks.count(b"{")
    try:
        value = core.from_json(data, allow_inf_nan=False)
    except ValueError as error:
        value = _from_common_writer(data, error)
    # Each level needs an opening bracket, so few brackets prove the depth without walking the value.
    if brackets > max_depth and _deeper(value, max_depth):
        raise WireError(f"nested deeper than {max_depth} levels")
    shape = data.translate(_SHAPE, b"+")
    # From its end a text is searched by the needle's first byte, which few texts have as often as they have digits.
    # Not ``in``: it takes the needle for a number first, and makes an error of it, which takes longer than the search.
    if (shape.rfind(b"e000") >= 0 or shape.find(b"0" * 200) >= 0) and _infinite(value):
        raise WireError("a number is too large")
    return value


def parse_object(data: bytes, *, max_depth: int = MAX_DEPTH) -> dict[str, Any]:
    """Parse one JSON object; raises WireError."""
    value = parse(data, max_depth=max_depth)
    if not isinstance(value, dict):
        raise WireError("not a JSON object", -32600)
    return value


def dumps(value: Any) -> str:
    """Encode as compact JSON."""
    return encode(value).decode()


def line(value: Any) -> bytes:
    """Encode as a JSON line, newline included."""
    return encode(value) + b"\n"


def encode(value: Any) -> bytes:
    """Encode as compact JSON in UTF-8."""
    try:
        return core.to_json(value)
    except core.PydanticSerializationError:
        # Half a surrogate pair, as file names may hold: escaped, so that the text is valid UTF-8.
        return json.dumps(value, separators=(",", ":"), allow_nan=False).encode()


def _from_common_writer(data: bytes, error: ValueError) -> Any:
    """Parse what is JSON but for a byte order mark and half surrogate pairs; raises WireError."""
    text = data.removeprefix(_BYTE_ORDER_MARK)
    if b"\\ud" in text or b"\\uD" in text:
        # Between two escaped backslashes each backslash begins an escape.
        text = b"\\\\".join(_HALF_PAIR.sub(rb"\\ufffd", piece) for piece in text.split(b"\\\\"))
    if text != data:
        try:
            return core.from_json(text, allow_inf_nan=False)
        except ValueError as still:
            error = still
    raise WireError(f"not valid JSON: {_short(str(error))}") from None


def _deeper(value: Any, depth: int) -> bool:
    level = [value]
    for _ in range(depth):
        following: list[Any] = []
        for item in level:
            if isinstance(item, dict):
                following.extend(item.values())
            elif isinstance(item, list):
                following.extend(item)
        if not following:
            return False
        level = following
    return any(isinstance(item, (dict, list)) for item in level)


def _infinite(value: Any) -> bool:
    if isinstance(value, dict):
        return any(_infinite(item) for item in value.values())
    if isinstance(value, list):
        return any(_infinite(item) for item in value)
    return isinstance(value, float) and math.isinf(value)


def _short(text: str) -> str:
    return text if len(text) <= 160 else text[:157] + "..."
