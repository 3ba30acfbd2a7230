"""How the commands print: aligned text for people, JSON for programs, and nothing a plugin wrote unescaped."""

from __future__ import annotations

import json
import shutil
import sys
import time
from collections.abc import Sequence
from typing import Any

import click

AS_JSON = click.option("--json", "as_json", is_flag=True, help="JSON instead of text.")
SETTINGS = {"help_option_names": ["-h", "--help"], "max_content_width": 80}


def print_json(value: Any) -> None:
    """One indented JSON document."""
    click.echo(json.dumps(value, indent=2))


def table(headings: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
    """Columns as wide as their longest cell; the last one is cut at the terminal's edge."""
    texts = [[safe(cell) for cell in row] for row in rows]
    widths = [max(len(line[i]) for line in (list(headings), *texts)) for i in range(len(headings))]
    room = shutil.get_terminal_size((200, 24)).columns if sys.stdout.isatty() else 10_000
    for line in (list(headings), *texts):
        text = "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
        click.echo(text if len(text) <= room else text[: room - 1] + "…")


def safe(value: Any) -> str:
    """A value as text that cannot steer a terminal: control and direction-changing characters are escaped."""
    if value is None or value == "":
        return "-"
    if isinstance(value, (list, tuple)):
        return ", ".join(safe(item) for item in value) or "-"
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in str(value))


def ago(seconds: float | None) -> str:
    """How long a moment (Unix seconds) is past: ``4s``, ``12m``, ``3h``, ``5d``."""
    if not seconds:
        return "-"
    return duration(time.time() - seconds)


def duration(seconds: float) -> str:
    """A length of time in its largest unit."""
    for unit, size in (("d", 86400), ("h", 3600), ("m", 60)):
        if seconds >= size:
            return f"{int(seconds // size)}{unit}"
    return f"{max(0, int(seconds))}s"


def latency(microseconds: int | None) -> str:
    """``412 µs``, ``3.1 ms``, ``2.40 s``."""
    if microseconds is None:
        return "-"
    if microseconds < 1000:
        return f"{microseconds} µs"
    return f"{microseconds / 1000:.1f} ms" if microseconds < 1_000_000 else f"{microseconds / 1e6:.2f} s"
