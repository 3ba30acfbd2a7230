"""Standard streams of ``isolator run``, left as they were found. The start counts: only what is small is imported."""

from __future__ import annotations

# What signal adds to it are the enumerations, whose classes take milliseconds to make.
import _signal as signal  # type: ignore[import-not-found]
import fcntl
import os
import termios

SILENT_ENDS = ("exit", "signal")
"""Ends of a command whose exit code says all: nothing is printed."""
_STREAMS = (0, 1, 2)


class StreamsRestored:
    """Puts back the modes of the terminals among the standard streams, and the streams' flags (O_NONBLOCK)."""

    def __enter__(self) -> None:
        self._flags = {fd: fcntl.fcntl(fd, fcntl.F_GETFL) for fd in _STREAMS}
        self._modes = {fd: termios.tcgetattr(fd) for fd in _STREAMS if os.isatty(fd)}

    def __exit__(self, *_: object) -> None:
        for fd, wanted in self._flags.items():
            fcntl.fcntl(fd, fcntl.F_SETFL, wanted)
        for fd, mode in self._modes.items():
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
        termios.tcsetattr(fd, termios.TCSANOW, mode)
    except termios.error:
        pass  # the terminal has been closed
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
