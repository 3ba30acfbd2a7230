"""The control socket from the other side, blocking and light: what the command line uses.

Imports nothing heavy, so that a command that only asks the daemon something answers at once.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import socket
import struct
from collections.abc import Iterator
from types import TracebackType
from typing import Any

from isolator.errors import DeniedError, IsolatorError, UnavailableError
from isolator.paths import Paths


class Client:
    """One connection to the daemon; a context manager."""

    def __init__(self, root: str | os.PathLike[str] | None = None, *, timeout: float | None = 150.0) -> None:
        self.path = Paths.of(root).control_socket
        self._next = 0
        self._buffer = b""
        self._early: list[dict[str, Any]] = []
        self._watched: int | None = None
        self._sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
        try:
            self._connect(timeout)
        except BaseException:
            self._sock.close()
            raise

    def __enter__(self) -> Client:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.close()

    def call(self, method: str, /, **params: Any) -> dict[str, Any]:
        """Ask and wait; raises the error the daemon raised."""
        self._next += 1
        number = self._next
        request = {"jsonrpc": "2.0", "method": method, "params": params, "id": number}
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):  # it may have said why before it closed
            self._sock.sendall(json.dumps(request, separators=(",", ":")).encode() + b"\n")
        while True:
            message = self._receive()
            if message is None:
                raise UnavailableError("the daemon", "closed the connection", "see its log, then try again")
            if "method" in message:
                self._early.append(message)
                continue
            if message.get("id") not in (number, None):
                continue
            if "error" in message:
                error = message["error"]
                data = error.get("data")
                raise IsolatorError.from_json(data) if data else IsolatorError(method, str(error.get("message")))
            result = message.get("result")
            return result if isinstance(result, dict) else {}

    def notifications(self, *, watched: int | None = None) -> Iterator[dict[str, Any]]:
        """Parameters of the notifications that arrive, until the daemon closes; waits for as long as it takes.

        Ends also when ``watched``, a descriptor that is written to, has lost its reader.
        """
        self._sock.settimeout(None)
        self._watched = watched
        while True:
            message = self._early.pop(0) if self._early else self._receive()
            if message is None:
                return
            if "method" in message:
                yield message.get("params", {})

    def close(self) -> None:
        """Close the connection."""
        self._sock.close()

    def _connect(self, timeout: float | None) -> None:
        # Python's own time-out makes the socket non-blocking, and a full backlog would be EAGAIN at once (unix(7)).
        # The kernel's makes it wait for its turn.
        kernel = struct.pack("@ll", *divmod(int((timeout or 0) * 1e6), 1_000_000))
        self._sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, kernel)
        try:
            with reachable(str(self.path)) as path:
                self._sock.connect(path)
        except (FileNotFoundError, ConnectionRefusedError):
            raise UnavailableError(
                "the daemon is not running", f"no {self.path}", "start it with 'isolator serve'"
            ) from None
        except PermissionError:
            raise DeniedError(str(self.path), "you may not connect to the daemon", "use sudo") from None
        except BlockingIOError:
            raise UnavailableError("the daemon", "too many callers are waiting", "try again") from None
        self._sock.settimeout(timeout)

    def _receive(self) -> dict[str, Any] | None:
        while b"\n" not in self._buffer:
            if self._watched is not None and not self._something_before(self._watched):
                return None
            try:
                chunk = self._sock.recv(1 << 16)
            except TimeoutError:
                raise UnavailableError("the daemon", "does not answer", "see its log") from None
            except ConnectionResetError:
                chunk = b""
            if not chunk:
                return None
            self._buffer += chunk
        data, _, self._buffer = self._buffer.partition(b"\n")
        message = json.loads(data)
        assert isinstance(message, dict)
        return message

    def _something_before(self, watched: int) -> bool:
        poll = select.poll()
        poll.register(self._sock, select.POLLIN)
        poll.register(watched, select.POLLERR | select.POLLHUP)
        return all(fd != watched for fd, _ in poll.poll())


@contextlib.contextmanager
def reachable(path: str) -> Iterator[str]:
    """A name to connect to ``path`` by, however long it is: sun_path holds 107 bytes, a --root may be longer."""
    if len(os.fsencode(path)) <= 107:
        yield path
        return
    folder = os.open(os.path.dirname(path), os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        yield f"/proc/self/fd/{folder}/{os.path.basename(path)}"
    finally:
        os.close(folder)
