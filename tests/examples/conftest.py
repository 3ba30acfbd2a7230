"""Runs an example as a plain process and talks to it as the host would in one-shot mode."""

from __future__ import annotations

import json
import os
import select
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"
sys.path.insert(0, str(EXAMPLES / "demo"))
sys.path.insert(0, str(EXAMPLES / "hostile"))


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--write-screen", type=Path, metavar="FILE", help="the demo: write its last screen as a picture")


class Sidecar:
    """One example, started from its manifest with the environment that protocol.md promises and nothing else."""

    def __init__(self, folder: str, directory: Path, config: dict[str, str], prefix: tuple[str, ...] = ()) -> None:
        self.folder = EXAMPLES / folder
        self.manifest = json.loads((self.folder / "plugin.json").read_text())
        self.state = directory / "state"
        self.state.mkdir()
        self.path = str(directory / "plugin.sock")
        environment = {
            "PATH": "/usr/local/bin:/usr/bin:/bin",
            "HOME": str(self.state),
            "LANG": "C.UTF-8",
            "TMPDIR": str(directory),
            "PLUGIN_NAME": self.manifest["name"],
            "PLUGIN_SOCKET": self.path,
            "PLUGIN_HOST_SOCKET": str(directory / "host.sock"),
            "PLUGIN_STATE_DIR": str(self.state),
        }
        for key, value in config.items():
            environment[key] = environment[key.upper()] = value
        self.log = directory / "log"
        with self.log.open("wb") as log:
            command = [*prefix, str(self.folder / self.manifest["binary"])]
            self.process = subprocess.Popen(
                command, cwd=self.folder, env=environment, stdin=subprocess.DEVNULL, stdout=log, stderr=log
            )
        self._wait_for_socket()

    def _wait_for_socket(self) -> None:
        """As the host does: the socket's appearance is readiness, a trial connection would be an event."""
        end = time.monotonic() + 10
        exited = select.poll()
        pidfd = os.pidfd_open(self.process.pid)
        exited.register(pidfd, select.POLLIN)
        try:
            while not Path(self.path).exists():
                assert not exited.poll(20), f"ended before it listened: {self.log.read_text()}"
                assert time.monotonic() < end, "no socket after 10 s"
        finally:
            os.close(pidfd)

    def connect(self) -> socket.socket:
        """A connection; refused ones are retried, as the name is there an instant before the listener is."""
        end = time.monotonic() + 5
        while True:
            connection = socket.socket(socket.AF_UNIX)
            connection.settimeout(20)
            try:
                connection.connect(self.path)
                return connection
            except (ConnectionRefusedError, FileNotFoundError):
                connection.close()
                if time.monotonic() > end:
                    raise
                os.sched_yield()

    def send(self, method: str, params: dict[str, Any], number: int = 7) -> Any:
        """One event: one write of at most 4096 bytes, one line or end of file back; the reply's result."""
        message = {"jsonrpc": "2.0", "method": method, "params": params, "id": number}
        line = json.dumps(message, separators=(",", ":")).encode() + b"\n"
        assert len(line) <= 4096
        with self.connect() as connection:
            assert connection.send(line) == len(line)
            received = b""
            while not received.endswith(b"\n") and (chunk := connection.recv(65536)):
                received += chunk
        reply = json.loads(received)
        assert reply["jsonrpc"] == "2.0"
        assert reply["id"] == number
        return reply["result"]

    def stop(self) -> None:
        self.process.terminate()
        try:
            self.process.wait(5)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()


Starter = Callable[..., Sidecar]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Starter]:
    """Start examples; every one is stopped after the test."""
    running: list[Sidecar] = []

    def starter(folder: str, prefix: tuple[str, ...] = (), **config: str) -> Sidecar:
        directory = tmp_path / str(len(running))
        directory.mkdir()
        running.append(Sidecar(folder, directory, config, prefix))
        return running[-1]

    yield starter
    for sidecar in running:
        sidecar.stop()


def event(**further: Any) -> dict[str, Any]:
    """The fields of a deploy event, with the `_meta` the host adds when it fits."""
    meta = {"id": "01J0000000", "type": "deploy.completed", "time": "2026-01-01T00:00:00Z", "attempt": 1}
    return {"project_id": "proj_1", "deployment_id": "dep_1", **further, "_meta": meta}
