"""A shell that lives as long as a reader's: the commands of a page go into it one after the other."""

from __future__ import annotations

import os
import select
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType

from tests.support.timeouts import seconds

_END = "=== end"


class Shell:
    """A bash with aliases and jobs, in a network of its own with nothing but a loopback; a context manager."""

    def __init__(self, folder: Path) -> None:
        self._process = subprocess.Popen(
            ["unshare", "-n", "sh", "-c", "ip link set lo up; exec bash -O expand_aliases"], cwd=folder,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True,
        )  # fmt: skip
        self._text = ""

    def __enter__(self) -> Shell:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._process.stdin is not None and self._process.stdout is not None
        try:
            self._process.stdin.close()
            self._process.wait(seconds(30))
        finally:
            if kind is not None:  # jobs that the page would have ended
                os.killpg(self._process.pid, signal.SIGTERM)
                while self._more(seconds(30)):
                    pass
            self._process.stdout.close()

    def do(self, command: str, until: str = "") -> str:
        """Run a command; returns what was written. With ``until`` what its job writes up to that text belongs to it."""
        assert self._process.stdin is not None
        self._text = ""
        self._process.stdin.write(f"{command}\necho '{_END}' $?\n".encode())
        self._process.stdin.flush()
        self._read(lambda text: f"{_END} " in text and until in text and text.endswith("\n"))
        before, _, rest = self._text.partition(f"{_END} ")
        code, _, after = rest.partition("\n")
        assert code == "0", (command, self._text)
        return before + after

    def _read(self, done: Callable[[str], bool]) -> None:
        deadline = time.monotonic() + seconds(60)
        while not done(self._text):
            data = self._more(deadline - time.monotonic())
            assert data, ("the shell has ended, or says nothing more", self._text)
            self._text += data.decode()

    def _more(self, patience: float) -> bytes:
        """What is written next; nothing once every process has closed its output, or when nothing comes."""
        assert self._process.stdout is not None
        ready = select.select([self._process.stdout], [], [], max(0.0, patience))[0]
        return os.read(self._process.stdout.fileno(), 65536) if ready else b""
