"""The few netlink messages that starting a cage needs, by hand: importing pyroute2 alone costs 200 ms.

Everything acts on the network namespace that the calling thread is in when the socket is made.
Message layouts: rtnetlink(7), linux/rtnetlink.h, linux/netfilter/nfnetlink_log.h, nf_tables.h and linux/inet_diag.h.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import itertools
import os
import socket
import struct
import sys
from collections.abc import Iterator, Sequence

NETLINK_ROUTE = 0
_NETLINK_SOCK_DIAG = 4
NETLINK_NETFILTER = 12
SOL_NETLINK = 270
NETLINK_ADD_MEMBERSHIP = 1

_NLMSG_ERROR, _NLMSG_DONE = 2, 3
_NLM_F_REQUEST, _NLM_F_ACK, _NLM_F_CREATE, _NLM_F_REPLACE = 1, 4, 0x400, 0x100
_NLM_F_DUMP, _NLM_F_DUMP_INTR = 0x300, 0x10
_DUMPS = 10
"""How often a list is asked for that changes while it is read."""

_RTM_NEWLINK, _RTM_NEWADDR, _RTM_NEWROUTE, _RTM_GETROUTE = 16, 20, 24, 26
_IFF_UP = 1
_IFLA_GSO_IPV4_MAX_SIZE = 63
_LARGEST_PACKET = 8 * 65535
"""Bytes of the largest packet that ``lo`` carries in one piece (GSO_MAX_SIZE)."""
_LO = 1  # the loopback device is always the first of its namespace
_RT_TABLE_LOCAL, _RTPROT_BOOT, _RTN_LOCAL = 255, 3, 2
_RT_SCOPE_HOST, _RT_SCOPE_UNIVERSE = 254, 0
_RTA_DST, _RTA_OIF, _RTA_PREFSRC = 1, 4, 7
RTA_GATEWAY, RTA_MULTIPATH, RTA_VIA = 5, 9, 18
_RTM_F_FIB_MATCH = 0x2000
_IFA_ADDRESS, _IFA_LOCAL = 1, 2
_ROUTE, _KIND = struct.Struct("=IHHIIBB10xHH"), struct.Struct("=HHI")
"""A message about a route up to its first attribute's value; kind, flags and number of a message, 4 bytes into it."""
_numbers = itertools.count(1)
_RTN_OWN = frozenset({2, 3, 4, 5})  # RTN_LOCAL, RTN_BROADCAST, RTN_ANYCAST, RTN_MULTICAST

_SOCK_DIAG_BY_FAMILY, _INET_DIAG_SKMEMINFO = 20, 7
_CONNECTED = sum(1 << state for state in (1, 4, 5, 8, 9, 11))
"""States of a TCP socket with a peer: ESTABLISHED, FIN_WAIT1 and 2, CLOSE_WAIT, LAST_ACK, CLOSING."""
_FOUND = struct.Struct("!4xH62xI")
"""Port and inode of ``struct inet_diag_msg``; an inode of 0 is one in any byte order."""
TCP_SOCKET = 2500
"""Bytes that the kernel takes for a TCP connection beside its buffers, about."""

_NFNL_SUBSYS_ULOG, _NFNL_SUBSYS_NFTABLES = 4, 10
_NFULNL_MSG_PACKET, _NFULNL_MSG_CONFIG = 0, 1
_NFULA_CFG_CMD, _NFULA_CFG_MODE, _NFULA_CFG_QTHRESH = 1, 2, 5
_NFULNL_CFG_CMD_BIND, _NFULNL_COPY_PACKET = 1, 2
_NFULA_PAYLOAD, _NFULA_PREFIX = 9, 10
_NFT_MSG_GETGEN = 16
_NFTA_GEN_ID = 1
_NFNLGRP_NFTABLES = 7
_SO_RCVBUFFORCE = 33
_SIOCGSKNS = 0x894C

OWN_ADDRESSES = ("192.0.0.8", "100::1")
"""Addresses of every cage besides its loopback's: the IPv4 dummy address (RFC 7600), and one of the discard prefix (RFC
6666). With AI_ADDRCONFIG the C library looks a name up for a family only if an interface has an address of it that is
not 127.0.0.1 or ::1."""

NFLOG_GROUP = 5
"""The group that a cage's ruleset logs to; groups are per network namespace."""


def has_ipv6() -> bool:
    """Whether the kernel has IPv6, by a socket: /proc/sys takes longer to look through with each namespace there is."""
    try:
        socket.socket(socket.AF_INET6, socket.SOCK_DGRAM).close()
    except OSError as error:
        if error.errno != errno.EAFNOSUPPORT:
            raise
        return False
    return True


def bring_up_loopback() -> None:
    """Set ``lo`` up and make every address local to it, so that any destination reaches this namespace.

    As ``ip link set lo up; ip route add local default dev lo src 127.0.0.1`` and the same for IPv6. Without a
    preferred source a connection would get its destination as its own address. ``lo`` also gets ``OWN_ADDRESSES``.
    What TCP has to send goes in packets of up to half a megabyte, not 64 KiB: fewer pass rules and queues, and wake the
    other end (BIG TCP; for IPv4 since Linux 6.3, before which the attribute is ignored). Raises OSError.
    """
    link = struct.pack("=BxHiII", socket.AF_UNSPEC, 0, _LO, _IFF_UP, _IFF_UP)
    link += _attribute(_IFLA_GSO_IPV4_MAX_SIZE, struct.pack("=I", _LARGEST_PACKET))
    replace = _NLM_F_CREATE | _NLM_F_REPLACE
    requests = [
        (_RTM_NEWLINK, 0, link),
        (_RTM_NEWROUTE, replace, _local_default(socket.AF_INET, "127.0.0.1")),
        (_RTM_NEWADDR, replace, _address(socket.AF_INET, OWN_ADDRESSES[0])),
    ]
    if has_ipv6():
        requests.append((_RTM_NEWROUTE, replace, _local_default(socket.AF_INET6, "::1")))
        requests.append((_RTM_NEWADDR, replace, _address(socket.AF_INET6, OWN_ADDRESSES[1])))
    with _open(NETLINK_ROUTE) as sock:
        _ask_all(sock, requests)


class RouteQuery:
    """Asks the kernel, about the namespace it was made in, where packets to an address would go."""

    def __init__(self) -> None:
        self._sock = _open(NETLINK_ROUTE)

    def is_own(self, address: str) -> bool:
        """Whether the kernel would deliver to itself: its own, a broadcast, anycast or multicast address.

        No route at all is no: then nothing can be reached either. No answer, for want of memory, is yes.
        """
        family = socket.AF_INET6 if ":" in address else socket.AF_INET
        packed = socket.inet_pton(family, address)
        size, turn = len(packed), _next_number()
        # Straight on, and without an acknowledgement: each connection of a cage waits for this.
        asked = (_ROUTE.size + size, _RTM_GETROUTE, _NLM_F_REQUEST, turn, 0, family, size * 8, 4 + size, _RTA_DST)
        try:
            self._sock.send(_ROUTE.pack(*asked) + packed)
            while True:
                reply = self._sock.recv(4096)
                kind, _, answered = _KIND.unpack_from(reply, 4)
                if answered == turn:
                    return kind != _NLMSG_ERROR and reply[23] in _RTN_OWN
        except OSError:
            return True

    def neighbours_device(self, address: str) -> int:
        """Index of the device on whose link the kernel would look for an IPv6 address itself, without a gateway.

        0: there is none, or the route there is a default route, which says nothing of a link. -1: no answer.
        """
        packed = socket.inet_pton(socket.AF_INET6, address)
        body = struct.pack("=BBBBBBBBI", socket.AF_INET6, 128, 0, 0, 0, 0, 0, 0, _RTM_F_FIB_MATCH)
        try:
            reply = _ask(self._sock, _RTM_GETROUTE, 0, body + _attribute(_RTA_DST, packed))
        except _RefusedError:
            return 0
        except OSError:
            return -1
        found = dict(attributes(reply[12:]))
        if len(reply) < 12 or not reply[1] or found.keys() & {RTA_GATEWAY, RTA_MULTIPATH, RTA_VIA}:
            return 0
        return int.from_bytes(found.get(_RTA_OIF, b""), sys.byteorder)

    def dump(self, kind: int, header: int) -> list[bytes]:
        """The bodies of everything of a kind, by a request whose header of so many bytes is empty; raises OSError.

        One that changed meanwhile is read again, a few times: it may have been told in two halves that do not meet.
        """
        for _ in range(_DUMPS):
            whole, bodies = _dump(self._sock, kind, bytes(header))
            if whole:
                break
        return bodies

    def close(self) -> None:
        self._sock.close()


def tcp_memory_of_nobody(*, but_port: int) -> int:
    """Bytes that the kernel holds for the namespace's TCP connections that no process has; raises OSError.

    They are not accepted yet, or closed and not sent. Left out are those whose own port is ``but_port``.
    """
    total = 0
    with _open(_NETLINK_SOCK_DIAG) as sock:
        for family in (socket.AF_INET, socket.AF_INET6):
            head = struct.pack("=BBBxI", family, socket.IPPROTO_TCP, 1 << (_INET_DIAG_SKMEMINFO - 1), _CONNECTED)
            for body in _dump(sock, _SOCK_DIAG_BY_FAMILY, head + bytes(48))[1]:
                port, inode = _FOUND.unpack_from(body)
                memory = dict(attributes(body[_FOUND.size :])).get(_INET_DIAG_SKMEMINFO, b"")
                if inode == 0 and port != but_port and len(memory) >= 32:
                    received, _, _, _, reserved, queued, _, backlog = struct.unpack_from("=8I", memory)
                    total += TCP_SOCKET + received + reserved + queued + backlog
    return total


def _dump(sock: socket.socket, kind: int, body: bytes) -> tuple[bool, list[bytes]]:
    """The bodies of all that a request lists, and whether nothing of it has changed meanwhile; raises OSError."""
    number = _next_number()
    sock.send(struct.pack("=IHHII", 16 + len(body), kind, _NLM_F_REQUEST | _NLM_F_DUMP, number, 0) + body)
    whole = True
    bodies: list[bytes] = []
    while True:
        packet = sock.recv(1 << 17)
        for reply, flags, turn, _, content in _messages(packet):
            if turn != number:
                continue
            whole = whole and not flags & _NLM_F_DUMP_INTR
            if reply in {_NLMSG_ERROR, _NLMSG_DONE}:
                error = -struct.unpack_from("=i", content)[0] if len(content) >= 4 else 0
                if error:
                    raise OSError(error, f"netlink list {kind}: {os.strerror(error)}")
                return whole, bodies
            bodies.append(content)


def open_nflog() -> socket.socket:
    """A socket that receives what the namespace's ruleset logs to ``NFLOG_GROUP``, each record at once.

    Needs CAP_NET_ADMIN to make; whoever holds it afterwards can only read. Raises OSError.
    """
    sock = _open(NETLINK_NETFILTER)
    try:
        header = struct.pack("!BBH", socket.AF_UNSPEC, 0, NFLOG_GROUP)
        kind = (_NFNL_SUBSYS_ULOG << 8) | _NFULNL_MSG_CONFIG
        _ask(sock, kind, 0, header + _attribute(_NFULA_CFG_CMD, struct.pack("B", _NFULNL_CFG_CMD_BIND)))
        mode = _attribute(_NFULA_CFG_MODE, struct.pack("!IBx", 128, _NFULNL_COPY_PACKET))
        # The kernel otherwise waits for a hundred records or a second before it hands any over.
        threshold = _attribute(_NFULA_CFG_QTHRESH, struct.pack("!I", 1))
        _ask(sock, kind, 0, header + mode + threshold)
        sock.setsockopt(socket.SOL_SOCKET, _SO_RCVBUFFORCE, 256 * 1024)
        sock.setblocking(False)
    except OSError:
        sock.close()
        raise
    return sock


def parse_nflog(packet: bytes) -> list[tuple[str, bytes]]:
    """``(prefix, first bytes of the IP packet)`` of each record in what was read from an NFLOG socket."""
    records = []
    for kind, _, _, _, body in _messages(packet):
        if kind == (_NFNL_SUBSYS_ULOG << 8) | _NFULNL_MSG_PACKET and len(body) >= 4:
            fields = dict(attributes(body[4:]))
            prefix = fields.get(_NFULA_PREFIX, b"").rstrip(b"\0").decode("ascii", "replace")
            records.append((prefix, fields.get(_NFULA_PAYLOAD, b"")))
    return records


class Generations:
    """Asks for the number of a namespace's current nftables generation, and hears of changes.

    Each committed change makes a new generation. Its socket belongs to the namespace that the calling thread is in when
    it is made, and can be used from any; it never blocks.
    """

    def __init__(self, sock: socket.socket | None = None) -> None:
        """Open a socket, or take over the ``sock`` of an earlier object."""
        self._sock = sock or _open(NETLINK_NETFILTER)
        self._sock.setblocking(False)
        self._port = self._sock.getsockname()[0]
        self._turn = 0

    def fileno(self) -> int:
        """The socket's descriptor: readable when there is a change to hear of, once ``watch`` was called."""
        return self._sock.fileno()

    def watch(self) -> None:
        """Hear of changes from now on."""
        self._sock.setsockopt(SOL_NETLINK, NETLINK_ADD_MEMBERSHIP, _NFNLGRP_NFTABLES)

    def drain(self) -> None:
        """Forget what was heard; whether anything has changed, ``current`` tells."""
        with contextlib.suppress(BlockingIOError):
            while self._receive():
                pass

    def namespace(self) -> int:
        """A descriptor of the namespace, the caller's; raises OSError, EBADF after ``close``."""
        if self._sock.fileno() < 0:
            raise OSError(errno.EBADF, os.strerror(errno.EBADF))
        return fcntl.ioctl(self._sock, _SIOCGSKNS)

    def current(self) -> int:
        """The number now; raises OSError."""
        self.drain()
        self._turn += 1
        kind = (_NFNL_SUBSYS_NFTABLES << 8) | _NFT_MSG_GETGEN
        body = struct.pack("!BBH", socket.AF_UNSPEC, 0, 0)
        self._sock.send(struct.pack("=IHHII", 16 + len(body), kind, _NLM_F_REQUEST | _NLM_F_ACK, self._turn, 0) + body)
        number: bytes | None = None
        while True:  # the kernel has answered before ``send`` returns; a change that came first is told first
            packet = self._receive()
            for kind, _, turn, port, content in _messages(packet):
                if (turn, port) != (self._turn, self._port):
                    continue
                if kind != _NLMSG_ERROR:
                    number = dict(attributes(content[4:])).get(_NFTA_GEN_ID)
                    continue
                error = -struct.unpack_from("=i", content)[0]
                if error or number is None:
                    raise OSError(error, f"the kernel did not tell its nftables generation: {os.strerror(error)}")
                return int(struct.unpack("!I", number)[0])

    def _receive(self) -> bytes:
        while True:
            try:
                return self._sock.recv(65536)
            except OSError as error:
                if error.errno != errno.ENOBUFS:  # more changes than it has room for
                    raise

    def close(self) -> None:
        """Close the socket; harmless when repeated."""
        self._sock.close()


def _open(family: int) -> socket.socket:
    sock = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, family)
    sock.bind((0, 0))
    return sock


def _next_number() -> int:
    """The number of a request: what is left of one that was given up (ENOBUFS) is no answer to another."""
    return next(_numbers) & 0xFFFFFFFF


class _RefusedError(OSError):
    """The kernel's own answer, that it does not do what was asked."""


def _ask(sock: socket.socket, kind: int, flags: int, body: bytes) -> bytes:
    """Send one request, wait for its acknowledgement; the body of the first reply that is none."""
    return _ask_all(sock, [(kind, flags, body)])


def _ask_all(sock: socket.socket, requests: Sequence[tuple[int, int, bytes]]) -> bytes:
    """As ``_ask``, for requests whose bodies are whole words: the kernel takes them one by one, and each is awaited."""
    packet, waiting = b"", dict[int, int]()
    for kind, flags, body in requests:
        turn = _next_number()
        waiting[turn] = kind
        packet += struct.pack("=IHHII", 16 + len(body), kind, _NLM_F_REQUEST | _NLM_F_ACK | flags, turn, 0) + body
    sock.send(packet)
    answer = b""
    while waiting:
        for reply, _, turn, _, content in _messages(sock.recv(65536)):
            if turn not in waiting:
                continue
            if reply == _NLMSG_ERROR:
                error = -struct.unpack_from("=i", content)[0]
                if error:
                    raise _RefusedError(error, f"netlink request {waiting[turn]}: {os.strerror(error)}")
                del waiting[turn]
            elif reply != _NLMSG_DONE:
                answer = answer or content
    return answer


def _local_default(family: int, source: str) -> bytes:
    scope = _RT_SCOPE_HOST if family == socket.AF_INET else _RT_SCOPE_UNIVERSE
    head = struct.pack("=BBBBBBBBI", family, 0, 0, 0, _RT_TABLE_LOCAL, _RTPROT_BOOT, scope, _RTN_LOCAL, 0)
    prefer = _attribute(_RTA_PREFSRC, socket.inet_pton(family, source))
    return head + _attribute(_RTA_OIF, struct.pack("=I", _LO)) + prefer


def _address(family: int, address: str) -> bytes:
    packed = socket.inet_pton(family, address)
    head = struct.pack("=BBBBI", family, len(packed) * 8, 0, _RT_SCOPE_UNIVERSE, _LO)
    return head + _attribute(_IFA_LOCAL, packed) + _attribute(_IFA_ADDRESS, packed)


def _attribute(kind: int, value: bytes) -> bytes:
    length = 4 + len(value)
    return struct.pack("=HH", length, kind) + value + b"\0" * (-length % 4)


def attributes(data: bytes) -> Iterator[tuple[int, bytes]]:
    """Kind and value of each attribute."""
    offset = 0
    while offset + 4 <= len(data):
        length, kind = struct.unpack_from("=HH", data, offset)
        if length < 4 or offset + length > len(data):
            return
        yield kind & 0x3FFF, data[offset + 4 : offset + length]
        offset += (length + 3) & ~3


def _messages(data: bytes) -> Iterator[tuple[int, int, int, int, bytes]]:
    """Kind, flags, number of the request, port of who sent it, and content of each message."""
    offset = 0
    while offset + 16 <= len(data):
        length, kind, flags, turn, port = struct.unpack_from("=IHHII", data, offset)
        if length < 16 or offset + length > len(data):
            return
        yield kind, flags, turn, port, data[offset + 16 : offset + length]
        offset += (length + 3) & ~3
