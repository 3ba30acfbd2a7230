"""``isolator run`` as a child of this process: its output, within bounds of size and time."""

from __future__ import annotations

import contextlib
import io
import os
import select
import signal
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import IO

from isolator.errors import IsolatorError
from isolator.linux.descriptors import owning
from isolator.standalone.options import RunOptions

_TAIL = 16 << 10
"""Bytes of standard error that are kept."""
GRACE = 5.0
"""Seconds for it to end by itself: after its last output, and after SIGTERM."""


class TooMuchError(IsolatorError):
    """The command writes more, or takes longer, than it may."""


class _Output(io.RawIOBase):
    def __init__(self, fd: int, most: int, end: float) -> None:
        self._fd, self._left, self._end = fd, most, end

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: object) -> int:
        view = memoryview(buffer)  # type: ignore[arg-type]
        if not select.select([self._fd], [], [], max(0.0, self._end - time.monotonic()))[0]:
            raise TooMuchError("the cage", "is not done in the time that it has")
        data = os.read(self._fd, len(view))
        self._left -= len(data)
        if self._left < 0:
            raise TooMuchError("the cage", "has written more than it may")
        view[: len(data)] = data
        return len(data)


@dataclass
class Caged:
    """A command in its cage."""

    stdin: IO[bytes]
    stdout: IO[bytes]
    _pid: int
    _reader: threading.Thread
    _errors: list[bytes]
    _code: int = 0

    def end(self, patience: float = 0.0) -> tuple[int, list[str]]:
        """End it, unless it does so within ``patience`` seconds, and with it everything in the cage.

        Returns the exit code and the last lines of its standard error.
        """
        for seconds, number in ((patience, signal.SIGTERM), (GRACE, signal.SIGKILL)):
            if self._pid and not self._ends_in(seconds):
                os.kill(self._pid, number)  # after the first it removes what it has made
        if self._pid:
            self._code = os.waitstatus_to_exitcode(os.waitpid(self._pid, 0)[1])
            self._pid = 0
        self._reader.join(GRACE)
        return self._code, b"".join(self._errors)[-_TAIL:].decode("utf-8", "replace").splitlines()

    def _ends_in(self, seconds: float) -> bool:
        with owning(os.pidfd_open(self._pid)) as pidfd:
            return bool(select.select([pidfd], [], [], seconds)[0])


@contextlib.contextmanager
def caged(options: RunOptions, *, most: int, seconds: float) -> Iterator[Caged]:
    """Start it; whatever is left of it at the end is killed.

    Reading its output raises TooMuchError after ``most`` bytes and after ``seconds``.
    """
    (its_stdin, stdin), (stdout, its_stdout), (stderr, its_stderr) = (os.pipe() for _ in range(3))
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    pid = os.fork()
    if pid == 0:
        try:
            for number, fd in enumerate((its_stdin, its_stdout, its_stderr)):
                os.dup2(fd, number)
            os.closerange(3, 1024)
            from isolator.standalone.command import run_and_exit

            run_and_exit(options)
        finally:
            os._exit(125)
    for fd in (its_stdin, its_stdout, its_stderr):
        os.close(fd)
    errors: list[bytes] = []
    reader = threading.Thread(target=_collect, args=(stderr, errors), daemon=True)
    reader.start()
    output = io.BufferedReader(_Output(stdout, most, time.monotonic() + seconds), 1 << 16)
    running = Caged(os.fdopen(stdin, "wb", 0), output, pid, reader, errors)
    try:
        yield running
    finally:
        running.end()
        running.stdin.close()
        os.close(stdout)


def _collect(fd: int, kept: list[bytes]) -> None:
    """Keep the last of what comes."""
    with os.fdopen(fd, "rb", 0) as errors:
        while data := errors.read(_TAIL):
            kept.append(data)
            if sum(map(len, kept)) > 4 * _TAIL:
                kept[:] = [b"".join(kept)[-_TAIL:]]
