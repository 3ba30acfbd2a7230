"""The caller's terminal: it is left as it was found, whatever the command in the cage does to it."""

from __future__ import annotations

import contextlib
import fcntl
import os
import signal
import termios
from collections.abc import Iterator

_STREAMS = (0, 1, 2)


@contextlib.contextmanager
def streams_restored() -> Iterator[None]:
    """Put back the modes of the terminals among the standard streams, and the streams' flags (O_NONBLOCK)."""
    flags = {fd: fcntl.fcntl(fd, fcntl.F_GETFL) for fd in _STREAMS}
    modes = {fd: termios.tcgetattr(fd) for fd in _STREAMS if os.isatty(fd)}
    try:
        yield
    finally:
        for fd, wanted in flags.items():
            fcntl.fcntl(fd, fcntl.F_SETFL, wanted)
        for fd, mode in modes.items():
            if _is_foreground(fd):
                _set_mode(fd, mode)


def _is_foreground(fd: int) -> bool:
    """Whether the terminal is this process's to change: a shell has taken it back from a job in the background."""
    try:
        return os.tcgetpgrp(fd) == os.getpgrp()
    except OSError:  # not the controlling terminal: there is no job control on it
        return True


def _set_mode(fd: int, mode: list[int | list[bytes | int]]) -> None:
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTTOU})  # between the check and here things may change
    try:
        with contextlib.suppress(termios.error):  # the terminal has been closed
            termios.tcsetattr(fd, termios.TCSANOW, mode)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
