"""A running ``isolator dev --json``: commands in, objects out."""

from __future__ import annotations

import ctypes
import json
import os
import select
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any

from tests.support.timeouts import seconds

ANSWERING = """\
    #!/usr/bin/python3
    import json, os, socket
    server = socket.socket(socket.AF_UNIX)
    server.bind(os.environ["PLUGIN_SOCKET"])
    server.listen(1)
    while True:
        connection, _ = server.accept()
        request = json.loads(connection.recv(4096))
        print("version VERSION", flush=True)
        result = {"status": "ok", "message": WORK}
        connection.sendall(json.dumps({"jsonrpc": "2.0", "id": request["id"], "result": result}).encode() + b"\\n")
        connection.close()
"""


def answering(work: str = '""', version: int = 1) -> str:
    """A one-shot plugin whose answers have the value of an expression as their message."""
    return ANSWERING.replace("VERSION", str(version)).replace("WORK", work)


class DevProcess:
    """See the module; a context manager that ends it."""

    def __init__(self, folder: Path, *words: str, enter: tuple[str, ...] = ("unshare", "-n"), **options: Any) -> None:
        self.seen: list[dict[str, Any]] = []
        self._rest, self._position = b"", 0
        # Whoever runs the tests in the background has SIGINT ignored, which is inherited.
        command = ["env", "--default-signal=INT", *enter, "isolator", *options.pop("before", ()), "dev"]
        command = [*command, str(folder), "--json", *words]
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, **options
        )
        assert self.process.stdin is not None and self.process.stdout is not None and self.process.stderr is not None
        self._in, self._out, self._err = self.process.stdin, self.process.stdout, self.process.stderr

    def __enter__(self) -> DevProcess:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.process.poll() is None:
            self.end()
        for stream in (self._in, self._out, self._err):
            stream.close()

    def end(self, number: int = signal.SIGINT) -> int:
        """End it by a signal; returns its exit code."""
        self.process.send_signal(number)
        return self.ended()

    def ended(self) -> int:
        """Wait for its end; returns its exit code."""
        while self._read(seconds(60)):
            pass
        return self.process.wait(seconds(60))

    def interrupt_another_thread(self) -> None:
        """Have ^C come to another thread than the one that waits, as if it had come just before its wait."""
        other = max(int(thread) for thread in os.listdir(f"/proc/{self.process.pid}/task"))
        assert other != self.process.pid and ctypes.CDLL(None).tgkill(self.process.pid, other, signal.SIGINT) == 0

    def say(self, line: str) -> None:
        """Send a line, as from the keys."""
        os.write(self._in.fileno(), line.encode() + b"\n")

    def next(self, kind: str, fits: Callable[[dict[str, Any]], bool] = lambda _: True) -> dict[str, Any]:
        """The next object of this kind that fits; those before it are passed over, and kept in ``seen``."""
        self._position, found = self._find(self._position, kind, fits)
        return found

    def have(self, kind: str, fits: Callable[[dict[str, Any]], bool] = lambda _: True) -> dict[str, Any]:
        """One that has come already, or comes: what is shown by several threads has no order."""
        return self._find(0, kind, fits)[1]

    def _find(self, start: int, kind: str, fits: Callable[[dict[str, Any]], bool]) -> tuple[int, dict[str, Any]]:
        deadline = time.monotonic() + seconds(60)
        while True:
            for index in range(start, len(self.seen)):
                if self.seen[index]["kind"] == kind and fits(self.seen[index]):
                    return index + 1, self.seen[index]
            start = len(self.seen)
            assert self._read(deadline - time.monotonic()), (kind, self.seen, self._errors())

    def _read(self, patience: float) -> bool:
        ready = select.select([self._out], [], [], max(0.0, patience))[0]
        data = os.read(self._out.fileno(), 65536) if ready else b""
        *lines, self._rest = (self._rest + data).split(b"\n")
        self.seen += map(json.loads, lines)
        return bool(data)

    def _errors(self) -> bytes:
        return os.read(self._err.fileno(), 65536) if select.select([self._err], [], [], 0)[0] else b""
