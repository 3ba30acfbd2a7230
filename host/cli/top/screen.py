"""A screen that shows moments until somebody ends it, and is as it was before afterwards."""

from __future__ import annotations

import contextlib
import os
import select
import sys
import termios
import time
from collections.abc import Iterator

from rich.console import Console, ConsoleDimensions, Group, RenderableType

from host.cli.top.figures import Figures, Moment
from host.cli.top.table import BY_LETTER, drawn, head, line, notes
from isolator.errors import IsolatorError
from isolator.linux.signals import ending_cleanly

_ESCAPES = {b"\x1b[A": "k", b"\x1b[B": "j", b"\x1b[5~": "-", b"\x1b[6~": " ", b"\x1bOA": "k", b"\x1bOB": "j"}
_OTHERS = 4
"""Lines beside those: an empty one, the headings, how many more there are, the help."""
HELP = "q quit, r reverse, j/k scroll, sort by n s c m t e w l d b (isolator top --help)"


def run(console: Console, figures: Figures, sort: str, interval: float) -> None:
    """Show a moment every ``interval`` seconds until q or Ctrl-C."""
    view = _View(sort)
    with (
        ending_cleanly(),
        contextlib.suppress(KeyboardInterrupt),
        _keys() as terminal,
        console.screen(hide_cursor=True) as screen,
    ):
        while not view.ended:
            view.take(figures)
            screen.update(view.drawn(console.size))
            due = time.monotonic() + (interval if view.moment is not None else 1.0)
            while not view.ended and (left := due - time.monotonic()) > 0:
                if select.select([terminal], [], [], left)[0]:
                    keys = os.read(terminal, 64)
                    if not keys:
                        return  # the terminal is gone
                    view.press(_ESCAPES.get(keys) or keys.decode("ascii", "replace"), console.size.height)
                    screen.update(view.drawn(console.size))


class _View:
    """The view: what is shown, and in which order."""

    def __init__(self, sort: str) -> None:
        self.moment: Moment | None = None
        self.ended = False
        self._sort, self._reverse, self._first, self._problem = sort, False, 0, ""

    def take(self, figures: Figures) -> None:
        try:
            self.moment, self._problem = figures.moment(), ""
        except IsolatorError as error:  # it may be exchanged at the moment
            self._problem = str(error)

    def press(self, keys: str, height: int) -> None:
        for key in keys:
            if key in ("q", "Q", "\x03"):
                self.ended = True
            elif key == "r":
                self._reverse = not self._reverse
            elif key in "jk -":
                most = len(self.moment.plugins) - 1 if self.moment is not None else 0
                step = {"j": 1, "k": -1, " ": height // 2, "-": -height // 2}[key]
                self._first = max(0, min(most, self._first + step))
            elif key in BY_LETTER:
                self._sort, self._first = BY_LETTER[key].key, 0

    def drawn(self, size: ConsoleDimensions) -> Group:
        """The whole screen; what is below its edge is not shown."""
        parts: list[RenderableType] = [line(self._problem, "bold red")] if self._problem else []
        if self.moment is not None:
            lines = len(head(self.moment)) + len(notes(self.moment.plugins)) + len(parts) + _OTHERS
            most = max(1, size.height - lines)
            parts.append(
                drawn(self.moment, self._sort, size.width, reverse=self._reverse, first=self._first, most=most)
            )
        return Group(*parts, line(HELP, "dim"))


@contextlib.contextmanager
def _keys() -> Iterator[int]:
    """Standard input, a key at a time and without echo.

    Ctrl-C is a key, which cannot be lost in the midst of something else; Ctrl-Z and Ctrl-S would leave half a screen.
    """
    terminal = sys.stdin.fileno()
    before = termios.tcgetattr(terminal)
    now = termios.tcgetattr(terminal)
    now[0] &= ~termios.IXON
    now[3] &= ~(termios.ECHO | termios.ICANON | termios.ISIG)
    termios.tcsetattr(terminal, termios.TCSADRAIN, now)
    try:
        yield terminal
    finally:
        termios.tcsetattr(terminal, termios.TCSADRAIN, before)
