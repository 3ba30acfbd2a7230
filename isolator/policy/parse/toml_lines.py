"""The line of every key and array element of a TOML document.

``tomllib`` gives values without positions, and a policy without positions gives errors that nobody can act on. This
scanner walks a document that ``tomllib`` has already accepted, so it may rely on the syntax being right and only has
to know where keys, strings, brackets and comments begin and end. ``tests/policy`` compares both on generated documents.
"""

from __future__ import annotations

import re
import tomllib
from collections.abc import Iterator
from typing import Any

Path = tuple[str | int, ...]
MAX_DEPTH = 16
"""Levels of tables, dotted keys and arrays; nothing that is read here needs more than four."""

_KEY_PART = re.compile(r"""[ \t]*(?:"(?:[^"\\\n]|\\.)*"|'[^'\n]*'|[A-Za-z0-9_-]+)[ \t]*""")
_BLANK = re.compile(r"(?:[ \t\r\n]|#[^\n]*)*")
_STRING = re.compile(
    r'"""(?:[^\\]|\\.)*?"{3,5}(?!")|' + r"'''.*?'{3,5}(?!')|" + r'"(?:[^"\\\n]|\\.)*"|' + r"'[^'\n]*'", re.DOTALL
)
_MANY_DIGITS = re.compile(r"[0-9][0-9_]{4299,}")
_SCALAR = re.compile(r"[^,\]}#\r\n]+")


def parse_toml(text: str) -> tuple[dict[str, Any], dict[Path, int]]:
    """The document and, by path, the line of each key, table header and array element (first line is 1).

    Raises tomllib.TOMLDecodeError, whose message ends in ``(at line N, column M)``. Integers have 64 bits at most (TOML
    1.0): from some size on Python neither reads nor writes larger ones.
    """
    try:
        data = tomllib.loads(text)
    except tomllib.TOMLDecodeError:
        raise
    except ValueError:  # int() of thousands of digits
        found = _MANY_DIGITS.search(text)
        raise _too_large(text.count("\n", 0, found.start() if found else 0) + 1) from None
    lines = _Scanner(text).scan()
    for path, value in _integers(data, ()):
        if not -(1 << 63) <= value < 1 << 63:
            raise _too_large(next(lines[path[:end]] for end in range(len(path), 0, -1) if path[:end] in lines))
    return data, lines


def _too_large(line: int) -> tomllib.TOMLDecodeError:
    return tomllib.TOMLDecodeError(f"a number of more than 64 bits (at line {line}, column 1)")


def _integers(value: Any, path: Path) -> Iterator[tuple[Path, int]]:
    if isinstance(value, int):
        yield path, value
    elif isinstance(value, dict | list):
        for key, inner in value.items() if isinstance(value, dict) else enumerate(value):
            yield from _integers(inner, (*path, key))


class _Scanner:
    def __init__(self, text: str) -> None:
        self.text, self.at = text, 0
        self.lines: dict[Path, int] = {}
        self._line, self._counted = 1, 0
        self._arrays: dict[Path, int] = {}

    def scan(self) -> dict[Path, int]:
        table: Path = ()
        while self._skip_blank():
            if self._peek("["):
                table = self._header()
            else:
                self._pair(table)
        return self.lines

    def _peek(self, token: str) -> bool:
        return self.text.startswith(token, self.at)

    def _skip_blank(self) -> bool:
        match = _BLANK.match(self.text, self.at)
        assert match is not None  # the pattern matches the empty string
        self.at = match.end()
        return self.at < len(self.text)

    def _note(self, path: Path) -> None:
        if len(path) > MAX_DEPTH:
            line = self.text.count("\n", 0, self.at) + 1
            raise tomllib.TOMLDecodeError(f"nested deeper than {MAX_DEPTH} levels (at line {line}, column 1)")
        self._line += self.text.count("\n", self._counted, self.at)
        self._counted = self.at
        self.lines.setdefault(path, self._line)

    def _header(self) -> Path:
        double = self._peek("[[")
        self.at += 2 if double else 1
        start = self.at
        keys = self._key()
        if double:
            path = (*self._inside(keys[:-1]), keys[-1])
            index = self._arrays.get(path, -1) + 1
            self._arrays[path] = index
            path = (*path, index)
        else:
            path = self._inside(keys)
        end = self.at
        self.at = start
        self._note_all(path)
        self.at = end + (2 if double else 1)
        return path

    def _inside(self, keys: Path) -> Path:
        """A header path with the index of the newest element wherever it goes through an array of tables."""
        path: Path = ()
        for key in keys:
            path = (*path, key)
            if path in self._arrays:
                path = (*path, self._arrays[path])
        return path

    def _note_all(self, path: Path) -> None:
        for length in range(1, len(path) + 1):
            self._note(path[:length])

    def _key(self) -> Path:
        parts: list[str] = []
        while True:
            match = _KEY_PART.match(self.text, self.at)
            assert match is not None  # tomllib has accepted the document
            raw = match[0].strip()
            parts.append(next(iter(tomllib.loads(f"{raw} = 0"))) if raw[0] in "\"'" else raw)
            self.at = match.end()
            if not self._peek("."):
                return tuple(parts)
            self.at += 1

    def _pair(self, table: Path) -> None:
        start = self.at
        keys = self._key()
        end, self.at = self.at, start
        self._note_all(table + keys)
        self.at = end + 1  # the equals sign
        self._value(table + keys)

    def _value(self, path: Path) -> None:
        self._skip_blank()
        if self._peek("["):
            self.at += 1
            index = 0
            while self._skip_blank() and not self._peek("]"):
                self._note((*path, index))
                self._value((*path, index))
                index += 1
                self._comma()
            self.at += 1
        elif self._peek("{"):
            self.at += 1
            while self._skip_blank() and not self._peek("}"):
                self._pair(path)
                self._comma()
            self.at += 1
        else:
            match = _STRING.match(self.text, self.at) or _SCALAR.match(self.text, self.at)
            assert match is not None  # tomllib has accepted the document
            self.at = match.end()

    def _comma(self) -> None:
        self._skip_blank()
        if self._peek(","):
            self.at += 1
