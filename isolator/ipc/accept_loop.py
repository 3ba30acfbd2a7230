"""Accept the connections of a listening socket on the event loop, at no more than a given rate."""

from __future__ import annotations

import asyncio
import errno
import socket
from collections.abc import Callable
from typing import Any

from isolator.pacing import TokenBucket

PER_TURN = 64
"""Connections accepted in one turn of the event loop; the others wait for the next in the listener's backlog."""
REST = 0.2
"""Seconds without accepting when this process has no descriptor or memory left for one more connection."""
_EXHAUSTED = frozenset({errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM})


class AcceptLoop:
    """Calls ``accepted`` with each connection, which does not block, and its peer's address. Owns the listener.

    ``budget``: connections a second. A peer that connects faster waits in the listener's backlog.
    """

    def __init__(
        self,
        listener: socket.socket,
        accepted: Callable[[socket.socket, Any], object],
        *,
        budget: TokenBucket | None = None,
    ) -> None:
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
                    return self._rest(REST)
                continue  # the connection ended before it was accepted (accept(2))
            connection.setblocking(False)
            self._accepted(connection, peer)
            if self._listener.fileno() < 0:
                return  # closed by the callback
            if self._budget is not None and (pause := self._budget.take()):
                return self._rest(pause)

    def _rest(self, seconds: float) -> None:
        self._loop.remove_reader(self._listener)
        self._resting = self._loop.call_later(seconds, self._listen)
