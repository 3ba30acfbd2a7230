"""Attempts on the network: the host's own services, addresses that are never reachable, and the rules themselves."""

from __future__ import annotations

import os
import socket
import struct
from collections.abc import Callable
from pathlib import Path

from .kit import Held, Promise, attempt

_NETLINK_SOCKETS = 20  # of a cage
_BROKER_PORT = 65053
_SECONDS = 1.5


def _connect(family: int, address: object) -> str:
    """Connect by TCP and see whether somebody is there."""
    with socket.socket(family, socket.SOCK_STREAM) as sock:
        sock.settimeout(_SECONDS)
        try:
            sock.connect(address)  # type: ignore[arg-type]  # a pair or a name, by family
            # A broker may accept before it decides: only a connection that stays, or says something, leads somewhere.
            answer = sock.recv(1)
        except TimeoutError:
            if sock.fileno() >= 0 and _connected(sock):
                return f"connected to {address}"
            raise Held("no answer") from None
    if not answer:
        raise Held("closed at once")
    return f"connected to {address}"


def _connected(sock: socket.socket) -> bool:
    try:
        sock.getpeername()
    except OSError:
        return False
    return True


def _send(family: int, address: tuple[str, int], payload: bytes = b"probe") -> str:
    with socket.socket(family, socket.SOCK_DGRAM) as sock:
        sock.settimeout(_SECONDS)
        sock.sendto(payload, address)
    return f"a datagram left for {address[0]}"


@attempt("network", "reach a service on the host's loopback")
def host_loopback(promise: Promise) -> str:
    return _connect(socket.AF_INET, ("127.0.0.1", promise.host_port))


@attempt("network", "reach an abstract socket of the host")
def abstract_socket(promise: Promise) -> str:
    return _connect(socket.AF_UNIX, f"\0{promise.abstract}")


def _beyond(
    name: str, title: str, family: int, address: tuple[str, int], way: Callable[[int, tuple[str, int]], str]
) -> None:
    attempt("network", title, name=name)(lambda _: way(family, address))


_4, _6 = socket.AF_INET, socket.AF_INET6
_beyond("metadata-service", "reach the cloud's metadata service", _4, ("169.254.169.254", 80), _connect)
_beyond("metadata-service-6", "reach the cloud's metadata service by IPv6", _6, ("fd00:ec2::254", 80), _connect)
_beyond("private-network", "reach a private network", _4, ("10.0.0.1", 443), _connect)
_beyond("mapped-private-network", "reach a private network in IPv6's clothes", _6, ("::ffff:10.0.0.1", 443), _connect)
_beyond("public-address", "reach a public address at a port that nobody granted", _4, ("192.88.99.1", 4444), _connect)


@attempt("network", "ask a name server of its own choice")
def outside_resolver(promise: Promise) -> str:
    question = struct.pack("!6H", 1, 0x100, 1, 0, 0, 0) + b"\x05probe\x07invalid\x00\x00\x01\x00\x01"
    return _send(socket.AF_INET, ("198.51.100.53", 53), question)


_beyond("outside-resolver-tcp", "the same by TCP", _4, ("198.51.100.53", 53), _connect)
_beyond("datagram", "send a datagram", _4, ("198.51.100.53", 443), _send)
_beyond("datagram-6", "send a datagram by IPv6", _6, ("2001:db8::53", 443), _send)
_beyond("multicast", "send to everybody on the network", _4, ("224.0.0.251", 5353), _send)


@attempt("network", "ping an address")
def ping(promise: Promise) -> str:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM, socket.IPPROTO_ICMP) as sock:
        sock.settimeout(_SECONDS)
        sock.sendto(struct.pack("!BBHHH", 8, 0, 0, 1, 1), ("198.51.100.53", 0))
    return "an echo request left"


@attempt("network", "speak to the broker directly, past the rules")
def broker_port(promise: Promise) -> str:
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as sock:
        sock.settimeout(_SECONDS)
        sock.connect(("127.0.0.1", _BROKER_PORT))
    return "it accepted"


@attempt("seccomp", "change the firewall rules of its network")
def change_rules(promise: Promise) -> str:
    """Add an empty table: what may add one may remove any. Done in one batch, as nftables wants it."""
    with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, 12) as sock:
        sock.settimeout(_SECONDS)
        sock.bind((0, 0))
        name = b"isolator-probe\0"
        attribute = struct.pack("=HH", 4 + len(name), 1) + name + b"\0" * (-len(name) % 4)
        batch = (
            _message(0x10, struct.pack("!BBH", 0, 0, 10), 1)  # NFNL_MSG_BATCH_BEGIN for nftables
            + _message(10 << 8, struct.pack("!BBH", 1, 0, 0) + attribute, 2)  # NFT_MSG_NEWTABLE, inet
            + _message(0x11, struct.pack("!BBH", 0, 0, 10), 3)
        )
        sock.send(batch)
        reply = sock.recv(65536)
        length, kind = struct.unpack_from("=IH", reply)
        if kind == 2:
            code = -struct.unpack_from("=i", reply, 16)[0]
            if code:
                raise OSError(code, os.strerror(code))
        return f"a table was added ({length} bytes of answer)"


@attempt("capabilities", "change its network by netlink")
def change_network(promise: Promise) -> str:
    with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, socket.NETLINK_ROUTE) as sock:
        sock.settimeout(_SECONDS)
        link = struct.pack("=BxHiII", 0, 0, 1, 0, 1)  # interface 1, which is lo, shall be down
        sock.send(struct.pack("=IHHII", 16 + len(link), 16, 1 | 4, 1, 0) + link)  # RTM_NEWLINK, acknowledged
        code = -struct.unpack_from("=i", sock.recv(65536), 16)[0]
        if code:
            raise OSError(code, os.strerror(code))
    return "the loopback is down"


@attempt("network", "list the host's interfaces by netlink")
def list_interfaces(promise: Promise) -> str:
    names = [name for _, name in socket.if_nameindex()]
    if names == ["lo"]:
        raise Held("there is only lo")
    return f"interfaces {', '.join(names)}"


@attempt("seccomp", "keep answers of netlink waiting, which no memory cap counts")
def netlink_answers(promise: Promise) -> str:
    kept: list[socket.socket] = []
    try:
        while len(kept) <= _NETLINK_SOCKETS:
            kept.append(socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, socket.NETLINK_ROUTE))
    except OSError as error:
        raise Held(f"{error.strerror} after {len(kept)} sockets") from None
    return f"{len(kept)} sockets"


def _message(kind: int, body: bytes, number: int) -> bytes:
    flags = 1 | 4 | (0x400 if number == 2 else 0)  # request, acknowledge, create
    return struct.pack("=IHHII", 16 + len(body), kind, flags if number == 2 else 1, number, 0) + body


@attempt("network", "find a way out beside the loopback device")
def other_interfaces(promise: Promise) -> str:
    lines = Path("/proc/self/net/dev").read_text().splitlines()[2:]
    names = [line.partition(":")[0].strip() for line in lines]
    if names != ["lo"]:
        return f"interfaces {', '.join(names)}"
    raise Held("there is only lo")
