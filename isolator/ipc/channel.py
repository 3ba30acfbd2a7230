"""Messages between the daemon's own processes: JSON objects and descriptors over SOCK_SEQPACKET.

One socket pair per pair of processes, made before the child is exec'd, so there is no name to squat
and no peer to authenticate. Both ends may call and notify. A message is one packet:

    request      {"op": NAME, "id": N, ...fields}     answered once
    notification {"op": NAME, ...fields}              never answered
    reply        {"re": N, "ok": {...}} or {"re": N, "error": {...}}

Descriptors travel beside a message (SCM_RIGHTS, at most 64) and belong to the receiver from then on.
Packets are at most ``MAX_PACKET`` bytes; anything larger travels as a descriptor (a file or a memfd).
When the peer goes away every pending call fails with ``UnavailableError`` and ``closed`` is set.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import socket
from collections import deque
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from isolator.errors import IsolatorError, UnavailableError
from isolator.ipc.packet import MAX_FDS, MAX_PACKET, receive_packet, send_packet


@dataclass
class Message:
    """One message with the descriptors that came along; whoever handles it owns them."""

    fields: dict[str, Any]
    fds: list[int] = field(default_factory=list)

    def close(self) -> None:
        """Close every descriptor that was not taken out."""
        while self.fds:
            os.close(self.fds.pop())


Handler = Callable[[Message], Awaitable["Message | dict[str, Any] | None"]]


def pair() -> tuple[socket.socket, socket.socket]:
    """A connected SOCK_SEQPACKET pair, close-on-exec, with buffers that hold a full packet."""
    a, b = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    for end in (a, b):
        end.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 2 * MAX_PACKET)
    return a, b


__all__ = ["MAX_FDS", "MAX_PACKET", "Channel", "Handler", "Message", "pair", "receive_packet", "send_packet"]


class Channel:
    """One end of a pair on the running event loop. ``handlers`` maps an op to its coroutine."""

    def __init__(self, sock: socket.socket, handlers: Mapping[str, Handler] | None = None, *, name: str = "peer"):
        sock.setblocking(False)
        self.name = name
        self.closed = asyncio.Event()
        self._sock = sock
        self._handlers: dict[str, Handler] = dict(handlers or {})
        self._loop = asyncio.get_running_loop()
        self._pending: dict[int, asyncio.Future[Message]] = {}
        self._next = 0
        self._out: deque[tuple[bytes, list[int]]] = deque()
        self._full = False
        """The peer's buffer was, and the loop tells us when it is not."""
        self._tasks: set[asyncio.Task[None]] = set()
        self._loop.add_reader(sock, self._readable)

    def handle(self, op: str, handler: Handler) -> None:
        """Register or replace the handler of one op."""
        self._handlers[op] = handler

    async def call(
        self, op: str, /, *, fds: Sequence[int] = (), timeout: float | None = None, **fields: Any
    ) -> Message:
        """Ask and wait for the answer; raises the error the peer raised, or UnavailableError if it is gone."""
        if self.closed.is_set():
            raise UnavailableError(self.name, "not running at the moment", "try again")
        self._next += 1
        number = self._next
        future: asyncio.Future[Message] = self._loop.create_future()
        self._pending[number] = future
        try:
            self._send({"op": op, "id": number, **fields}, fds)
            async with asyncio.timeout(timeout):
                return await future
        except TimeoutError:
            raise UnavailableError(self.name, f"no answer to {op} in {timeout:g} s", "see its log") from None
        finally:
            self._pending.pop(number, None)

    def notify(self, op: str, /, *, fds: Sequence[int] = (), **fields: Any) -> None:
        """Tell without waiting; silently dropped when the peer is gone."""
        if not self.closed.is_set():
            self._send({"op": op, **fields}, fds)

    def close(self) -> None:
        """Close this end; pending calls fail, handlers that still run are cancelled."""
        if self.closed.is_set():
            return
        self.closed.set()
        self._loop.remove_reader(self._sock)
        self._loop.remove_writer(self._sock)
        self._sock.close()
        for _, fds in self._out:
            _close_all(fds)
        self._out.clear()
        for future in self._pending.values():
            if not future.done():
                future.set_exception(UnavailableError(self.name, "went away in the middle of a request", "try again"))
        for task in self._tasks:
            task.cancel()

    def _send(self, message: dict[str, Any], fds: Sequence[int]) -> None:
        payload = json.dumps(message, separators=(",", ":")).encode()
        if len(payload) > MAX_PACKET:
            raise IsolatorError("internal message", f"{len(payload)} bytes exceed {MAX_PACKET}", "pass it as a file")
        # The caller may close its descriptors at once, so what waits in the queue is a duplicate.
        self._out.append((payload, [os.dup(fd) for fd in fds]))
        self._flush()

    def _flush(self) -> None:
        while self._out:
            payload, fds = self._out[0]
            try:
                send_packet(self._sock, payload, fds)
            except BlockingIOError:
                self._loop.add_writer(self._sock, self._flush)
                self._full = True
                return
            except OSError:
                self.close()
                return
            self._out.popleft()
            _close_all(fds)
        if self._full:
            self._loop.remove_writer(self._sock)
            self._full = False

    def _readable(self) -> None:
        for _ in range(64):
            if self.closed.is_set():
                return
            try:
                payload, fds = receive_packet(self._sock)
            except BlockingIOError:
                return
            except OSError:
                payload, fds = b"", []
            if not payload:
                self.close()
                return
            self._dispatch(Message(json.loads(payload), fds))

    def _dispatch(self, message: Message) -> None:
        if "re" in message.fields:
            future = self._pending.get(message.fields["re"])
            if future is None or future.done():
                message.close()
            elif "error" in message.fields:
                message.close()
                future.set_exception(IsolatorError.from_json(message.fields["error"]))
            else:
                future.set_result(Message(message.fields.get("ok") or {}, message.fds))
            return
        task = self._loop.create_task(self._serve(message))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _serve(self, message: Message) -> None:
        op, number = message.fields.get("op"), message.fields.get("id")
        answer: dict[str, Any]
        fds: list[int] = []
        try:
            handler = self._handlers.get(str(op))
            if handler is None:
                raise IsolatorError(f"{self.name}: {op}", "no such operation", "versions of the daemon may be mixed")
            result = await handler(message)
            if isinstance(result, Message):
                answer, fds = {"re": number, "ok": result.fields}, result.fds
            else:
                answer = {"re": number, "ok": result or {}}
        except IsolatorError as error:
            answer = {"re": number, "error": error.to_json()}
        except OSError as error:
            answer = {"re": number, "error": IsolatorError(str(op), error.strerror or str(error)).to_json()}
        except Exception as error:  # the peer must get an answer whatever happened; the loop logs the rest
            self._loop.call_exception_handler({"message": f"{self.name}: {op} failed", "exception": error})
            answer = {"re": number, "error": IsolatorError(str(op), f"{type(error).__name__}: {error}").to_json()}
        finally:
            message.close()
        if number is not None and not self.closed.is_set():
            self._send(answer, fds)
        _close_all(fds)


def _close_all(fds: list[int]) -> None:
    while fds:
        with contextlib.suppress(OSError):
            os.close(fds.pop())
