"""A TOML text with its lines, and the pieces that host.toml and the policy files have in common."""

from __future__ import annotations

import codecs
import re
import tomllib
from collections.abc import Callable, Iterable
from typing import Any

from isolator.errors import UsageError
from isolator.policy import names
from isolator.policy.keys import Key
from isolator.policy.model import EgressRule
from isolator.policy.parse.strict import Table
from isolator.policy.parse.toml_lines import parse_toml
from isolator.policy.units import parse_duration

_BARE = re.compile(rb"\s*([A-Za-z_.]+)\s*=\s*([0-9][0-9.]*\s?(?:[A-Za-z]{1,3}|%))\s*(?:#|$)")
_AT = re.compile(r" \(at (?:line (\d+), column \d+|end of document)\)$")


def document(text: bytes, source: str) -> Table:
    """The top table of a TOML text; raises UsageError with the line of a syntax error."""
    try:
        data, lines = parse_toml(text.removeprefix(codecs.BOM_UTF8).decode("utf-8"))
    except UnicodeDecodeError as error:
        line = text.count(b"\n", 0, error.start) + 1
        raise UsageError(f"{source}:{line}", "not UTF-8", "save the file as UTF-8") from None
    except tomllib.TOMLDecodeError as error:
        match = _AT.search(str(error))
        line = int(match[1]) if match and match[1] else max(1, len(text.splitlines()))
        remedy = _unquoted(text.splitlines()[line - 1]) if text else ""
        raise UsageError(f"{source}:{line}", f"not TOML: {_AT.sub('', str(error))}", remedy) from None
    except RecursionError:
        raise UsageError(source, "nested too deeply", "flatten it") from None
    return Table(data, name=source, lines=lines)


def _unquoted(line: bytes) -> str:
    """The remedy for a value with a unit that stands there without quotes, as in ``memory = 64M``."""
    match = _BARE.match(line)
    return f'quote it: {match[1].decode()} = "{match[2].decode()}"' if match else ""


def where_of(top: Table) -> dict[str, str]:
    """``FILE:LINE`` of every value of a document by its dotted key."""
    bare = Table({}, name=top.name, lines=top.lines)
    return {bare.dotted(*path): f"{top.name}:{line}" for path, line in top.lines.items()}


def egress_of(table: Table, key: str) -> tuple[tuple[EgressRule, ...] | None, bool]:
    """Rules of a list and whether it holds "public"; also plain ``key = "public"``."""
    if table.data.get(key) == "public":
        table.take(key)
        return (), True
    entries = table.strings(key, lambda text: None if text == "public" else names.parse_egress(text), limit=256)
    if entries is None:
        return None, False
    return tuple(entry for entry in entries if entry is not None), None in entries


def declared_in(tables: Iterable[Table], keys: Iterable[Key]) -> dict[str, Any]:
    """Values of the declared keys that a policy file sets in one of its tables, by name."""
    return {name: value for table in tables for name, value in table.declared(keys, lambda key: key.policy).items()}


def restart_of(table: Table) -> dict[str, Any]:
    """Fields of ``CrashPolicy`` that a ``[restart]`` table sets."""
    found: dict[str, Any] = {
        "backoff_min": table.parsed("backoff_min", duration_between(0.1, 3600), None),
        "backoff_max": table.parsed("backoff_max", duration_between(0.1, 86400), None),
        "crashes": table.integer("crashes", None, low=1, high=1000),
        "window": table.parsed("window", duration_between(1, 86400), None),
    }
    low, high = found["backoff_min"], found["backoff_max"]
    if low is not None and high is not None and low > high:
        table.fail("backoff_min", "is more than backoff_max")
    return {key: value for key, value in found.items() if value is not None}


def duration_between(low: float, high: float) -> Callable[[Any], float]:
    """A parser of durations within bounds, in seconds."""

    def check(value: Any) -> float:
        seconds = parse_duration(value)
        if not low <= seconds <= high:
            raise ValueError(f"must be {low:g} to {high:g} seconds")
        return seconds

    return check
