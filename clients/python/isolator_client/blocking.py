# SPDX-FileCopyrightText: Isolator contributors
# SPDX-License-Identifier: Apache-2.0
"""The client for code that waits: one connection, one call at a time.

It imports little, so that a command which asks the daemon one question starts at once: no asyncio, no threads. A
connection belongs to one thread. It is not made anew when the daemon goes away: the next call says so, and a new
``Client`` is a new connection. Serving methods of the host API takes ``AsyncClient``.

Notifications that arrive while a call waits for its answer are kept in order for ``notifications``.
"""

from __future__ import annotations

import select
import socket
import struct
import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Any, TypeVar

from isolator_client import address
from isolator_client.errors import DeniedError, UnavailableError
from isolator_client.protocol import TICKETED, Lines, Message, Notification, Reply, pauses, request

if TYPE_CHECKING:
    from isolator_client.calls import Call, Delivered, Emitted, Health, Staged
    from isolator_client.trail import Recorded, Trail

T = TypeVar("T")

CHUNK = 1 << 16


class Client:
    """A connection to the daemon, usable as a context manager.

    ``path`` is the control socket; left out, it is ``run/isolator/control.sock`` below ``root``, else below
    ``$ISOLATOR_ROOT``, else below ``/``. ``timeout`` are the seconds that the daemon may take to accept the connection,
    and again for each answer; None waits for as long as it takes. Raises UnavailableError when no daemon runs there or
    all its places are taken, DeniedError when this user cannot reach its socket.
    """

    def __init__(
        self,
        path: address.StrPath | None = None,
        *,
        root: address.StrPath | None = None,
        timeout: float | None = 150.0,
    ) -> None:
        self.path = address.control_socket(path, root)
        self.timeout = timeout
        self._numbers = 0
        self._lines = Lines()
        self._arrived: deque[Message] = deque()
        self._notifications: deque[Notification] = deque()
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
        try:
            self._connect()
        except BaseException:
            self._socket.close()
            raise

    def __enter__(self) -> Client:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """Close the connection."""
        self._socket.close()

    # Verbs

    def call(self, method: str, /, **params: Any) -> dict[str, Any]:
        """Ask for any verb of the control socket and return its answer. Raises the error that the daemon answers.

        Verbs that add or change a plugin take a ticket, which is fetched here: files that the parameters name are
        opened by this process, with its rights.
        """
        if method in TICKETED:
            from isolator_client import tickets

            name = tickets.updated(method, params)
            shown = None if name is None else self._ask("plugin.show", {"name": name}, self.timeout)
            params = tickets.with_ticket(self.path, method, params, shown)
        return self._ask(method, params, self.timeout)

    def emit(
        self,
        name: str,
        payload: Mapping[str, Any],
        *,
        dedupe_key: str | None = None,
        ttl: float | None = None,
        traceparent: str | None = None,
        on_behalf_of: str | None = None,
    ) -> Emitted:
        """Emit an event: when this returns, it is on disk with a delivery for each plugin that subscribed to it.

        ``dedupe_key`` makes a repetition harmless, ``ttl`` are the seconds after which it expires undelivered.
        ``on_behalf_of`` names the person for whom you emit it; it is in the trail, and gives no right. Raises
        UsageError when the event's schema refuses the payload, UnavailableError when nobody knows whether the event
        was taken.
        """
        from isolator_client import calls

        return self._do(calls.emit(name, payload, dedupe_key, ttl, traceparent, on_behalf_of))

    def wait(self, event_id: str, *, timeout: float = 30.0) -> list[Delivered]:
        """Wait until every delivery of an event is final, at most ``timeout`` seconds, and return how each stands."""
        from isolator_client import calls

        return self._do(calls.wait(event_id, timeout), timeout)

    def register_event(
        self,
        name: str,
        schema: Mapping[str, Any],
        *,
        order_by: str | None = None,
        version: int = 1,
        breaking: bool = False,
    ) -> None:
        """Register an event of the platform's own: the daemon checks its payloads by this JSON Schema.

        Deliveries with the same value in the field ``order_by`` go one after the other. A schema that plugins which
        subscribe would not expect is a UsageError, unless it is ``breaking``. Takes the role ``operator``.
        """
        from isolator_client import calls

        self._do(calls.register_event(name, schema, order_by, version, breaking))

    def unregister_event(self, name: str) -> None:
        """Have the daemon forget an event type; refused while plugins subscribe to it or its events wait."""
        from isolator_client import calls

        self._do(calls.unregister_event(name))

    def health(self, name: str | None = None) -> list[Health]:
        """Return how every plugin, or the one of this name, is doing."""
        from isolator_client import calls

        return self._do(calls.health(name))

    def stage(
        self,
        source: address.StrPath | int,
        *,
        name: str | None = None,
        hooks: Sequence[str] | None = None,
        update: str | None = None,
        config: Mapping[str, str] | None = None,
    ) -> Staged:
        """Hand a plugin over, and return what it asks for; nothing is registered yet.

        ``source`` is its folder, a package, or its binary (then with ``name`` and ``hooks``): a path, or a descriptor
        that this process has opened for reading. The daemon reads what it was handed with this user's rights, and opens
        no path.
        ``update`` names the registered plugin that it is a newer version of. Takes the role ``operator``.
        """
        from isolator_client import calls, tickets

        files, opened = tickets.handed(source)
        call = calls.stage(files, name=name, hooks=hooks, update=update, config=config)
        params = tickets.with_ticket(self.path, call.method, call.params, opened=opened)
        return call.read(self._ask(call.method, params, self.timeout))

    def commit(self, staged: Staged, *, config: Mapping[str, str] | None = None) -> dict[str, Any]:
        """Register what was staged, with its config; returns the plugin as ``plugins`` shows it."""
        from isolator_client import calls

        call = calls.commit(staged, config)
        return call.read(self.call(call.method, **call.params))

    def update(
        self, staged: Staged, *, config: Mapping[str, str] | None = None, approve: bool = False
    ) -> dict[str, Any]:
        """Exchange the version in use for the staged one; one that asks for more waits, unless ``approve``."""
        from isolator_client import calls

        call = calls.update(staged, config, approve)
        return call.read(self.call(call.method, **call.params))

    def discard(self, staged: Staged) -> None:
        """Forget what was staged."""
        from isolator_client import calls

        self._do(calls.discard(staged))

    def plugins(self) -> list[dict[str, Any]]:
        """List every plugin with its live figures."""
        from isolator_client import calls

        return self._do(calls.plugins())

    # What the daemon sends by itself

    def notifications(self, *, watched: int | None = None) -> Iterator[Notification]:
        """Yield what the daemon sends by itself, until it closes the connection; waits without a limit of time.

        Ends as well when the pipe or socket ``watched``, a descriptor this program writes to, has lost its reader.
        """
        while True:
            while self._notifications:
                yield self._notifications.popleft()
            message = self._receive(None, watched)
            if message is None:
                return
            if isinstance(message, Notification):
                self._notifications.append(message)

    def audit(self, *, after: int | None = None, lines: int = 0) -> Iterator[Recorded]:
        """Yield the records of the audit trail as they are written, over a connection of its own.

        The first is the one behind number ``after``; without it, the last ``lines`` that exist come first. A daemon
        that goes away is waited for, and the records resume behind the last one yielded. Raises IsolatorError at a
        break of the chain, and for an ``after`` that the trail does not reach: both mean that somebody changed it.
        Takes the role ``viewer``.
        """
        from isolator_client.trail import Trail

        trail, waiting = Trail(after, lines), pauses()
        while True:
            try:
                for record in self._follow(trail):
                    waiting = pauses()
                    yield record
            except UnavailableError:
                if not trail.begun:
                    raise
            time.sleep(next(waiting))

    def _follow(self, trail: Trail) -> Iterator[Recorded]:
        try:
            follower = Client(self.path, timeout=self.timeout)
        except DeniedError as error:
            raise trail.away(error) from None
        with follower:
            trail.begins(follower._do(trail.follow()))
            for notification in follower.notifications():
                yield from trail.take(notification)

    # The connection

    def _do(self, call: Call[T], longer: float = 0.0) -> T:
        patience = None if self.timeout is None else self.timeout + longer
        return call.read(self._ask(call.method, call.params, patience))

    def _ask(self, method: str, params: Mapping[str, Any], patience: float | None) -> dict[str, Any]:
        self._numbers += 1
        number = self._numbers
        line = request(number, method, params)
        end = None if patience is None else time.monotonic() + patience
        self._send(line, end)
        reply = self._reply(number, end)
        if reply.error is not None:
            raise reply.error
        return reply.result

    def _reply(self, number: int, end: float | None) -> Reply:
        while (message := self._receive(end)) is not None:
            if isinstance(message, Notification):
                self._notifications.append(message)
            elif message.number == number or (message.number is None and message.error is not None):
                return message
            # Anything else answers a call that was given up.
        raise UnavailableError("the daemon", "closed the connection", "try again; its log may say why")

    def _connect(self) -> None:
        # A time-out of Python's would make the socket non-blocking, and connecting to a full backlog would fail at
        # once. With the kernel's own, of which zero means for ever, the caller waits for its turn in the queue.
        microseconds = 0 if self.timeout is None else max(1, int(self.timeout * 1e6))
        limit = struct.pack("@ll", *divmod(microseconds, 1_000_000))
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, limit)
        try:
            with address.short_name(self.path) as name:
                self._socket.connect(name)
        except OSError as error:
            raise address.refusal(error, self.path) from None

    def _send(self, line: bytes, end: float | None) -> None:
        try:
            self._socket.settimeout(_left(end))
            self._socket.sendall(line, socket.MSG_NOSIGNAL)  # a program may have given SIGPIPE back its power to kill
        except TimeoutError:
            self.close()  # with half a line in it, the connection is of no more use
            raise _silent() from None
        except OSError:
            return  # a daemon that has closed the connection may have said why: whoever waits for the answer reads it

    def _receive(self, end: float | None, watched: int | None = None) -> Message | None:
        """Wait for the next message; None when the connection has ended, or ``watched`` has lost its reader."""
        while not self._arrived:
            if watched is not None and self._reader_left(watched):
                return None
            try:
                self._socket.settimeout(_left(end))
                data = self._socket.recv(CHUNK)
            except TimeoutError:
                raise _silent() from None
            except OSError:
                return None
            if not data:
                return None
            self._arrived.extend(self._lines.feed(data))
        return self._arrived.popleft()

    def _reader_left(self, watched: int) -> bool:
        """Wait until there is something to read: False; or ``watched`` has lost its reader first: True."""
        poll = select.poll()
        poll.register(self._socket, select.POLLIN)
        poll.register(watched, 0)  # POLLERR and POLLHUP are always reported
        return any(descriptor == watched for descriptor, _ in poll.poll())


def _left(end: float | None) -> float | None:
    """Seconds until the monotonic time ``end``; raises TimeoutError once it is over."""
    if end is None:
        return None
    left = end - time.monotonic()
    if left <= 0:
        raise TimeoutError
    return left


def _silent() -> UnavailableError:
    return UnavailableError("the daemon", "gave no answer in time", "its log may say why")
