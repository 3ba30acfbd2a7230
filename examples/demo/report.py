"""How the demo speaks: plain text, 80 columns, no colour, the same on a terminal and in a log."""

from __future__ import annotations

import shlex
import sys
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass

WIDTH = 78


@dataclass(frozen=True)
class Promise:
    """One line of the last table: what is promised, whether it held, and what shows it."""

    text: str
    held: bool
    evidence: str


def _print(text: str = "") -> None:
    print(text, flush=True)  # at once: what comes before a hang or a kill must be readable


def heading(number: int, text: str) -> None:
    _print()
    _print(f"== {number}. {text} ".ljust(WIDTH, "="))


def say(text: str, indent: int = 0) -> None:
    """A paragraph."""
    prefix = " " * indent
    _print(textwrap.fill(" ".join(text.split()), WIDTH, initial_indent=prefix, subsequent_indent=prefix))


def blank() -> None:
    _print()


def command(argv: Sequence[str]) -> None:
    """The command that is about to run, as one would type it."""
    _print()
    words, line = [shlex.quote(word) for word in argv], "$"
    for word in words:
        if len(line) + len(word) + 3 > WIDTH and line.strip() not in {"$", ""}:
            _print(line + " \\")
            line = "   "
        line += " " + word
    _print(line)


def output(text: str) -> None:
    """What a command printed, with trailing white space cut; never re-wrapped."""
    for line in text.rstrip().splitlines():
        _print(f"  {line.rstrip()}")


def table(heads: Sequence[str], rows: Sequence[Sequence[str]], widths: Sequence[int]) -> None:
    """Columns of fixed width; cells wrap."""
    _print("  ".join(head.ljust(width) for head, width in zip(heads, widths, strict=True)).rstrip())
    _print("  ".join("-" * width for width in widths))
    for row in rows:
        cells = [textwrap.wrap(cell, width) or [""] for cell, width in zip(row, widths, strict=True)]
        for number in range(max(map(len, cells))):
            parts = [cell[number] if number < len(cell) else "" for cell in cells]
            _print("  ".join(part.ljust(width) for part, width in zip(parts, widths, strict=True)).rstrip())


def promises(found: Sequence[Promise]) -> bool:
    """Print the last table; true if all of them held."""
    rows = [(promise.text, "yes" if promise.held else "NO", promise.evidence) for promise in found]
    table(("promise", "held", "evidence"), rows, (34, 4, 36))
    broken = sum(not promise.held for promise in found)
    blank()
    _print(f"{len(found) - broken} of {len(found)} promises held" + ("." if not broken else f"; {broken} DID NOT."))
    return not broken


def fail(text: str) -> None:
    """Why the demo cannot go on: one line on stderr."""
    sys.stdout.flush()
    print(f"demo: {text}", file=sys.stderr, flush=True)
