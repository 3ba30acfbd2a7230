"""Connections of the console: who is at the other end, how many there may be, and how long one may keep it waiting."""

from __future__ import annotations

import asyncio
import socket
from collections import Counter
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

from isolator.linux.peer import peer_ids

REQUEST_SECONDS = 5.0
"""A request that has not come whole after so long ends its connection."""
STALLED_SECONDS = 30.0
"""The same for a caller that does not read its answer."""
CONNECTIONS, SHARE = 128, 32
"""Connections of callers known by uid, and of one of them; as many again come through the port, where nobody is."""

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]


class Places:
    """Count of the open connections."""

    def __init__(self) -> None:
        self._of: Counter[int | None] = Counter()

    def take(self, uid: int | None) -> bool:
        """Count one more, of the process at the other end of the Unix socket, or (None) of somebody at the port.

        False when there is no place.
        """
        known = sum(count for owner, count in self._of.items() if owner is not None)
        if self._of[uid] >= (CONNECTIONS if uid is None or uid == 0 else SHARE):
            return False
        if uid not in (None, 0) and known >= CONNECTIONS:
            return False
        self._of[uid] += 1
        return True

    def leave(self, uid: int | None) -> None:
        self._of[uid] -= 1
        if not self._of[uid]:
            del self._of[uid]


class _Deadline:
    """A moment at which a connection is cut, unless it is lifted before."""

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._due: asyncio.TimerHandle | None = None

    def set(self, transport: asyncio.Transport) -> None:
        """Begin, unless it has begun."""
        if self._due is None:
            self._due = asyncio.get_running_loop().call_later(self._seconds, transport.abort)

    def lift(self) -> None:
        if self._due is not None:
            self._due.cancel()
            self._due = None


def protocol(places: Places) -> type[H11Protocol]:
    """The protocol class for uvicorn: it notes the peer's uid in each request's state, and ends what is too slow."""

    class Connection(H11Protocol):
        _uid: int | None = None
        _counted = False

        def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
            super().connection_made(transport)
            self._request, self._answer = _Deadline(REQUEST_SECONDS), _Deadline(STALLED_SECONDS)
            transport.set_write_buffer_limits(0)  # paused is: an answer waits for the caller to read it
            found = transport.get_extra_info("socket")
            if found.family == socket.AF_UNIX:
                self._uid = peer_ids(found)[1]
            self._counted = places.take(self._uid)
            if not self._counted:
                transport.abort()
                return
            self.app_state = {**self.app_state, "uid": self._uid}
            self._request.set(transport)

        def data_received(self, data: bytes) -> None:
            try:
                super().data_received(data)
            except h11.ProtocolError:
                self.transport.abort()  # no HTTP, where it is too late for an answer that says so
                return
            if self.conn.their_state in (h11.IDLE, h11.SEND_BODY):
                self._request.set(self.transport)
            else:
                self._request.lift()

        def on_response_complete(self) -> None:
            try:
                super().on_response_complete()
            except h11.ProtocolError:
                self.transport.abort()
                return
            if self.conn.their_state is h11.SEND_BODY:  # of the next request, which had come with the one before
                self._request.set(self.transport)

        def pause_writing(self) -> None:
            super().pause_writing()
            self._answer.set(self.transport)

        def resume_writing(self) -> None:
            super().resume_writing()
            self._answer.lift()

        def connection_lost(self, exc: Exception | None) -> None:
            self._request.lift()
            self._answer.lift()
            if self._counted:
                places.leave(self._uid)
            super().connection_lost(exc)

    return Connection
