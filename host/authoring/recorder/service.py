"""The recorder's process: the proxy through which a private daemon's broker lets connections out.

``python -I -m host.authoring.recorder.service --listener-fd L --control-fd C --filter-fd F --peers-fd P
[--recording-fd R]``: a process without any privilege, hardened as the broker is. It serves the user whom its parent
names, and nobody else of the host. With a recording it answers from that and connects nowhere: it is started in a
network namespace that leads nowhere. Without one it passes requests on to the address that the broker has resolved and
checked, whose certificate it checks as the plugin would have to, and tells its parent of every exchange.

The authority that its certificates come from is made here, and its key never leaves this process.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import ssl
import threading

from host.authoring.recorder.authority import Authority
from host.authoring.recorder.exchange import Exchanges, Report
from host.authoring.recorder.tape import RecordingError, Redactor, Tape
from isolator.broker.hardening import harden
from isolator.linux.unprivileged import inherited
from isolator.policy.destinations import normal_name

_MOST_CONNECTIONS = 32
_HANDSHAKE_SECONDS = 15.0
_MAX_HEAD = 8192
_TLS = b"\x16"
"""First byte of a TLS connection."""


class Recorder:
    """The listener, and what its connections share."""

    def __init__(self, listener: socket.socket, control: socket.socket, peers: int, tape: Tape | None) -> None:
        self._listener, self._control, self._peers = listener, control, peers
        self._authority = Authority()
        self._exchanges = Exchanges(tape, Redactor(), self._tell)
        self._lock = threading.Lock()
        self._contexts = threading.Lock()
        self._places = threading.BoundedSemaphore(_MOST_CONNECTIONS)
        self._peer = -1

    def serve(self) -> None:
        """Serve until the parent closes its end of the control connection."""
        self._tell({"certificate": self._authority.pem})
        threading.Thread(target=self._accept, daemon=True).start()
        with self._control.makefile("rb") as orders:
            for line in orders:
                order = json.loads(line)
                self._peer = order.get("peer", self._peer)
                if "secrets" in order:
                    self._exchanges.know(order["secrets"])
                self._tell({"heard": True})

    def _tell(self, report: Report) -> None:
        with self._lock, contextlib.suppress(OSError):
            self._control.sendall(json.dumps(report).encode() + b"\n")

    def _accept(self) -> None:
        while True:
            self._places.acquire()
            connection, peer = self._listener.accept()
            threading.Thread(target=self._serve_one, args=(connection, peer), daemon=True).start()

    def _serve_one(self, connection: socket.socket, peer: tuple[str, int]) -> None:
        try:
            with connection:
                if self._uid_of(peer) == self._peer >= 0:
                    connection.settimeout(_HANDSHAKE_SECONDS)
                    self._proxy(connection)
        except (OSError, ValueError):
            pass  # it has ended
        finally:
            self._places.release()

    def _uid_of(self, peer: tuple[str, int]) -> int:
        """The user whose socket is at the other end: a connection from this host has both its ends in the table."""
        ends = [_as_in_proc(*peer), _as_in_proc(*self._listener.getsockname()[:2])]
        with os.fdopen(os.dup(self._peers)) as table:
            table.seek(0)
            for line in table:
                fields = line.split()
                if fields[1:3] == ends:
                    return int(fields[7])
        return -1

    def _proxy(self, connection: socket.socket) -> None:
        host, port = _target(connection)
        connection.sendall(b"HTTP/1.1 200 Connected\r\n\r\n")
        first = connection.recv(1, socket.MSG_PEEK)
        if first == _TLS:
            self._tls(connection, host, port)
        elif first:
            self._exchanges.serve(connection, "http", host, port, None)

    def _tls(self, connection: socket.socket, host: str, port: int) -> None:
        asked: list[str] = []

        def choose(tls: ssl.SSLSocket | ssl.SSLObject, name: str | None, _: ssl.SSLContext) -> int | None:
            found = normal_name(name or "")
            if found is None:
                return ssl.ALERT_DESCRIPTION_UNRECOGNIZED_NAME if name else None
            asked.append(found)
            tls.context = self._context(found)
            return None

        # A context of its own: the callback is the context's, and tells this connection's name.
        base = self._context(host, fresh=True)
        base.sni_callback = choose
        try:
            with base.wrap_socket(connection, server_side=True) as tls:
                self._exchanges.serve(tls, "https", host, port, asked[0] if asked else host)
        except ssl.SSLError as error:
            # The alert of a client comes with its first bytes, or in the place of them.
            if "ALERT" in (error.reason or ""):
                self._exchanges.pinned(asked[0] if asked else host, (error.reason or "").lower().replace("_", " "))

    def _context(self, host: str, *, fresh: bool = False) -> ssl.SSLContext:
        with self._contexts:
            return self._authority.fresh_context(host) if fresh else self._authority.context(host)


def _target(connection: socket.socket) -> tuple[str, int]:
    """The destination of a CONNECT, read to the end of its head and no byte further; raises ValueError."""
    head = b""
    while not head.endswith(b"\r\n\r\n"):
        byte = connection.recv(1)
        if not byte or len(head) > _MAX_HEAD:
            raise ValueError("no head")
        head += byte
    method, target, _ = head.split(b"\r\n", 1)[0].decode("ascii").split(" ")
    host, _, port = target.rpartition(":")
    if method != "CONNECT":
        raise ValueError("no CONNECT")
    return host.strip("[]"), int(port)


def _as_in_proc(address: str, port: int) -> str:
    """An address as /proc/net/tcp has it."""
    return f"{int.from_bytes(socket.inet_aton(address), 'little'):08X}:{port:04X}"


def _tape(fd: int | None) -> Tape | None:
    if fd is None:
        return None
    with os.fdopen(fd, "rb") as recording:
        return Tape(recording.read())


def main() -> None:
    """Entry point of the process."""
    fds = inherited()
    with os.fdopen(fds["filter"], "rb") as program:
        harden(program.read())
    control = socket.socket(fileno=fds["control"])
    try:
        tape = _tape(fds.get("recording"))
    except RecordingError as error:
        control.sendall(json.dumps({"fault": str(error)}).encode() + b"\n")
        return
    Recorder(socket.socket(fileno=fds["listener"]), control, fds["peers"], tape).serve()


if __name__ == "__main__":
    main()
