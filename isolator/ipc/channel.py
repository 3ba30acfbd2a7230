"""Messages between the daemon's own processes: JSON objects and descriptors over SOCK_SEQPACKET.

One socket pair per pair of processes, made before the child is exec'd, so there is no name to squat
and no peer to authenticate. Both ends may call and notify. A message is one packet:

    request      {"op": NAME, "id": N, ...fields}     answered once
    notification {"op": NAME, ...fields}              never answered
    reply        {"re": N, "ok": {...}} or {"re": N, "error": {...}}

``fields`` are the body of a type in ``messages``: ``ask`` and ``tell`` send one, ``Request.on`` makes the handler
that receives one. Descriptors travel beside a message (SCM_RIGHTS, at most 64) and belong to the receiver from then on.
Packets are at most ``MAX_PACKET`` bytes; anything larger travels as a descriptor (a file or a memfd).
Nothing here grows without a bound: a peer that does not read, so that more than ``MOST_WAITING`` waits for it, is given
up, and of its requests those beyond ``MOST_AT_ONCE`` are refused. ``alive`` is answered by the channel itself.
When the peer goes away every pending call fails with ``UnavailableError`` and ``closed`` is set. A peer that sends
something else than messages is broken or was taken over: its channel is closed.
"""

from __future__ import annotations

import asyncio
import errno
import json
import logging
import os
import socket
from collections import deque
from collections.abc import Collection, Mapping, Sequence
from typing import TYPE_CHECKING, Any, cast

from isolator.errors import IsolatorError, UnavailableError
from isolator.ipc.body import AtOnce, Handler, Json, Message, R, Request, WithFds
from isolator.ipc.packet import (
    MAX_FDS,
    MAX_PACKET,
    TruncatedPacketError,
    drop_packet,
    pair,
    receive_packet,
    send_packet,
)
from isolator.linux.descriptors import close_all

if TYPE_CHECKING:
    from isolator.ipc.handover import ChannelState

logger = logging.getLogger(__name__)

ALIVE = "alive"
"""A request that every channel answers by itself: its process's event loop turns."""
MOST_WAITING, MOST_WAITING_FDS = 64 << 20, 4096
"""Bytes and descriptors that may wait for a peer to read."""
REST = 0.2
"""Seconds until a notification is looked at again whose descriptors found no room."""
MOST_AT_ONCE, MOST_BYTES_AT_ONCE = 8192, 64 << 20
"""Requests of a peer that are served at the same time, and their bytes."""
NO_OPERATION = "no such operation"
"""Why a request is refused that the peer does not know."""

_encode = json.JSONEncoder(separators=(",", ":")).encode

__all__ = [
    "MAX_FDS", "MAX_PACKET", "NO_OPERATION", "Channel", "Handler", "Message", "pair", "receive_packet", "send_packet",
]  # fmt: skip


class Channel:
    """One end of a pair on the running event loop. ``handlers`` maps an op to its coroutine.

    ``before``: the state of the same end before this process's exec.
    """

    def __init__(
        self,
        sock: socket.socket,
        handlers: Mapping[str, Handler] | None = None,
        *,
        name: str = "peer",
        before: ChannelState | None = None,
    ):
        sock.setblocking(False)
        self.name = name
        self.closed = asyncio.Event()
        self._sock = sock
        self._handlers: dict[str, Handler] = dict(handlers or {})
        self._loop = asyncio.get_running_loop()
        self._pending: dict[int, asyncio.Future[Message]] = {}
        self._next = before.calls if before is not None else 0
        self._out: deque[tuple[bytes, list[int]]] = deque()
        self._out_bytes = self._out_fds = 0
        self._served_bytes = 0
        self._full = False
        """The peer's buffer was full, and the loop calls when it has room."""
        self._tasks: dict[asyncio.Task[None], Message] = {}
        """The requests that are being served."""
        self._to_begin: set[asyncio.Future[Any]] = set()
        """Futures that come before all that is read: tasks whose first step is to come, answers not yet heard of."""
        self._held: list[Json] = []
        self._holding = False
        """Requests are kept in ``_held`` instead of being served."""
        self._exhausted = False
        """A notification waits for descriptors to be free, and that is in the log."""
        self._listen()
        for fields in before.held if before is not None else ():
            self._begin(Message(fields), 0)

    def handle(self, op: str, handler: Handler) -> None:
        """Register or replace the handler of one op."""
        self._handlers[op] = handler

    async def ask(self, request: Request[R], *, fds: Sequence[int] = (), timeout: float | None = None) -> R:
        """Send a request and return its reply.

        Raises the error that the peer raised, UnavailableError when it went away or did not answer within ``timeout``
        seconds, UsageError when the answer is not of the reply's type.
        """
        answer = await self.call(request.op, fds=fds, timeout=timeout, **request.to_json())
        answer.close()
        return request.read_reply(answer.fields)

    async def ask_fds(
        self, request: Request[R], *, fds: Sequence[int] = (), timeout: float | None = None
    ) -> WithFds[R]:
        """As ``ask``, with the descriptors that came along: the caller's from then on."""
        answer = await self.call(request.op, fds=fds, timeout=timeout, **request.to_json())
        try:
            return WithFds(request.read_reply(answer.fields), answer.fds)
        except BaseException:
            answer.close()
            raise

    def tell(self, request: Request[Any], *, fds: Sequence[int] = ()) -> None:
        """Send a request as a notification, which is never answered; silently dropped when the peer is gone."""
        self.notify(request.op, fds=fds, **request.to_json())

    async def call(
        self, op: str, /, *, fds: Sequence[int] = (), timeout: float | None = None, **fields: Any
    ) -> Message:
        """``ask`` without types."""
        answer = self._begin_call({"op": op, **fields}, fds, timeout)
        try:
            return await answer
        except asyncio.CancelledError:
            if answer.done() and not answer.cancelled() and answer.exception() is None:
                answer.result().close()  # it came at that very moment
            raise

    def begin(self, request: Request[Any]) -> asyncio.Future[Message]:
        """Send a request now, not when a coroutine runs; its answer, or ``ask``'s error, is for whoever begins it."""
        return self._begin_call({"op": request.op, **request.to_json()}, (), None)

    def _begin_call(
        self, message: dict[str, Any], fds: Sequence[int], timeout: float | None
    ) -> asyncio.Future[Message]:  # fmt: skip
        if self.closed.is_set():
            raise UnavailableError(self.name, "not running at the moment", "try again")
        self._next += 1
        number = self._next
        answer: asyncio.Future[Message] = self._loop.create_future()
        self._pending[number] = answer  # before it is sent: a peer that is gone fails it
        try:
            self._send({**message, "id": number}, fds)
        except BaseException:
            del self._pending[number]
            raise
        timer = None
        if timeout is not None:
            timer = self._loop.call_later(timeout, self._expire, answer, message["op"], timeout)

        def answered(_: asyncio.Future[Message]) -> None:
            self._pending.pop(number, None)
            if timer is not None:
                timer.cancel()

        answer.add_done_callback(answered)
        return answer

    def _expire(self, answer: asyncio.Future[Message], op: str, timeout: float) -> None:
        if not answer.done():
            why = f"no answer to {op} in {timeout:g} s"
            answer.set_exception(UnavailableError(self.name, why, "see its log"))

    def notify(self, op: str, /, *, fds: Sequence[int] = (), **fields: Any) -> None:
        """``tell`` without types."""
        if not self.closed.is_set():
            self._send({"op": op, **fields}, fds)

    def serves_beside(self, ops: Collection[str]) -> bool:
        """Whether one of the peer's requests is not answered that has none of these ops."""
        return any(message.fields["op"] not in ops for message in self._tasks.values())

    def close(self) -> None:
        """Close this end; pending calls fail, handlers that still run are cancelled."""
        if self.closed.is_set():
            return
        self.closed.set()
        self._loop.remove_reader(self._sock)
        self._loop.remove_writer(self._sock)
        self._sock.close()
        for _, fds in self._out:
            close_all(fds)
        self._out.clear()
        self._out_bytes = self._out_fds = 0
        for future in self._pending.values():
            if not future.done():
                future.set_exception(UnavailableError(self.name, "went away in the middle of a request", "try again"))
        for task in self._tasks:
            task.cancel()

    # --- at rest -----------------------------------------------------------------------------------------------

    def hold(self, repeated: Collection[str] = ()) -> None:
        """Begin no request from now on, but keep those that come; answers are taken as before.

        Of the requests that are being served those with an op of ``repeated`` are broken off, to be begun again.
        """
        self._holding = True
        self._held += (message.fields for message in self._cancel(repeated))

    def break_off(self, ops: Collection[str], unanswered: Collection[str] = ()) -> None:
        """Answer the requests with one of these ops that are being served that they are not done.

        The handlers of those ``unanswered`` are cancelled, and the peer hears nothing of them.
        """
        for message in self._cancel(ops):
            self._refuse(message, "was broken off", "ask again")
        self._cancel(unanswered)

    def _cancel(self, ops: Collection[str]) -> list[Message]:
        """Cancel what serves requests with one of these ops; returns those, none of which was answered."""
        cancelled = []
        for task, message in list(self._tasks.items()):
            # One that has just answered is listed for a turn of the loop more, and cannot be cancelled.
            if message.fields["op"] in ops and not task.cancelling() and task.cancel():
                cancelled.append(message)
        return cancelled

    @property
    def unsettled(self) -> str:
        """Why this end cannot be handed over yet: what is under way, or unsent; empty when nothing is."""
        if self._tasks:
            return f"{self.name}: {', '.join(sorted({one.fields['op'] for one in self._tasks.values()}))}"
        return f"{self.name}: an answer" if self._pending or self._out or self._exhausted else ""

    def hand_over(self) -> ChannelState:
        """The state of this end. What comes from now on is left in the socket, for whoever adopts it."""
        from isolator.ipc.handover import ChannelState

        return ChannelState(socket=self._sock.fileno(), calls=self._next, held=tuple(self._held))

    def leave_unread(self) -> None:
        """Read nothing until ``go_on``."""
        self._loop.remove_reader(self._sock)

    def go_on(self) -> None:
        """Serve the requests that were held, and those that come."""
        held, self._held, self._holding = self._held, [], False
        if not self.closed.is_set():
            self._listen()
            for fields in held:
                self._begin(Message(fields), 0)

    def _send(self, message: dict[str, Any], fds: Sequence[int]) -> None:
        payload = _encode(message).encode()
        if len(payload) > MAX_PACKET:
            raise IsolatorError("internal message", f"{len(payload)} bytes exceed {MAX_PACKET}", "pass it as a file")
        if not self._out and self._sent(payload, fds):
            return
        # The caller may close its descriptors at once, so what waits in the queue is a duplicate.
        self._out.append((payload, _duplicates(fds)))
        self._out_bytes += len(payload)
        self._out_fds += len(fds)
        if self._out_bytes > MOST_WAITING or self._out_fds > MOST_WAITING_FDS:
            logger.error("%s does not read what it is sent (%d messages wait)", self.name, len(self._out))
            self.close()

    def _sent(self, payload: bytes, fds: Sequence[int]) -> bool:
        """Send a packet; False: it has to wait for the peer, and ``_flush`` is called when there is room.

        Raises OSError for a descriptor that is not open.
        """
        try:
            send_packet(self._sock, payload, fds)
        except BlockingIOError:
            if not self._full:
                self._loop.add_writer(self._sock, self._flush)
                self._full = True
            return False
        except OSError as error:
            if error.errno == errno.EBADF:
                raise
            self._loop.call_soon(self._read_out)
        return True

    def _read_out(self) -> None:
        """Close, as the peer takes nothing any more, behind all that it has sent."""
        if not self.closed.is_set() and self._loop.remove_reader(self._sock):  # else it is read out by others, or later
            if self._readable():
                self._listen()
                self._loop.call_soon(self._read_out)
            elif not self._exhausted:  # else what waits for descriptors is read later, and the end behind it
                self._loop.call_soon(self.close)

    def _flush(self) -> None:
        while self._out:
            payload, fds = self._out[0]
            if not self._sent(payload, fds) or self.closed.is_set():
                return
            self._out.popleft()
            self._out_bytes -= len(payload)
            self._out_fds -= len(fds)
            close_all(fds)
        if self._full:
            self._loop.remove_writer(self._sock)
            self._full = False

    def _readable(self) -> bool:
        """Take what there is, of much a part; returns whether there may be more."""
        for _ in range(64):
            if self.closed.is_set():
                return False
            try:
                payload, fds = receive_packet(self._sock, peek=True)
            except BlockingIOError:
                return False
            except TruncatedPacketError as error:
                if not error.payload:
                    self.close()
                elif self._without_descriptors(error):
                    drop_packet(self._sock)
                    continue
                return False
            except OSError:
                payload, fds = b"", []
            if not payload:
                # The peer's last words are begun first: what has not begun when this end closes never is.
                self._loop.remove_reader(self._sock)
                self._loop.call_soon(self.close)
                return False
            drop_packet(self._sock)
            self._exhausted = False
            try:
                self._dispatch(Message(_parse(payload), fds), len(payload))
            except (TypeError, ValueError, RecursionError) as error:
                close_all(fds)
                logger.error("%s sent no message: %s", self.name, ascii(str(error))[:200])
                self.close()
        return True

    def _without_descriptors(self, error: TruncatedPacketError) -> bool:
        """Fail one request or answer whose descriptors found no room in this process; the channel goes on.

        False: it is a notification, which nobody would send again. It waits, and with it what comes behind it.
        """
        full = UnavailableError(self.name, "no descriptor is free to receive what came", "see 'ulimit -n'").to_json()
        try:
            fields = _parse(error.payload)
            if "re" in fields:
                self._settle(Message({"re": fields["re"], "error": full}))
            elif isinstance(fields.get("id"), int):
                self._send({"re": fields["id"], "error": full}, ())
            else:
                if not self._exhausted:
                    self._exhausted = True
                    logger.error("no descriptor is free to receive what %s sent; it waits", self.name)
                self._loop.remove_reader(self._sock)
                self._loop.call_later(REST, self._listen)
                return False
        except (TypeError, ValueError, RecursionError):
            self.close()
            return False
        return not self.closed.is_set()

    def _listen(self) -> None:
        if not self.closed.is_set():
            self._loop.add_reader(self._sock, self._readable)

    def _dispatch(self, message: Message, size: int) -> None:
        """Settle the call that is answered, or start a handler; raises TypeError for what is neither."""
        if "re" in message.fields:
            self._settle(message)
            return
        if not isinstance(message.fields.get("op"), str) or not isinstance(message.fields.get("id"), int | None):
            raise TypeError("neither a request nor a reply")
        if message.fields["op"] == ALIVE:
            message.close()
            self._send({"re": message.fields.get("id"), "ok": {}}, ())
            return
        if len(self._tasks) >= MOST_AT_ONCE or self._served_bytes + size > MOST_BYTES_AT_ONCE:
            self._refuse(message)
        elif self._holding and not message.fds:
            if len(self._held) >= MOST_AT_ONCE:
                self._refuse(message)
            else:
                self._held.append(message.fields)
        else:
            self._begin(message, size)

    def _begin(self, message: Message, size: int) -> None:
        if not self._to_begin and isinstance(self._handlers.get(message.fields["op"]), AtOnce):
            self._serve_at_once(message)
            return
        task = self._loop.create_task(self._serve(message))
        self._tasks[task] = message
        self._to_begin.add(task)
        self._served_bytes += size
        task.add_done_callback(lambda done: self._served(done, size))

    def _serve_at_once(self, message: Message) -> None:
        """Serve a request whose handler waits for nothing: a task, its turn and its end would cost more than that."""
        try:
            self._serve(message).send(None)
        except StopIteration:
            pass
        except Exception as error:
            context = {"message": f"{self.name}: {message.fields['op']} failed", "exception": error}
            self._loop.call_exception_handler(context)

    def _served(self, task: asyncio.Task[None], size: int) -> None:
        self._to_begin.discard(task)
        self._tasks.pop(task).close()  # a task that is cancelled before its first step has closed nothing
        self._served_bytes -= size

    def _refuse(
        self, message: Message, why: str = "too many requests at once", remedy: str = "ask again when some are answered"
    ) -> None:
        message.close()
        number = message.fields.get("id")
        if number is not None:
            self._send({"re": number, "error": UnavailableError(self.name, why, remedy).to_json()}, ())

    def _settle(self, message: Message) -> None:
        future = self._pending.get(message.fields["re"])
        error, result = message.fields.get("error"), message.fields.get("ok") or {}
        if not isinstance(result, dict) or not isinstance(error, dict | None):
            raise TypeError("neither a result nor an error")
        if future is None or future.done():
            message.close()
            return
        if error is not None:
            message.close()
            future.set_exception(IsolatorError.from_json(error))
        else:
            future.set_result(Message(result, message.fds))
        self._to_begin.add(future)
        future.add_done_callback(self._to_begin.discard)  # the last of them: who waited has been woken by then

    async def _serve(self, message: Message) -> None:
        if self._to_begin:
            self._to_begin.discard(cast(asyncio.Task[None], asyncio.current_task()))
        op, number = message.fields["op"], message.fields.get("id")
        answer: dict[str, Any]
        fds: list[int] = []
        try:
            handler = self._handlers.get(op)
            if handler is None:
                what = f"{self.name}: {op[:80]}"
                raise IsolatorError(what, NO_OPERATION, "versions of the daemon may be mixed")
            result = await handler(message)
            if isinstance(result, Message):
                answer, fds = {"re": number, "ok": result.fields}, result.fds
            else:
                answer = {"re": number, "ok": result or {}}
        except IsolatorError as error:
            answer = {"re": number, "error": error.to_json()}
        except OSError as error:
            answer = {"re": number, "error": IsolatorError(op, error.strerror or str(error)).to_json()}
        except Exception as error:  # the peer must get an answer whatever happened; the loop logs the rest
            self._loop.call_exception_handler({"message": f"{self.name}: {op} failed", "exception": error})
            answer = {"re": number, "error": IsolatorError(op, f"{type(error).__name__}: {error}").to_json()}
        finally:
            message.close()
        try:
            if number is not None and not self.closed.is_set():
                self._send(answer, fds)
        except IsolatorError as error:  # too long, as an error is that repeats what the peer sent
            self._send({"re": number, "error": error.to_json()}, ())
        except OSError as error:  # no descriptor is free for the duplicates
            refused = IsolatorError(op, error.strerror or str(error)).to_json()
            self._send({"re": number, "error": refused}, ())
        finally:
            close_all(fds)


def _duplicates(fds: Sequence[int]) -> list[int]:
    made: list[int] = []
    try:
        for fd in fds:
            made.append(os.dup(fd))
    except OSError:
        close_all(made)
        raise
    return made


def _parse(payload: bytes) -> dict[str, Any]:
    fields = json.loads(payload.decode())
    if not isinstance(fields, dict):
        raise TypeError("not a JSON object")
    return fields
