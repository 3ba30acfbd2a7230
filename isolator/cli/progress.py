"""Progress of what takes long: one line on a terminal's standard error, which is gone when it is over.

A thread draws it, so that it lives while the work waits for an answer, and the work only counts. Nothing is drawn in
the first second, where standard error is no terminal, or where the caller wants JSON.
"""

from __future__ import annotations

import os
import shutil
import sys
import threading
import time
from typing import Self

AFTER = 1.0
"""Seconds before the line is there."""
BEAT = 0.2
"""Seconds between two of its states."""
_BAR = 20


class Progress:
    """A context manager around the work; ``total``: how much there is to ``advance``, None where nobody knows."""

    def __init__(self, label: str, total: int | None = None, *, quiet: bool = False) -> None:
        self._label, self._total, self._done = label, total, 0
        self._over = threading.Event()
        self._thread: threading.Thread | None = None
        if not quiet and sys.stderr.isatty() and os.environ.get("TERM") not in (None, "dumb"):
            self._thread = threading.Thread(target=self._draw, name="progress", daemon=True)

    def __enter__(self) -> Self:
        if self._thread is not None:
            self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        if self._thread is not None:
            self._thread.join()

    def advance(self, more: int = 1) -> None:
        """Count what is done."""
        self._done += more

    def reach(self, done: int, total: int) -> None:
        """Take figures that somebody else has counted."""
        self._done, self._total = done, total

    def _draw(self) -> None:
        begun, wait = time.monotonic(), AFTER
        while not self._over.wait(wait):
            wait = BEAT
            line = f"{self._label}{self._part()}  {int(time.monotonic() - begun)} s"
            sys.stderr.write(f"\r{line[: shutil.get_terminal_size().columns - 1]}\x1b[K")
            sys.stderr.flush()
        if wait != AFTER:
            sys.stderr.write("\r\x1b[K")
            sys.stderr.flush()

    def _part(self) -> str:
        if not self._total:
            return ""
        part = min(1.0, self._done / self._total)
        return f"  [{'#' * round(part * _BAR):-<{_BAR}}] {part:4.0%}"
