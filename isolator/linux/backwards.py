"""Lines of a file, the last first: whoever wants the end of a long file reads no more of it than that."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import BinaryIO

_BLOCK = 1 << 16


def reversed_lines(file: BinaryIO) -> Iterator[bytes]:
    """The whole lines of an open file, last first, without their newlines. Raises OSError."""
    position = file.seek(0, os.SEEK_END)
    rest, first = b"", True
    while position:
        step = min(_BLOCK, position)
        position -= step
        file.seek(position)
        parts = (file.read(step) + rest).split(b"\n")
        rest = parts[0]
        whole = parts[1:]
        if first and whole:
            whole, first = whole[:-1], False  # what follows the last newline is no whole line
        yield from reversed(whole)
    if rest and not first:
        yield rest
