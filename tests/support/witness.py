"""A witness behind the broker: a server that reads times of day, a line each, which clients have written.

Of day, because a cage has clocks of its own for the time since the start of the machine.
"""

from __future__ import annotations

import socketserver
import time

from isolator.linux.boottime import boottime
from tests.support.internet_servers import Internet, Server

PORT = 9


class Witness:
    """The server, at ``PORT`` of every address of the pretend internet."""

    def __init__(self, internet: Internet) -> None:
        stamps = self.stamps = list[float]()

        class Handler(socketserver.StreamRequestHandler):
            def handle(self) -> None:
                for line in self.rfile:
                    stamps.append(float(line))

        internet.servers.append(Server(internet.bound("0.0.0.0", PORT), Handler))

    def after(self, then: float) -> list[float]:
        """The times later than ``then``, of CLOCK_BOOTTIME, that have come."""
        return [stamp for stamp in list(self.stamps) if stamp > of_day(then)]


def of_day(then: float) -> float:
    """The time of day that was, or will be, at a time of CLOCK_BOOTTIME."""
    return then + time.time() - boottime()
