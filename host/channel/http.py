"""HTTP channel: one connection and one request each, so no answer can ever be taken for that of another request.

``h11`` reads what comes. An answer is complete when its message is; whatever follows is dropped with the connection.
Redirects are not followed, an upgrade is refused, informational answers are passed over. Of a body 64 KiB are kept, of
a head 16 KiB are read, and of all that a sidecar sends for one request no more than ``MOST_BYTES``.
"""

from __future__ import annotations

import asyncio
import socket
import time
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Self

import h11

from host.channel.reply import ONESHOT_REPLY, LostError
from isolator.ipc.body import Body
from isolator.ipc.succession import Departure, to_bytes, to_text

MOST_HEAD = 16 * 1024
MOST_BYTES = 256 * 1024
MOST_CHUNKS = 1024
"""Pieces of a body, each of which takes time; what comes behind them is dropped, as what is beyond its 64 KiB."""
MOST_INFORMATIONAL = 16
"""Informational answers (1xx) before the answer itself."""

Headers = list[tuple[str, str]]


@dataclass(frozen=True)
class Response:
    """An answer: its status, ``Retry-After`` if there is one, and of its body what was kept."""

    status: int
    retry_after: str | None
    body: bytes
    whole: bool
    """Nothing of the body was dropped."""


class HttpState(Body):
    """A request without an answer, on its way to another host."""

    socket: int
    method: str
    unsent: str
    received: str
    sent_ns: int
    deadline: float


def write_request(method: str, path: str, headers: Iterable[tuple[str, str]], body: bytes = b"") -> bytes:
    """The bytes of a request; names and values of ``headers`` are the caller's to make valid."""
    sent = [("host", "plugin"), *headers, ("connection", "close")]
    if method == "POST":
        sent.append(("content-length", str(len(body))))
    connection = h11.Connection(h11.CLIENT)
    head = connection.send(h11.Request(method=method, target=path, headers=sent))
    return (head or b"") + body


class AnswerReader:
    """Reads the answer to a request of ``method``."""

    def __init__(self, method: str) -> None:
        self._connection = h11.Connection(h11.CLIENT, max_incomplete_event_size=MOST_HEAD)
        self._connection.send(h11.Request(method=method, target="/", headers=[("host", "plugin")]))
        self._connection.send(h11.EndOfMessage())
        self._head: h11.Response | None = None
        self._body: list[bytes] = []
        self._size = self._informational = 0
        self._began = False

    def feed(self, data: bytes) -> Response | None:
        """Read more; empty ``data`` is the end of the connection. Raises LostError for what is no answer."""
        self._began = self._began or bool(data)
        try:
            self._connection.receive_data(data)
            while True:
                event = self._connection.next_event()
                if event is h11.NEED_DATA or event is h11.PAUSED:
                    return None
                if isinstance(event, h11.InformationalResponse):
                    self._informational += 1
                    if self._informational > MOST_INFORMATIONAL:
                        raise LostError(f"more than {MOST_INFORMATIONAL} informational answers", answered=True)
                elif isinstance(event, h11.Response):
                    self._head = event
                elif isinstance(event, h11.Data):
                    self._size += len(event.data)
                    self._body.append(bytes(event.data))
                    if self._size > ONESHOT_REPLY or len(self._body) > MOST_CHUNKS:
                        return self._response(whole=False)
                elif isinstance(event, h11.EndOfMessage):
                    return self._response(whole=True)
                else:  # the end, which h11 allows between two answers
                    raise LostError("connection closed without an answer", crash=True)
        except h11.RemoteProtocolError as error:
            if not data:
                when = "in the middle of an answer" if self._began else "without an answer"
                raise LostError(f"connection closed {when}", crash=True) from None
            raise LostError(f"no HTTP/1.1: {error}", answered=True) from None

    def _response(self, *, whole: bool) -> Response:
        assert self._head is not None
        found = [value for name, value in self._head.headers if name == b"retry-after"]
        retry_after = found[0].decode("ascii", "replace") if found else None
        return Response(self._head.status_code, retry_after, b"".join(self._body)[:ONESHOT_REPLY], whole)


class HttpExchange:
    """A request on a fresh non-blocking connection, and its answer.

    ``reply`` gets the Response, or LostError. The caller ends the exchange with ``close``, before it closes the socket.
    """

    def __init__(self, sock: socket.socket, method: str, request: bytes, timeout: float) -> None:
        self._loop = asyncio.get_running_loop()
        self.reply: asyncio.Future[Response] = self._loop.create_future()
        self.sent_ns = 0
        """CLOCK_MONOTONIC in ns when sending began."""
        self.sock, self._method, self._timeout = sock, method, timeout
        self._unsent = memoryview(request)
        self._reader = AnswerReader(method)
        self._received: list[bytes] = []
        self._size = 0
        self._deadline = 0.0
        self._timer: asyncio.TimerHandle | None = None

    def send(self) -> None:
        """Send the request and await the answer for at most ``timeout`` seconds; an error is set on ``reply``."""
        if not self.reply.done():
            self.sent_ns = time.monotonic_ns()
            self._listen(self._loop.time() + self._timeout)

    def give_up(self, why: str) -> None:
        """End a request that was not sent, for that reason."""
        self.sent_ns = time.monotonic_ns()
        self._fail(LostError(why))

    @property
    def unanswered(self) -> bool:
        """Whether sending has begun, and the answer is still to come."""
        return self._timer is not None and not self.reply.done()

    def pass_on(self, departure: Departure) -> HttpState:
        """Hand an unanswered request to the successor of this process; it is to be closed here, all the same."""
        self._deafen()
        return HttpState(
            socket=departure.copy(self.sock.fileno()),
            method=self._method,
            unsent=to_text(self._unsent),
            received=to_text(b"".join(self._received)),
            sent_ns=self.sent_ns,
            deadline=self._deadline,
        )

    @classmethod
    def taken_over(cls, sock: socket.socket, state: HttpState) -> Self:
        """The request of another process, whose answer is awaited on this socket; deadlines are of the same clock."""
        exchange = cls(sock, state.method, to_bytes(state.unsent), 0.0)
        exchange.sent_ns = state.sent_ns
        exchange._listen(state.deadline)
        received = to_bytes(state.received)
        if received:
            exchange._read(received)
        return exchange

    def close(self) -> None:
        """Await the answer no more; a request that was not sent yet never is."""
        self.reply.cancel()
        self._deafen()

    def _listen(self, deadline: float) -> None:
        self._deadline = deadline
        self._timer = self._loop.call_at(deadline, self._fail, LostError("no answer in time"))
        self._loop.add_reader(self.sock.fileno(), self._readable)
        self._writable()

    def _deafen(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._loop.remove_reader(self.sock.fileno())
            self._loop.remove_writer(self.sock.fileno())

    def _writable(self) -> None:
        """Send as much as there is room for; the rest when there is more."""
        try:
            while self._unsent:
                self._unsent = self._unsent[self.sock.send(self._unsent) :]
        except (BlockingIOError, InterruptedError):
            self._loop.add_writer(self.sock.fileno(), self._writable)
            return
        except OSError:
            self._unsent = self._unsent[:0]  # it reads no more, and may have answered: reading shows it
        self._loop.remove_writer(self.sock.fileno())

    def _readable(self) -> None:
        if self.reply.done():
            return
        try:
            data = self.sock.recv(65536)
        except (BlockingIOError, InterruptedError):
            return
        except OSError as error:
            self._fail(LostError(f"connection broken: {error.strerror}", crash=True))
            return
        self._read(data)

    def _read(self, data: bytes) -> None:
        self._size += len(data)
        self._received.append(data)
        try:
            if self._size > MOST_BYTES:
                raise LostError(f"an answer of more than {MOST_BYTES} bytes", answered=True)
            response = self._reader.feed(data)
        except LostError as error:
            self._fail(error)
            return
        if response is not None:
            self.reply.set_result(response)

    def _fail(self, error: LostError) -> None:
        if not self.reply.done():
            self.reply.set_exception(error)


async def request(sock: socket.socket, method: str, data: bytes, timeout: float) -> Response:
    """Send one request and return its answer, in at most ``timeout`` seconds; raises LostError."""
    pending = HttpExchange(sock, method, data, timeout)
    pending.send()
    try:
        return await pending.reply
    finally:
        pending.close()
