"""One packet with descriptors over SOCK_SEQPACKET. Standard library only: the launcher uses it too.

A message of any length and number of descriptors is one packet where it fits in one. Else its payload travels in a
memfd, the first of its descriptors, and these in as many packets as they need: each begins with a zero byte, which no
JSON does, and says how many more descriptors follow.
"""

from __future__ import annotations

import array
import errno
import os
import socket
import struct
from collections.abc import Sequence

from isolator.linux.descriptors import owning

MAX_PACKET = 160 * 1024
MAX_FDS = 64
_TAKE, _LOOK = int(socket.MSG_CMSG_CLOEXEC), int(socket.MSG_CMSG_CLOEXEC | socket.MSG_PEEK)
_LACKING = int(socket.MSG_TRUNC | socket.MSG_CTRUNC)
_SIZE = int(socket.MSG_PEEK | socket.MSG_TRUNC)
"""Numbers: each ``|`` of an enumeration's members takes as long as a system call."""
_ROOM_FOR_FDS = socket.CMSG_SPACE(MAX_FDS * 4)
_NO_ROOM = bytearray(1)
"""Room for a byte that nobody looks at."""
_ROOM_FOR_MOST_FDS = socket.CMSG_SPACE(253 * 4)
"""Room for the descriptors of one packet of anybody's (the kernel's SCM_MAX_FD)."""

_PART = struct.Struct("=BI")
"""Zero, and the number of descriptors in the packets that follow."""


class TruncatedPacketError(OSError):
    """A packet that did not arrive whole. ``payload``: its text when only descriptors were lost, for want of room."""

    def __init__(self, payload: bytes) -> None:
        super().__init__(errno.EMSGSIZE, "truncated packet")
        self.payload = payload


def pair() -> tuple[socket.socket, socket.socket]:
    """A connected SOCK_SEQPACKET pair, close-on-exec, with buffers that hold a full packet."""
    a, b = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    for end in (a, b):
        end.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 2 * MAX_PACKET)
    return a, b


def send_packet(sock: socket.socket, payload: bytes, fds: Sequence[int] = ()) -> None:
    """Send one packet with descriptors; raises BlockingIOError when a non-blocking peer is full."""
    ancillary = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))] if fds else []
    sock.sendmsg([payload], ancillary, socket.MSG_NOSIGNAL)


def next_size(sock: socket.socket) -> int:
    """Bytes of the packet that is received next; 0 when the peer is gone, and otherwise as recv(2).

    For a buffer of ``MAX_PACKET`` the C library asks the kernel for memory at each packet, and gives it back: 12 µs.
    """
    return sock.recv_into(_NO_ROOM, 1, _SIZE)


def receive_anything(sock: socket.socket, most: int) -> tuple[bytes, list[int]]:
    """Receive a packet of a stranger's, up to ``most + 1`` bytes of it, with every descriptor that one can hold.

    None is left for the kernel to close on the way, which may take as long as who sent it likes (socket(7), SO_LINGER).
    """
    payload, ancillary, _, _ = sock.recvmsg(most + 1, _ROOM_FOR_MOST_FDS, _TAKE)
    if not ancillary:
        return payload, []
    fds = array.array("i")
    for level, kind, data in ancillary:
        if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
            fds.frombytes(data[: len(data) - len(data) % fds.itemsize])
    return payload, list(fds)


def receive_packet(sock: socket.socket, *, peek: bool = False) -> tuple[bytes, list[int]]:
    """Receive one packet and its descriptors (close-on-exec); ``b""`` means the peer is gone.

    With ``peek`` the packet stays, to be taken by ``drop_packet``: one whose descriptors found no room is not lost.
    That a peer has ended with packets unread is told ahead of what it has sent (ECONNRESET), once, and passed over.
    """
    try:
        return _receive_packet(sock, peek=peek)
    except ConnectionResetError:
        return _receive_packet(sock, peek=peek)


def _receive_packet(sock: socket.socket, *, peek: bool) -> tuple[bytes, list[int]]:
    how = _LOOK if peek else _TAKE
    room = min(next_size(sock), MAX_PACKET) or 1
    payload, ancillary, flags, _ = sock.recvmsg(room, _ROOM_FOR_FDS, how)
    fds = array.array("i")
    for level, kind, data in ancillary:
        if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
            fds.frombytes(data[: len(data) - len(data) % fds.itemsize])
    if flags & _LACKING:
        for fd in fds:
            os.close(fd)
        raise TruncatedPacketError(b"" if flags & socket.MSG_TRUNC else payload)
    return payload, list(fds)


def drop_packet(sock: socket.socket) -> None:
    """Take the packet that was looked at. Descriptors of it that were received stay open."""
    sock.recv(1)


def send_message(sock: socket.socket, payload: bytes, fds: Sequence[int] = ()) -> None:
    """Send a message as the module's text says; the payload begins with another byte than zero. Raises OSError."""
    if len(payload) <= MAX_PACKET and len(fds) <= MAX_FDS:
        send_packet(sock, payload, fds)
        return
    with owning(os.memfd_create("message", os.MFD_CLOEXEC)) as memory:
        with os.fdopen(memory, "wb", closefd=False) as file:
            file.write(payload)
        every = [memory, *fds]
        for start in range(0, len(every), MAX_FDS):
            part = every[start : start + MAX_FDS]
            send_packet(sock, _PART.pack(0, len(every) - start - len(part)), part)


def receive_message(sock: socket.socket) -> tuple[bytes, list[int]]:
    """Receive a message of ``send_message`` from a peer that is trusted with memory; as ``receive_packet``."""
    payload, fds = receive_packet(sock)
    if payload[:1] != b"\0":
        return payload, fds
    while _PART.unpack(payload)[1]:
        payload, more = receive_packet(sock)
        fds += more
    with os.fdopen(fds.pop(0), "rb") as file:
        file.seek(0)
        return file.read(), fds
