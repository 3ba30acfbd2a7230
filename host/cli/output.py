"""Output of the commands: aligned text for people, JSON for programs, and a plugin's bytes only escaped."""

from __future__ import annotations

import json
import os
import shutil
import sys
import textwrap
import time
from collections.abc import Callable, Sequence
from datetime import datetime
from typing import Any, TypeVar

import click

from isolator.cli.output import print_json, styled
from isolator.errors import printable

F = TypeVar("F", bound=Callable[..., Any])
T = TypeVar("T")
_NARROWEST, _BELOW = 24, "    "
"""Columns that a table's last column has to have, and the indentation of what stands below its row instead."""


def newest(name: str, default: int | None, most: int, least: int = 1, *, shown: str | bool = True) -> Callable[[F], F]:
    """Declare the option ``-n``, which means the same with every command; its long name is ``--name``.

    ``shown``: the default as the help has it, where it is no number.
    """
    return click.option(
        "-n",
        f"--{name}",
        default=default,
        show_default=shown,
        type=click.IntRange(least, most),
        help="Only the newest N.",
    )


def show_alarms(alarms: Sequence[str]) -> None:
    """Print the daemon's alarms in red, on stderr, so that they are seen beside JSON as well."""
    for alarm in alarms:
        click.echo(styled(f"ALARM: {safe(alarm)}", "red"), err=True)


def terminal_width() -> int | None:
    """Columns of the terminal, or those of ``COLUMNS``; None where a program reads."""
    if sys.stdout.isatty() or os.environ.get("COLUMNS"):
        return shutil.get_terminal_size().columns
    return None


def paragraph(text: str, lead: str = "") -> None:
    """Print a wrapped text; lines after the first stand below the end of ``lead``."""
    width = min(terminal_width() or 80, 100)
    click.echo(_filled(text, width, lead, " " * len(lead)))


def table(headings: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
    """Print columns as wide as their longest cell; on a terminal the last one is wrapped at its edge.

    Where that leaves too little room, the columns that do not fit stand below their row, with their headings.
    """
    texts = [[safe(cell) for cell in row] for row in rows]
    widths = [max(len(line[i]) for line in (list(headings), *texts)) for i in range(len(headings))]
    columns = terminal_width() or 10_000
    ends = [sum(widths[: i + 1]) + 2 * i for i in range(len(widths))]
    beside = len(widths)
    if ends[-1] > columns and columns - (ends[-1] - widths[-1]) < _NARROWEST:
        beside = max(1, sum(end <= columns for end in ends[:-1]))
    before = ends[beside - 1] - widths[beside - 1]
    for line in (list(headings), *texts):
        text = "  ".join(cell.ljust(width) for cell, width in zip(line, widths[:beside], strict=False)).rstrip()
        if len(text) > columns:
            parts = textwrap.wrap(line[beside - 1], max(1, columns - before), break_on_hyphens=False)
            text = "\n".join((" " * before if number else text[:before]) + part for number, part in enumerate(parts))
        click.echo(text)
        if line != list(headings):
            below = [f"{name}: {cell}" for name, cell in zip(headings, line, strict=True)][beside:]
            shown = "; ".join(one for one in below if not one.endswith(": -"))
            if shown:
                click.echo(_filled(shown, columns, _BELOW, _BELOW))


def listing(
    found: Sequence[T], headings: Sequence[str], row: Callable[[T], Sequence[Any]], nothing: str, *, as_json: bool
) -> None:
    """Print what a command lists: JSON, or a table with a row for each; ``nothing``, on stderr, where that is empty."""
    if as_json:
        print_json(found)
    elif found:
        table(headings, [row(one) for one in found])
    else:
        click.echo(nothing, err=True)


def _filled(text: str, width: int, first: str, others: str) -> str:
    """The text in lines of that width; a name with a hyphen stays whole, to be copied."""
    return textwrap.fill(text, width, initial_indent=first, subsequent_indent=others, break_on_hyphens=False)


def safe(value: Any) -> str:
    """A value as text that cannot steer a terminal: characters that are not plainly visible are escaped."""
    if value is None or value == "":
        return "-"
    if isinstance(value, (list, tuple)):
        return ", ".join(safe(item) for item in value) or "-"
    return printable(str(value))


def ago(moment: float | str | None) -> str:
    """Time since a moment (Unix seconds, or an ISO time as in the trail): ``4s``, ``12m``, ``3h``, ``5d``."""
    if not moment:
        return "-"
    seconds = datetime.fromisoformat(moment).timestamp() if isinstance(moment, str) else moment
    return duration(time.time() - seconds)


def duration(seconds: float) -> str:
    """A length of time, in seconds, in its largest unit."""
    for unit, size in (("d", 86400), ("h", 3600), ("m", 60)):
        if seconds >= size:
            return f"{int(seconds // size)}{unit}"
    return f"{max(0, int(seconds))}s"


def size(count: int) -> str:
    """A number of bytes in the unit that fits: ``714 B``, ``89 KiB``, ``2.4 MiB``."""
    if count < 1 << 20:
        return f"{count} B" if count < 1024 else f"{count / 1024:.0f} KiB"
    return f"{count / (1 << 20):.1f} MiB"


def latency(microseconds: int | None) -> str:
    """A latency in the unit that fits: ``412 µs``, ``3.1 ms``, ``2.40 s``."""
    if microseconds is None:
        return "-"
    if microseconds < 1000:
        return f"{microseconds} µs"
    return f"{microseconds / 1000:.1f} ms" if microseconds < 1_000_000 else f"{microseconds / 1e6:.2f} s"


def result_in(reply: str) -> str:
    """The result of a JSON-RPC reply as JSON; any other text unchanged."""
    try:
        message = json.loads(reply)
    except ValueError:
        return reply
    return json.dumps(message["result"]) if isinstance(message, dict) and "result" in message else reply
