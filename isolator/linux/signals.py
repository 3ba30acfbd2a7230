"""Signals that a command takes for a while."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from types import FrameType

ENDING = (signal.SIGTERM, signal.SIGHUP)
_REPEAT_SECONDS = 0.05


@contextlib.contextmanager
def taken(numbers: Iterable[signal.Signals], by: Callable[[int, FrameType | None], object] | int) -> Iterator[None]:
    """Have these signals handled ``by`` this, or ignored (``SIG_IGN``); as before afterwards."""
    before = {number: signal.signal(number, by) for number in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def ending_cleanly() -> Iterator[None]:
    """Let SIGTERM and SIGHUP end this command as ^C does, whatever it waits for: what it has made is removed.

    The handler of a signal that comes just before a wait, or to another thread, runs when the wait is over. A thread
    ends the wait, by a signal that does nothing else.
    """
    begun = threading.Event()

    def end(number: int, frame: FrameType | None) -> None:
        begun.set()
        if number == signal.SIGINT:
            signal.default_int_handler(number, frame)
        sys.exit(128 + number)

    def end_waits() -> None:
        with os.fdopen(woken, "rb", buffering=0) as numbers:
            while number := numbers.read(1):
                while number[0] in ending and not begun.wait(_REPEAT_SECONDS):
                    signal.pthread_kill(main, signal.SIGURG)

    ending = ENDING if signal.getsignal(signal.SIGINT) == signal.SIG_IGN else (*ENDING, signal.SIGINT)
    main, (woken, wake) = threading.get_ident(), os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
    os.set_blocking(woken, True)
    with taken(ending, end), taken((signal.SIGURG,), lambda *_: None):
        earlier = signal.set_wakeup_fd(wake, warn_on_full_buffer=False)
        thread = threading.Thread(target=end_waits, name="ends of waits", daemon=True)
        thread.start()
        try:
            yield
        finally:
            begun.set()
            signal.set_wakeup_fd(earlier)
            os.close(wake)
            thread.join()
