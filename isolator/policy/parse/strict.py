"""Strict reading of files: tables without unknown keys.

``Table`` hands out the values of one object of JSON or TOML, each checked for its type; ``finish`` refuses every key
that nobody read, with "did you mean". Every error is a ``UsageError`` that names file, line and the path of the key
(``sandbox.network.egres``).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from types import MappingProxyType
from typing import Any, NoReturn, TypeVar

from isolator.errors import UsageError, nearest
from isolator.policy.keys import Key
from isolator.policy.units import parse_boolean, shown

T = TypeVar("T")
Path = tuple[str | int, ...]
Lines = Mapping[Path, int]
_MOST_FAULTS = 50


class KeyFault(UsageError):
    """A fault of one key; ``path`` leads to it."""

    path: Path = ()


def every_fault(
    read: Callable[[dict[str, Any]], object], data: dict[str, Any], required: Mapping[str, Any] = MappingProxyType({})
) -> list[UsageError]:
    """Read a file's content again and again, each time without the key that was refused; returns every refusal.

    Of a list the first only: the lines of those behind it would be wrong. ``data`` is changed. ``required``: good
    values of the keys that must not be missing.
    """
    found: list[UsageError] = []
    while len(found) < _MOST_FAULTS:
        try:
            read(data)
            break
        except KeyFault as error:
            found.append(error)
            if not (_without(data, error.path) | _stood_in_for(data, error.path, required)):
                break
        except UsageError as error:
            found.append(error)
            break
    return found


def _stood_in_for(data: dict[str, Any], path: Path, required: Mapping[str, Any]) -> bool:
    """Put a good value in the place of a required key that is missing now; whether it was one."""
    key = str(path[0]) if path else ""
    if key not in required or key in data:
        return False
    data[key] = required[key]
    return True


def _without(data: dict[str, Any], path: Path) -> bool:
    """Delete the value at a path, or the list that it is in; whether there was one."""
    here: Any = data
    for index, part in enumerate(path):
        if not isinstance(here, dict) or part not in here:
            return False
        if index == len(path) - 1 or isinstance(here[part], list):
            del here[part]
            return True
        here = here[part]
    return False


class Table:
    """One JSON object or TOML table, read key by key. ``fail`` makes every error, with the file and line of its key."""

    def __init__(self, data: Mapping[str, Any], *, name: str, lines: Lines, path: Path = ()) -> None:
        self.data, self.name, self.lines, self.path = data, name, lines, path
        self._taken: set[str] = set()
        self._inner: list[Table] = []

    def __contains__(self, key: str) -> bool:
        """Whether the key is there; it counts as known from now on."""
        self._taken.add(key)
        return key in self.data

    def where(self, *key: str | int) -> str:
        """``FILE:LINE`` of a key of this table, or of the nearest thing around it that has a line."""
        path: Path = (*self.path, *key)
        while path and path not in self.lines:
            path = path[:-1]
        return f"{self.name}:{self.lines[path]}" if path in self.lines else self.name

    def dotted(self, *key: str | int) -> str:
        """The path of a key as people write it: ``sandbox.network.egress[0].host``."""
        text = ""
        for part in (*self.path, *key):
            text += f"[{part}]" if isinstance(part, int) else f".{shown(part)}" if text else shown(part)
        return text

    def fail(self, key: Path | str, why: str, remedy: str = "") -> NoReturn:
        """Refuse the value of ``key``."""
        path = (key,) if isinstance(key, str) else key
        fault = KeyFault(self.where(*path), f"{self.dotted(*path)}: {why}", remedy)
        fault.path = (*self.path, *path)
        raise fault

    def take(self, key: str, default: Any = None) -> Any:
        """The raw value; the key counts as known from now on."""
        self._taken.add(key)
        return self.data.get(key, default)

    def parsed(self, key: str, parser: Callable[[Any], T], default: T) -> T:
        """The value after ``parser``, whose ValueError becomes an error of this key; ``default`` when absent."""
        value = self.take(key)
        if key not in self.data:
            return default
        return self._parse(parser, value, key)

    def _parse(self, parser: Callable[[Any], T], value: Any, *key: str | int) -> T:
        try:
            return parser(value)
        except ValueError as error:
            self.fail(key, str(error))

    def text(self, key: str, default: str | None = None, *, limit: int = 256) -> str:
        """A printable string; required when there is no default."""
        if key not in self.data:
            self._taken.add(key)
            if default is None:
                where = self.where(*self.path) if self.path else self.name
                fault = KeyFault(where, f"{self.dotted(key)} is missing", "add it")
                fault.path = (*self.path, key)
                raise fault
            return default
        return self.parsed(key, lambda value: printable(value, limit), "")

    def integer(self, key: str, default: T, *, low: int = 0, high: int = 2**31 - 1) -> int | T:
        """A whole number within bounds."""

        def check(value: Any) -> int:
            if not isinstance(value, int) or isinstance(value, bool):
                raise ValueError("must be a whole number")
            if not low <= value <= high:
                raise ValueError(f"{shown(str(value))} is negative" if value < 0 <= low else f"must be {low} to {high}")
            return value

        return self.parsed(key, check, default)  # type: ignore[arg-type]  # mypy joins int and T to object

    def boolean(self, key: str, default: T) -> bool | T:
        """True or false."""
        return self.parsed(key, parse_boolean, default)  # type: ignore[arg-type]  # mypy joins bool and T to object

    def declared(self, keys: Iterable[Key], place: Callable[[Key], str]) -> dict[str, Any]:
        """The declared keys that this table sets, by name; ``place``: the dotted key in a file of this kind, or ""."""
        table, found = ".".join(map(str, self.path)), {}
        for declared in keys:
            section, _, key = place(declared).rpartition(".")
            if key and section == table:
                value = self.parsed(key, declared.check, None)
                if value is not None:
                    found[declared.name] = value
        return found

    def items(self, key: str, parser: Callable[[Any], T], *, limit: int = 64) -> tuple[T, ...] | None:
        """A list, each element parsed; None when the key is absent."""
        value = self.take(key)
        if key not in self.data:
            return None
        if not isinstance(value, list):
            self.fail(key, "must be a list", f"write {shown(key)} = [...]" if self.name.endswith(".toml") else "")
        if len(value) > limit:
            self.fail(key, f"{len(value)} entries; at most {limit}")
        return tuple(self._parse(parser, item, key, index) for index, item in enumerate(value))

    def strings(self, key: str, parser: Callable[[str], T], *, limit: int = 64) -> tuple[T, ...] | None:
        """A list of strings, each parsed; None when the key is absent."""
        return self.items(key, lambda value: parser(printable(value, 1024)), limit=limit)

    def choice(self, key: str, choices: tuple[str, ...], default: T) -> str | T:
        """One of a few texts."""

        def check(value: Any) -> str:
            if value not in choices:
                raise ValueError("must be " + " or ".join(f'"{c}"' for c in choices))
            return str(value)

        return self.parsed(key, check, default)  # type: ignore[arg-type]  # mypy joins str and T to object

    def table(self, key: str) -> Table:
        """A nested table; empty when absent."""
        value = self.take(key)
        if key not in self.data:
            value = {}
        elif not isinstance(value, dict):
            self.fail(key, "must be a table" if self.name.endswith(".toml") else "must be an object")
        return self._nested(value, key)

    def _nested(self, value: Mapping[str, Any], *key: str | int) -> Table:
        inner = Table(value, name=self.name, lines=self.lines, path=(*self.path, *key))
        self._inner.append(inner)
        return inner

    def tables(
        self, key: str, plain: Callable[[Any], T], of_table: Callable[[Table], T], *, limit: int = 64
    ) -> tuple[T, ...] | None:
        """A list, its objects read by ``of_table`` and its other elements parsed by ``plain``; None when absent."""
        items: tuple[Any, ...] | None = self.items(key, lambda item: item, limit=limit)
        if items is None:
            return None
        return tuple(
            of_table(self._nested(item, key, index)) if isinstance(item, dict) else self._parse(plain, item, key, index)
            for index, item in enumerate(items)
        )

    def finish(self) -> None:
        """Refuse every key that nobody took, of inner tables too: no typo in a security setting passes in silence."""
        for inner in self._inner:
            inner.finish()
        for key in self.data:
            if key not in self._taken:
                self.fail(key, "unknown key", did_you_mean(key, self._taken))

    @property
    def known(self) -> frozenset[str]:
        """The keys that somebody took."""
        return frozenset(self._taken)

    def unknown(self) -> tuple[str, ...]:
        """The keys that nobody took, where they are worth no more than a warning."""
        return tuple(key for key in self.data if key not in self._taken)


def did_you_mean(key: str, known: set[str] | frozenset[str] | tuple[str, ...]) -> str:
    """``did you mean "egress"?``, or the known keys when none is near."""
    if near := nearest(key.lower(), sorted(known)):
        return f'did you mean "{near}"?'
    return "known here: " + ", ".join(sorted(known)) if known else "nothing is expected here"


def printable(value: object, limit: int) -> str:
    """Text that is safe on an operator's terminal: no control or direction-changing characters, bounded."""
    if not isinstance(value, str):
        raise ValueError("must be text")
    if len(value) > limit:
        raise ValueError(f"{len(value)} characters; at most {limit}")
    if not value.isprintable():
        raise ValueError("holds control or invisible characters")
    return value


def prose(value: object) -> str:
    """A sentence meant for people: what is not printable becomes a space, and the length is cut at 400.

    A line break in a description is no reason to refuse a plugin, but an escape sequence must not reach a terminal.
    """
    if not isinstance(value, str):
        raise ValueError("must be text")
    return " ".join("".join(c if c.isprintable() else " " for c in value).split())[:400]
