"""Accept the connections of a listening socket on the event loop, at no more than a given rate."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import logging
import os
import socket
from collections.abc import Callable
from typing import Any

from isolator.pacing import TokenBucket

PER_TURN = 64
"""Connections accepted in one turn of the event loop; the others wait for the next in the listener's backlog."""
REST = 0.2
"""Seconds without accepting when this process has no descriptor or memory left for one more connection."""
_EXHAUSTED = frozenset({errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM})


_logger = logging.getLogger(__name__)


class AcceptLoop:
    """Calls ``accepted`` with each connection, which does not block, and its peer's address. Owns the listener.

    ``budget``: connections a second. A peer that connects faster waits in the listener's backlog. While this process
    has no descriptor left peers wait too, and one line is logged. With ``refuse`` a descriptor is kept for that time:
    it is called with one connection after the other, which is closed then, and can say why.
    """

    def __init__(
        self,
        listener: socket.socket,
        accepted: Callable[[socket.socket, Any], object],
        *,
        budget: TokenBucket | None = None,
        refuse: Callable[[socket.socket], object] | None = None,
    ) -> None:
        self._refuse = refuse
        self._reserve = _open_reserve() if refuse is not None else -1
        self._exhausted = False
        self._listener, self._accepted, self._budget = listener, accepted, budget
        self._loop = asyncio.get_running_loop()
        self._resting: asyncio.TimerHandle | None = None
        listener.setblocking(False)
        self._listen()

    def close(self) -> None:
        """Close the listener; connections that were accepted stay. Idempotent."""
        if self._resting is not None:
            self._resting.cancel()
        if self._listener.fileno() >= 0:
            self._loop.remove_reader(self._listener)
            self._listener.close()
        if self._reserve >= 0:
            os.close(self._reserve)
            self._reserve = -1

    def release(self) -> socket.socket:
        """Accept no more, and give the listener back: callers wait in its backlog."""
        if self._resting is not None:
            self._resting.cancel()
        self._loop.remove_reader(self._listener)
        listener = socket.socket(fileno=self._listener.detach())
        self.close()
        return listener

    def _listen(self) -> None:
        self._resting = None
        self._loop.add_reader(self._listener, self._readable)

    def _readable(self) -> None:
        for _ in range(PER_TURN):
            try:
                connection, peer = self._listener.accept()
            except BlockingIOError:
                return
            except OSError as error:
                if error.errno in _EXHAUSTED:
                    # The listener stays readable: wait for descriptors instead of spinning.
                    self._ran_out(error)
                    return self._rest(REST)
                continue  # the connection ended before it was accepted (accept(2))
            self._exhausted = False
            connection.setblocking(False)
            self._accepted(connection, peer)
            if self._listener.fileno() < 0:
                return  # closed or released by the callback
            if self._budget is not None and (pause := self._budget.take()):
                return self._rest(pause)

    def _ran_out(self, error: OSError) -> None:
        if not self._exhausted:
            self._exhausted = True
            _logger.error("no connection can be accepted at the moment: %s; callers wait", error.strerror)
        if self._refuse is None:
            return
        if self._reserve >= 0:
            os.close(self._reserve)
            with contextlib.suppress(OSError):
                connection, _ = self._listener.accept()
                with connection:
                    connection.setblocking(False)
                    self._refuse(connection)
        self._reserve = _open_reserve()

    def _rest(self, seconds: float) -> None:
        self._loop.remove_reader(self._listener)
        self._resting = self._loop.call_later(seconds, self._listen)


def _open_reserve() -> int:
    """A descriptor that can be given up for another; -1: there is none."""
    with contextlib.suppress(OSError):
        return os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC)
    return -1
