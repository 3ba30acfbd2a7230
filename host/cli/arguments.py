"""Arguments that name files: config values, JSON and paths, read here and not by the daemon.

The daemon's processes cannot (and must not) read the caller's files: ``@FILE``, ``-`` and relative paths are resolved
with the caller's own rights.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any, NamedTuple

from isolator.errors import DeniedError, NotFoundError, UsageError, translated

_LIMIT = 1 << 20


def read_file(name: str) -> str:
    """Read a file as UTF-8 text, at most 1 MiB; ``-`` is standard input. Raises NotFoundError or UsageError."""
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
    with translated(UnicodeDecodeError, UsageError, name, "is not UTF-8 text"):
        return data.decode()


class Config(NamedTuple):
    """Config of a command line: the values, and the keys whose value stands on the line itself."""

    values: dict[str, str]
    literal: list[str]


def config_values(arguments: tuple[str, ...]) -> Config:
    """Read ``K=V``, ``K=@FILE`` and ``K=-``.

    The newline of a file with one line is left out: ``echo SECRET > FILE`` means no other secret than ``SECRET``.
    """
    values: dict[str, str] = {}
    literal = []
    for text in arguments:
        key, separator, value = text.partition("=")
        if not separator or not key:
            raise UsageError(f"config {text!r}", "is not KEY=VALUE", "write KEY=VALUE, KEY=@FILE or KEY=-")
        if key in values:
            raise UsageError(f"config {key}", "is given twice")
        if value == "-":
            values[key] = read_file("-").removesuffix("\n")
        elif value.startswith("@"):
            content = read_file(value[1:])
            values[key] = content.rstrip("\r\n") if content.count("\n") == 1 else content
        else:
            values[key] = value
            literal.append(key)
    return Config(values, literal)


def json_object(argument: str | None) -> dict[str, Any]:
    """Read ``JSON``, ``@FILE`` or ``-`` as an object; without an argument it is empty. Raises UsageError."""
    if argument is None:
        return {}
    from_file = argument == "-" or argument.startswith("@")
    text = read_file(argument.removeprefix("@")).removeprefix("\ufeff") if from_file else argument
    try:
        value = json.loads(text)
    except ValueError as error:
        remedy = "" if from_file else 'quote it: \'{"project_id": "p1"}\''
        raise UsageError(argument if from_file else "payload", f"is not JSON: {error}", remedy) from None
    if not isinstance(value, dict):
        raise UsageError("payload", "must be a JSON object")
    return value


def absolute(path: str) -> str:
    """Resolve a path for the daemon; its links are followed with the caller's rights. Raises NotFoundError."""
    resolved = os.path.realpath(path)
    with translated(PermissionError, DeniedError, path, "", "let this user read it, or use sudo"):
        if not Path(resolved).exists():
            raise NotFoundError(path, "no such file or folder")
    return resolved
