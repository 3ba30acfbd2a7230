"""How the demo speaks: plain text, 80 columns, no colour, the same on a terminal and in a log."""

from __future__ import annotations

import os
import shlex
import sys
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass

WIDTH = 78
INDENT = "  "
"""Stands before everything that a command printed, so that it can be told from what the demo says."""


@dataclass(frozen=True)
class Promise:
    """One line of the last table: what is promised, whether it held, and what shows it."""

    text: str
    held: bool
    evidence: str


def _print(text: str = "") -> None:
    try:
        print(text, flush=True)  # at once: what comes before a hang or a kill must be readable
    except BrokenPipeError:
        # The reader went away (`| head`): nothing more can be said, but everything has to be cleared away.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise KeyboardInterrupt from None


def heading(number: int, text: str) -> None:
    _print()
    _print(f"== {number}. {text} ".ljust(WIDTH, "="))


def say(text: str, indent: int = 0) -> None:
    """A paragraph."""
    prefix = " " * indent
    _print(_wrapped(" ".join(text.split()), prefix, prefix))


def blank() -> None:
    _print()


def command(argv: Sequence[str]) -> None:
    """The command that is about to run, as one would type it; JSON is broken between its fields, where it may be."""
    _print()
    line = "$"
    for word in map(shlex.quote, argv):
        if len(line) + len(word) + 1 <= WIDTH:
            line += f" {word}"
        elif word.startswith("'{"):
            first, *rest = textwrap.wrap(f"{line} {word}", WIDTH, subsequent_indent="    ", break_on_hyphens=False)
            for text in rest:
                _print(first)
                first = text
            line = first
        else:
            _print(f"{line} \\")
            line = f"    {word}"
    _print(line)


def output(text: str) -> None:
    """What a command printed, indented; a line that is too wide is wrapped, with what follows further in."""
    for line in text.rstrip().splitlines():
        start = len(line) - len(line.lstrip())
        _print(_wrapped(line, INDENT, INDENT + " " * (start + 2)) if line.strip() else "")


def _wrapped(text: str, first: str, others: str) -> str:
    if len(first) + len(text) <= WIDTH + 2:
        return (first + text).rstrip()
    return textwrap.fill(
        text, WIDTH, initial_indent=first, subsequent_indent=others, break_on_hyphens=False, replace_whitespace=False
    )


def finding(number: int, text: str, verdict: str, facts: Sequence[tuple[str, str]]) -> None:
    """One numbered line with its verdict at the right edge, and below it facts: a name, and what it rests on."""
    lines = textwrap.wrap(text, WIDTH - len(verdict) - 6)
    for at, line in enumerate(lines):
        lead = f"{number:2}. " if at == 0 else "    "
        _print(f"{lead}{line}".ljust(WIDTH - len(verdict)) + verdict if at == 0 else lead + line)
    for name, evidence in facts:
        lead = f"      {name:<16}  "
        _print(_wrapped(evidence, lead, " " * len(lead)))


def table(heads: Sequence[str], rows: Sequence[Sequence[str]], widths: Sequence[int]) -> None:
    """Columns of fixed width; cells wrap."""
    _print("  ".join(head.ljust(width) for head, width in zip(heads, widths, strict=True)).rstrip())
    _print("  ".join("-" * width for width in widths))
    for row in rows:
        cells = [
            textwrap.wrap(cell, width, break_on_hyphens=False) or [""] for cell, width in zip(row, widths, strict=True)
        ]
        for number in range(max(map(len, cells))):
            parts = [cell[number] if number < len(cell) else "" for cell in cells]
            _print("  ".join(part.ljust(width) for part, width in zip(parts, widths, strict=True)).rstrip())


def promises(found: Sequence[Promise]) -> bool:
    """Print the last table; true if all of them held."""
    rows = [(promise.text, "yes" if promise.held else "NO", promise.evidence) for promise in found]
    table(("promise", "held", "evidence"), rows, (33, 4, 38))
    broken = sum(not promise.held for promise in found)
    blank()
    _print(f"{len(found) - broken} of {len(found)} promises held" + ("." if not broken else f"; {broken} DID NOT."))
    return not broken


def fail(text: str) -> None:
    """Why the demo cannot go on: one line on stderr."""
    sys.stdout.flush()
    try:
        print(f"demo: {text}", file=sys.stderr, flush=True)
    except BrokenPipeError:  # as above; the exit code tells
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stderr.fileno())
