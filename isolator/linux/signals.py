"""Signals that a command takes for a while."""

from __future__ import annotations

import contextlib
import signal
import sys
from collections.abc import Callable, Iterable, Iterator
from types import FrameType

ENDING = (signal.SIGTERM, signal.SIGHUP)


@contextlib.contextmanager
def taken(numbers: Iterable[signal.Signals], by: Callable[[int, FrameType | None], object] | int) -> Iterator[None]:
    """Have these signals handled ``by`` this, or ignored (``SIG_IGN``); as before afterwards."""
    before = {number: signal.signal(number, by) for number in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def ending_cleanly() -> contextlib.AbstractContextManager[None]:
    """Let SIGTERM and SIGHUP end this command as ^C does: what it has made is removed."""
    return taken(ENDING, lambda number, _: sys.exit(128 + number))
