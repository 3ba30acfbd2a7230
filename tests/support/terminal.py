"""A terminal as a person has it before them, and a command on it."""

from __future__ import annotations

import contextlib
import fcntl
import os
import pty
import select
import signal
import struct
import subprocess
import termios
from collections.abc import Iterator
from typing import Any

from tests.support.timeouts import seconds


class Terminal:
    """A person's terminal: the end that the keyboard and the screen are on, and a command that has the other one."""

    def __init__(self, command: list[str], **environment: str) -> None:
        self.keyboard, self.line = pty.openpty()
        self.resize(24, 80)
        self._screen = b""
        self.seen = b""
        """All that the screen has ever been sent."""
        self.process = subprocess.Popen(
            ["setsid", "--ctty", *command], stdin=self.line, stdout=self.line, stderr=self.line,
            env={**os.environ, **environment},
        )  # fmt: skip

    def resize(self, rows: int, columns: int) -> None:
        fcntl.ioctl(self.line, termios.TIOCSWINSZ, struct.pack("4H", rows, columns, 0, 0))

    def press(self, keys: str) -> None:
        os.write(self.keyboard, keys.encode())

    def shows(self, text: str) -> str:
        """Wait until the screen has shown ``text``; returns everything up to it, and forgets that."""
        wanted = text.encode()
        while wanted not in self._screen:
            assert select.select([self.keyboard], [], [], seconds(30))[0], (text, self._screen)
            self._read()
        shown, _, self._screen = self._screen.partition(wanted)
        return (shown + wanted).decode(errors="replace")

    def end(self) -> int:
        """Wait for the command's end; returns its exit code."""
        return self.process.wait(seconds(30))

    def rest(self) -> str:
        """Everything that the screen has shown since."""
        while select.select([self.keyboard], [], [], 0)[0]:
            self._read()
        return self._screen.decode(errors="replace")

    def settings(self) -> list[Any]:
        """The terminal's own settings: echo, whole lines, keys that are signals."""
        return termios.tcgetattr(self.line)

    def _read(self) -> None:
        new = os.read(self.keyboard, 4096)
        self._screen += new
        self.seen += new


@contextlib.contextmanager
def terminal(command: list[str], **environment: str) -> Iterator[Terminal]:
    """A command on a terminal of its own, and its end."""
    one = Terminal(command, **environment)
    try:
        yield one
    finally:
        if one.process.poll() is None:
            one.process.send_signal(signal.SIGHUP)
            try:
                one.process.wait(seconds(10))
            except subprocess.TimeoutExpired:
                one.process.kill()
                one.process.wait()
        os.close(one.keyboard)
        os.close(one.line)
