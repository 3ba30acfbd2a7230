"""Colours of what people read: none where ``NO_COLOR`` is set (https://no-color.org), whichever thread writes."""

from __future__ import annotations

import os

import click


def styled(text: str, fg: str | None = None, *, bold: bool = False) -> str:
    """The text in a colour, or bold; click leaves either out where no terminal shows it."""
    return text if os.environ.get("NO_COLOR") else click.style(text, fg=fg, bold=bold or None)
