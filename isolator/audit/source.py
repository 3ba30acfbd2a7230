"""A source of records: one socket of the writer, and what the writer sends back on it."""

from __future__ import annotations

import asyncio
import json
import os
import socket
from collections.abc import Callable
from typing import Any, Self

from isolator.audit.schema import HOST
from isolator.ipc.body import Body
from isolator.ipc.packet import MAX_PACKET, send_packet
from isolator.ipc.succession import Departure, Descriptors

_encode = json.JSONEncoder(separators=(",", ":")).encode
_ROOM = memoryview(bytearray(MAX_PACKET))
"""Room for a packet, made once: to ask for its size first would be another call, to make it each time costs more."""


class SourceState(Body):
    """A socket from which records come, on its way to another writer."""

    name: str
    socket: int
    received: int
    acked: int
    blocked: str | None
    alarm: str | None
    """as they were sent back last, these three"""


class Source:
    """One socket from which records come, and the state that was sent back on it."""

    def __init__(self, name: str, sock: socket.socket) -> None:
        self.name, self.sock = name, sock
        self.received = self.acked = 0
        self.committed = self.since = 0
        """Records that had been received when the last commit began, and when the one before it did."""
        self.open = True
        self.rest: asyncio.TimerHandle | None = None
        """The end of the moment for which it is left alone, as few records come by it."""
        self.held = False
        """Not read yet, so that another source's records come first."""
        self._listened = -1
        """The descriptor that is listened to; -1: none."""
        self._bell, self._rings, self._empty = -1, False, False
        """A pipe that the sender rings behind its packets, whether it does, and whether the socket was read empty."""
        self.blocked: str | None = None
        self.alarm: str | None = None
        self._sent_state: tuple[int, str | None, str | None] = (0, None, None)
        self._full = False
        """The state is sent once the socket has room."""
        self._loop = asyncio.get_running_loop()
        if name == HOST:
            self._offer_bell()

    def listen(self, readable: Callable[[Self], None] | None) -> None:
        """Have ``readable`` called when there is something to receive; None: not for now.

        A packet wakes whoever listens to its socket, perhaps on the processor of its sender, who has just recorded what
        it is about to do. So a sender that rings is listened to by its bell alone.
        """
        # By their numbers: for the name of an object that it does not know the selector asks the kernel twice.
        fd = -1 if readable is None else self._bell if self._rings and self._empty else self.sock.fileno()
        if fd != self._listened:
            if self._listened >= 0:
                self._loop.remove_reader(self._listened)
            if readable is not None:
                self._loop.add_reader(fd, readable, self)
            self._listened = fd

    def hear(self) -> None:
        """Hear the bell, ahead of ``receive``. A sender that has let go of it is offered another, if it had rung."""
        if self._bell < 0:
            return
        try:
            rung = os.read(self._bell, 4096)
        except BlockingIOError:
            return
        had_rung, self._rings, self._empty = self._rings, bool(rung), False
        if not rung:
            self._drop_bell()
            if had_rung:
                self._offer_bell()

    def _offer_bell(self) -> None:
        self._bell, theirs = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        try:
            send_packet(self.sock, b"{}", [theirs])
        except OSError:  # full, or closed
            self._drop_bell()
        finally:
            os.close(theirs)

    def _drop_bell(self) -> None:
        self.listen(None)
        if self._bell >= 0:
            os.close(self._bell)
        self._bell, self._rings = -1, False

    def receive(self) -> bytes | None:
        """The next packet; None when there is none, or none will come any more: then it is no longer ``open``."""
        if not self.open:
            return None
        try:
            size = self.sock.recv_into(_ROOM)
        except (BlockingIOError, InterruptedError):
            self._empty = True
            return None
        except ConnectionResetError:  # it has ended with answers unread: told once, ahead of the records it has sent
            return self.receive()
        except OSError:
            size = 0
        self.open = size > 0
        return bytes(_ROOM[:size]) if size else None

    def report(self, *, acked: int | None = None, blocked: str | None, alarm: str | None) -> None:
        """Report progress and trouble; a source that does not read gets the latest state once it does."""
        self.acked = self.acked if acked is None else acked
        self.blocked, self.alarm = blocked, alarm
        self._push()

    def pass_on(self, departure: Departure) -> SourceState:
        """Hand the socket to another writer, which reads on."""
        acked, blocked, alarm = self._sent_state
        self._drop_bell()
        self._loop.remove_writer(self.sock)
        number = departure.add(self.sock.detach())
        return SourceState(
            name=self.name, socket=number, received=self.received, acked=acked, blocked=blocked, alarm=alarm
        )  # fmt: skip

    @classmethod
    def taken_over(cls, state: SourceState, descriptors: Descriptors) -> Self:
        """The socket of another writer; what that one received is written."""
        sock = socket.socket(fileno=descriptors.take(state.socket))
        sock.setblocking(False)
        source = cls(state.name, sock)
        source.received = source.acked = source.committed = source.since = state.received
        source.blocked, source.alarm = state.blocked, state.alarm
        source._sent_state = (state.acked, state.blocked, state.alarm)
        return source

    def close(self) -> None:
        """Stop reading and answering."""
        self._drop_bell()
        self._loop.remove_writer(self.sock)
        self.sock.close()

    def _push(self) -> None:
        message: dict[str, Any] = {}
        if self.acked != self._sent_state[0]:
            message["acked"] = self.acked
        if self.blocked != self._sent_state[1]:
            message["blocked"] = self.blocked
        if self.alarm != self._sent_state[2]:
            message["alarm"] = self.alarm
        if message:
            try:
                self.sock.send(_encode(message).encode(), socket.MSG_NOSIGNAL)
            except (BlockingIOError, InterruptedError):
                self._loop.add_writer(self.sock, self._push)
                self._full = True
                return
            except OSError:
                pass  # closed: noticed where it is read
        self._sent_state = (self.acked, self.blocked, self.alarm)
        if self._full:
            self._loop.remove_writer(self.sock)
            self._full = False
