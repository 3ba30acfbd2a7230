"""A client of a hostile runner's own making."""

from __future__ import annotations

import contextlib
import os
import socket
from collections.abc import Iterator, Sequence
from pathlib import Path

from isolator.ipc.run_request import pack, unpack
from tests.support.timeouts import seconds

NULL = ("/dev/null", os.O_RDWR)


@contextlib.contextmanager
def acting_as(uid: int, gid: int | None = None) -> Iterator[None]:
    """With the effective ids of a user: those that files are opened, and sockets connected, with."""
    groups = os.getgroups()
    os.setgroups([])
    os.setresgid(-1, uid if gid is None else gid, -1)
    os.setresuid(-1, uid, -1)
    try:
        yield
    finally:
        os.setresuid(-1, 0, -1)
        os.setresgid(-1, 0, -1)
        os.setgroups(groups)


def connect(root: Path, uid: int, gid: int | None = None) -> socket.socket:
    """A connection of a user's to the daemon's socket for runs."""
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    try:
        with acting_as(uid, gid):
            sock.connect(str(root / "run/isolator/run.sock"))  # blocks while others wait to be accepted
        sock.settimeout(seconds(60))
    except BaseException:
        sock.close()
        raise
    return sock


def answer(sock: socket.socket) -> dict[str, str]:
    """The daemon's last word; empty if it has closed the connection without one."""
    while True:
        try:
            packet = sock.recv(1 << 16)
        except ConnectionResetError:
            continue
        fields = dict(unpack(packet)) if packet else {}
        if "denied" not in fields:
            return fields


def send(sock: socket.socket, packet: bytes, fds: Sequence[int] = ()) -> None:
    """One packet; what does not get there any more is the test's to notice."""
    with contextlib.suppress(BrokenPipeError, ConnectionResetError):
        socket.send_fds(sock, [packet], list(fds))


def request(
    root: Path,
    uid: int,
    fields: Sequence[tuple[str, str]],
    files: Sequence[tuple[str, int]] = (),
    *,
    streams: Sequence[tuple[str, int]] = (NULL, NULL, NULL),
    gid: int | None = None,
) -> dict[str, str]:
    """Send a request with files opened by the user, and return the answer; the command is ``true``."""
    with connect(root, uid, gid) as sock:
        with acting_as(uid, gid):
            fds = [os.open(path, flags | os.O_CLOEXEC | os.O_NONBLOCK) for path, flags in (*streams, *files)]
        try:
            send(sock, pack([*fields, ("argument", "true")]), fds)
        finally:
            for fd in fds:
                os.close(fd)
        return answer(sock)
