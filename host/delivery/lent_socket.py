"""Socket file of a plugin's sidecar, lent by the supervisor: the host connects to it by itself, for each event.

The file is in a folder of the plugin's that the host cannot enter. The supervisor, which can, looks at what has the
socket's name, lets the host's group connect to it, and sends a descriptor that allows nothing else (``run.socket``).
Whatever the plugin does to the name changes the file's ``st_ctime``, and the supervisor is asked again.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket

from host.delivery.runs import Runs
from isolator.errors import IsolatorError
from isolator.ipc.body import Message
from isolator.ipc.messages import LendSocket
from isolator.linux.descriptors import close_all

ASK_AGAIN = 1.0
"""Seconds between two requests for a plugin's socket file: it may be one that is replaced all the time."""


class LentSocketFile:
    """The socket file of one plugin's present run, if there is one; ``drop`` closes it."""

    def __init__(self, name: str, runs: Runs) -> None:
        self._name, self._runs = name, runs
        self._run: str | None = None
        """The run that it is asked for."""
        self._fd, self._changed_ns = -1, 0
        self._ask_at = 0.0
        """Loop time before which the supervisor is not asked."""

    def leads_to(self, run: str | None) -> bool:
        """Whether there is a socket file of that run, so that a connection is a matter of microseconds."""
        return self._fd >= 0 and run == self._run

    def connect(self, run: str | None) -> socket.socket | None:
        """Connect to the run without waiting, on a non-blocking socket; None if the supervisor has to be asked."""
        if not self.leads_to(run):
            return None
        try:
            connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
        except OSError:
            return None  # no descriptor is free; nor is one for the supervisor's answer, which tells that
        try:
            if os.fstat(self._fd).st_ctime_ns == self._changed_ns:
                connection.connect(f"/proc/self/fd/{self._fd}")
                return connection
            self.drop()
        except BlockingIOError:
            pass  # its backlog is full
        except OSError:
            self.drop()
        connection.close()
        return None

    def ask(self, run: str) -> None:
        """Ask the supervisor for the socket file of a run, unless it is there or was asked for just now."""
        loop = asyncio.get_running_loop()
        if not self.leads_to(run) and loop.time() >= self._ask_at:
            self.drop()
            self._run, self._ask_at = run, loop.time() + ASK_AGAIN
            self._runs.lend(self._name, run).add_done_callback(lambda answer: self._lent(run, answer))

    def drop(self) -> None:
        """Close the file and forget the run; an answer that is still to come is of no use."""
        if self._fd >= 0:
            os.close(self._fd)
        self._fd, self._run = -1, None

    def _lent(self, run: str, answer: asyncio.Future[Message]) -> None:
        if answer.cancelled() or answer.exception() is not None:
            return  # each connection is asked for
        fds = answer.result().fds
        with contextlib.suppress(IsolatorError):
            changed = LendSocket.read_reply(answer.result().fields).changed_ns
            if run == self._run and self._fd < 0 and fds:
                self._fd, self._changed_ns = fds.pop(), changed
        close_all(fds)
