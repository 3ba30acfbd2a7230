"""One packet with descriptors over SOCK_SEQPACKET. Standard library only: the launcher uses it too."""

from __future__ import annotations

import array
import errno
import os
import socket
from collections.abc import Sequence

MAX_PACKET = 160 * 1024
MAX_FDS = 64


class TruncatedPacketError(OSError):
    """A packet that did not arrive whole. ``payload``: its text when only descriptors were lost, for want of room."""

    def __init__(self, payload: bytes) -> None:
        super().__init__(errno.EMSGSIZE, "truncated packet")
        self.payload = payload


def send_packet(sock: socket.socket, payload: bytes, fds: Sequence[int] = ()) -> None:
    """Send one packet with descriptors; raises BlockingIOError when a non-blocking peer is full."""
    ancillary = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))] if fds else []
    sock.sendmsg([payload], ancillary, socket.MSG_NOSIGNAL)


def receive_packet(sock: socket.socket) -> tuple[bytes, list[int]]:
    """Receive one packet and its descriptors (close-on-exec); ``b""`` means the peer is gone."""
    payload, ancillary, flags, _ = sock.recvmsg(MAX_PACKET, socket.CMSG_SPACE(MAX_FDS * 4), socket.MSG_CMSG_CLOEXEC)
    fds = array.array("i")
    for level, kind, data in ancillary:
        if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
            fds.frombytes(data[: len(data) - len(data) % fds.itemsize])
    if flags & (socket.MSG_TRUNC | socket.MSG_CTRUNC):
        for fd in fds:
            os.close(fd)
        raise TruncatedPacketError(b"" if flags & socket.MSG_TRUNC else payload)
    return payload, list(fds)
