"""A terminal's text as a picture (SVG), and the text of such a picture."""

from __future__ import annotations

import html
import re
from collections.abc import Sequence

_COLUMN, _LINE, _MARGIN = 7.2, 16, 12
"""Pixels of a character, of a line, and around all."""


def svg(lines: Sequence[str]) -> str:
    """Draw lines as a terminal shows them; commands stand out."""
    width = round(max(map(len, lines)) * _COLUMN) + 2 * _MARGIN
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{len(lines) * _LINE + 2 * _MARGIN}"'
        ' font-family="DejaVu Sans Mono, Menlo, Consolas, monospace" font-size="12" fill="#d8dee9">',
        '<rect width="100%" height="100%" rx="6" fill="#20242c"/>',
    ]
    for number, line in enumerate(lines, 1):
        bright = ' fill="#a3be8c"' if line.startswith("$") else ""
        text = html.escape(line, quote=False)
        at = _MARGIN + number * _LINE - 4
        parts.append(f'<text x="{_MARGIN}" y="{at}"{bright} xml:space="preserve">{text}</text>')
    return "\n".join([*parts, "</svg>\n"])


def lines_of(picture: str) -> list[str]:
    """The lines of a picture that ``svg`` has drawn."""
    return [html.unescape(text) for text in re.findall(r"<text [^>]*>(.*?)</text>", picture)]
