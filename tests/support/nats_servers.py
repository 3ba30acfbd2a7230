"""Servers of NATS with JetStream on this machine's loopback, in processes that tests stop, kill and start again."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

from tests.support.timeouts import seconds


def nats_server() -> str:
    """The server of this environment; raises FileNotFoundError."""
    found = shutil.which("nats-server")
    if found is None:
        raise FileNotFoundError("nats-server is missing: './dev setup' installs it")
    return found


class Server:
    """One server of a cluster, with a folder of its own."""

    def __init__(self, number: int, folder: Path, program: str, count: int, first_port: int) -> None:
        self.name, self.port = f"n{number}", first_port + 10 * number
        self._program, self._folder = program, folder / self.name
        self._folder.mkdir(parents=True)
        routes = ", ".join(f'"nats://127.0.0.1:{first_port + 10 * other + 1}"' for other in range(count))
        cluster = f'cluster {{ name: iso, listen: "127.0.0.1:{self.port + 1}", routes: [{routes}] }}\n'
        self.config = self._folder / "server.conf"
        self.config.write_text(
            f'server_name: {self.name}\nlisten: "127.0.0.1:{self.port}"\n'
            f'jetstream {{ store_dir: "{self._folder}/store" }}\n' + (cluster if count > 1 else "")
        )
        self.process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        return f"nats://127.0.0.1:{self.port}"

    def start(self) -> None:
        """Start the server; returns when it accepts connections."""
        with (self._folder / "log").open("ab") as log:
            self.process = subprocess.Popen([self._program, "-c", self.config], stdout=log, stderr=log)
        end = time.monotonic() + seconds(20)
        while True:
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", self.port), 1):
                return
            assert time.monotonic() < end and self.process.poll() is None, (self._folder / "log").read_text()[-2000:]
            time.sleep(0.05)

    def signal(self, number: int) -> None:
        """Send it a signal: SIGSTOP, SIGCONT."""
        assert self.process is not None
        self.process.send_signal(number)

    def kill(self) -> None:
        """End it at once, as a power cut does but for what its kernel has."""
        if self.process is not None and self.process.poll() is None:
            self.process.send_signal(signal.SIGKILL)
            self.process.send_signal(signal.SIGCONT)
            self.process.wait()


@contextlib.contextmanager
def nats_servers(folder: Path, count: int = 3, program: str = "", first_port: int = 0) -> Iterator[list[Server]]:
    """A cluster of servers that all run; they are killed at the end. In a network namespace any port is free."""
    first_port = first_port or 20000 + os.getpid() % 1000 * 30
    servers = [Server(number, folder, program or nats_server(), count, first_port) for number in range(count)]
    try:
        for server in servers:
            server.start()
        yield servers
    finally:
        for server in servers:
            server.kill()
