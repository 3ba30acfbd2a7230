"""What a caller gives on the command line: config values and JSON, read here and not by the daemon.

The daemon's processes cannot (and must not) read the caller's files: ``@FILE``, ``-`` and relative paths are resolved
with the caller's own rights.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

from isolator.errors import NotFoundError, UsageError

_LIMIT = 1 << 20


def read_file(name: str) -> str:
    """The text of ``@NAME``; ``-`` is standard input."""
    try:
        if name == "-":
            data = sys.stdin.buffer.read(_LIMIT + 1)
        else:
            with Path(name).open("rb") as file:
                data = file.read(_LIMIT + 1)
    except FileNotFoundError:
        raise NotFoundError(name, "no such file") from None
    except OSError as error:
        raise UsageError(name, f"cannot be read: {error.strerror}") from None
    if len(data) > _LIMIT:
        raise UsageError(name, f"is larger than {_LIMIT} bytes")
    try:
        return data.decode()
    except UnicodeDecodeError:
        raise UsageError(name, "is not UTF-8 text") from None


def config_values(given: tuple[str, ...]) -> tuple[dict[str, str], list[str]]:
    """``K=V``, ``K=@FILE``, ``K=-`` as values, and the keys whose value stood on the command line itself."""
    values: dict[str, str] = {}
    spelled_out = []
    for text in given:
        key, separator, value = text.partition("=")
        if not separator or not key:
            raise UsageError(f"config {text!r}", "is not KEY=VALUE", "write KEY=VALUE, KEY=@FILE or KEY=-")
        if key in values:
            raise UsageError(f"config {key}", "is given twice")
        if value == "-":
            values[key] = read_file("-").removesuffix("\n")
        elif value.startswith("@"):
            values[key] = read_file(value[1:])
        else:
            values[key] = value
            spelled_out.append(key)
    return values, spelled_out


def json_object(given: str | None) -> dict[str, Any]:
    """``JSON``, ``@FILE`` or ``-`` as an object; nothing is an empty one."""
    if given is None:
        return {}
    text = read_file("-") if given == "-" else read_file(given[1:]) if given.startswith("@") else given
    try:
        value = json.loads(text)
    except ValueError as error:
        raise UsageError("payload", f"is not JSON: {error}", 'quote it: \'{"project_id": "p1"}\'') from None
    if not isinstance(value, dict):
        raise UsageError("payload", "must be a JSON object")
    return value


def absolute(path: str) -> str:
    """A path of the caller's as the daemon can use it; the links in it are the caller's to follow."""
    resolved = os.path.realpath(path)
    if not Path(resolved).exists():
        raise NotFoundError(path, "no such file or folder")
    return resolved
