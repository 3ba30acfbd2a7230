"""Accept the connections of a listening socket on the event loop, at no more than a given rate."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import logging
import os
import socket
import time
from collections.abc import Callable
from typing import Any

from isolator.base.pacing import TokenBucket

PER_TURN = 64
"""Connections accepted in one turn of the event loop; the others wait for the next in the listener's backlog."""
HOLD, PAUSE = 0.001, 0.003
"""Seconds of CPU time for them in one turn, and seconds after that before the next: whoever connects without end gets
a quarter of this process."""
REST = 0.2
"""Seconds without accepting when this process has no descriptor or memory left for one more connection."""
_EXHAUSTED = frozenset({errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM})


_logger = logging.getLogger(__name__)


class AcceptLoop:
    """Calls ``accepted`` with each connection, which does not block, and its peer's address. Owns the listener.

    ``budget``: connections a second. A peer that connects faster waits in the listener's backlog. While this process
    has no descriptor left peers wait too, and one line is logged. With ``refuse`` a descriptor is kept for that time:
    it is called with one connection after the other, which is closed then, and can say why. While ``ready`` says no,
    peers wait in the backlog.
    """

    def __init__(
        self,
        listener: socket.socket,
        accepted: Callable[[socket.socket, Any], object],
        *,
        budget: TokenBucket | None = None,
        refuse: Callable[[socket.socket], object] | None = None,
        ready: Callable[[], bool] = lambda: True,
    ) -> None:
        self._refuse, self._ready = refuse, ready
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
            self._loop.remove_reader(self._listener.fileno())
            self._listener.close()
        if self._reserve >= 0:
            os.close(self._reserve)
            self._reserve = -1

    def fileno(self) -> int:
        """The descriptor of the listener."""
        return self._listener.fileno()

    def release(self) -> socket.socket:
        """Accept no more, and give the listener back: callers wait in its backlog."""
        if self._resting is not None:
            self._resting.cancel()
        self._loop.remove_reader(self._listener.fileno())
        listener = socket.socket(fileno=self._listener.detach())
        self.close()
        return listener

    def _listen(self) -> None:
        self._resting = None
        # By its number: for the name of an object that it does not know the selector asks the kernel twice.
        self._loop.add_reader(self._listener.fileno(), self._readable)

    def _readable(self) -> None:
        end = time.thread_time() + HOLD
        for _ in range(PER_TURN):
            if not self._ready():
                return self._rest(REST)
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
            if time.thread_time() >= end:
                return self._rest(PAUSE)

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
        self._loop.remove_reader(self._listener.fileno())
        self._resting = self._loop.call_later(seconds, self._listen)


def _open_reserve() -> int:
    """A descriptor that can be given up for another; -1: there is none."""
    with contextlib.suppress(OSError):
        return os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC)
    return -1
