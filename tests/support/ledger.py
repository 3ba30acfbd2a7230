"""A ledger outside all machines into which the plugin ``courier`` of the demo enters what it does, on whichever host.

The way from the cages to it is never cut, so what does not come was held back by the fence.
"""

from __future__ import annotations

import contextlib
import json
import socketserver
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from tests.support.routed import Network

COURIER = Path(__file__).parents[2] / "examples/demo/courier"
"""The plugin's folder; beside it, its policy."""
PORT = 7000


class Handled(NamedTuple):
    """An event that the plugin has entered. ``link`` is the connection over which it came: one host process's."""

    event: str
    key: str
    time: float
    host: str
    epoch: int
    link: tuple[str, int]


@dataclass
class Holding:
    """A host's time with the plugin, from its first line to its last."""

    epoch: int
    host: str
    first: float
    last: float


class _Server(socketserver.ThreadingTCPServer):
    daemon_threads, block_on_close = True, False


class Ledger:
    """The server, and what stands in the ledger. Times are of CLOCK_MONOTONIC. ``hosts``: their names, by address."""

    def __init__(self, network: Network, hosts: dict[str, str]) -> None:
        self.handled: list[Handled] = []
        self.holdings: list[Holding] = []
        self.wrong: list[str] = []
        """Lines of an epoch that was over, or of two hosts in one."""
        self._seen: set[tuple[str, int]] = set()
        self._lock = threading.Lock()
        take: Callable[[str, bytes], None] = self._take

        class Handler(socketserver.StreamRequestHandler):
            def handle(self) -> None:
                with contextlib.suppress(ConnectionError):
                    for line in self.rfile:
                        if line.endswith(b"\n"):  # or the cage has ended in the middle of it
                            take(hosts[self.client_address[0]], line)
                            self.wfile.write(b"ok\n")

        self._server = _Server(("", 0), Handler, bind_and_activate=False)
        self._server.socket.close()
        self._server.socket = network.listener(PORT)
        self._thread = threading.Thread(target=self._server.serve_forever)
        self._thread.start()

    def close(self) -> None:
        """Serve no more."""
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()

    @property
    def holder(self) -> str:
        """The host that has written in the newest epoch; empty before the first."""
        return self.holdings[-1].host if self.holdings else ""

    @property
    def events(self) -> set[str]:
        """The events that have been handled, by their ids."""
        with self._lock:
            return {one.event for one in self.handled}

    def _take(self, host: str, text: bytes) -> None:
        now, line = time.monotonic(), json.loads(text)
        run, epoch = str(line["run"]), int(line["epoch"])
        with self._lock:
            if (run, line["number"]) in self._seen:
                return  # the plugin has not had the answer to its first line
            self._seen.add((run, line["number"]))
            last = self.holdings[-1] if self.holdings else None
            if last is not None and epoch < last.epoch:
                since = f"{now - last.first:.1f} s after {last.host} began with {last.epoch}"
                self.wrong.append(f"{host} acts in epoch {epoch}, {since}")
            elif last is None or epoch > last.epoch:
                self.holdings.append(Holding(epoch, host, now, now))
            elif host != last.host:
                self.wrong.append(f"{host} and {last.host} act in epoch {epoch}")
            else:
                last.last = now
            if "event" in line:
                link = (run, int(line["link"]))
                self.handled.append(Handled(str(line["event"]), str(line["key"]), now, host, epoch, link))


@contextlib.contextmanager
def ledger(network: Network, hosts: dict[str, str]) -> Iterator[Ledger]:
    """A ledger that is open."""
    made = Ledger(network, hosts)
    try:
        yield made
    finally:
        made.close()
