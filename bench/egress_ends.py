"""Client and server of the traffic benchmark, run as scripts in namespaces of their own: standard library only.

``server``: on 9000 echoes the first byte of a connection; on 9001 receives a number in 8 bytes and sends as many bytes;
on 9002 echoes as long as the client likes.
``latency ADDRESS N``: median ms of connect, and of connect plus one byte there and back.
``flow ADDRESS BYTES``: seconds that one flow took.
``hold ADDRESS N``: opens N connections, sends a byte on each now and again, until its standard input ends.
``storm ADDRESS N RATE``: N connections at ``RATE`` a second (0: as fast as it goes): how many were served, and seconds.
"""

from __future__ import annotations

import selectors
import socket
import statistics
import struct
import sys
import threading
import time
from collections.abc import Callable

ECHO, SOURCE, TALK = 9000, 9001, 9002
CHUNK = bytes(1 << 20)


def server() -> None:
    """Serve until killed."""
    for port, serve in ((SOURCE, _source), (TALK, _talk)):
        listener = socket.create_server(("0.0.0.0", port), backlog=1024)
        threading.Thread(target=_accept, args=(listener, serve), daemon=True).start()
    selector = selectors.DefaultSelector()
    listener = socket.create_server(("0.0.0.0", ECHO), backlog=4096)
    selector.register(listener, selectors.EVENT_READ)
    print("ready", flush=True)
    while True:
        for key, _ in selector.select():
            if key.fileobj is listener:
                made = listener.accept()[0]
                selector.register(made, selectors.EVENT_READ, made)
                continue
            sock: socket.socket = key.data
            try:
                data = sock.recv(100)
                sock.sendall(data)
            except OSError:
                data = b""
            if not data:
                selector.unregister(sock)
                sock.close()


def _accept(listener: socket.socket, serve: Callable[[socket.socket], None]) -> None:
    while True:
        connection, _ = listener.accept()
        threading.Thread(target=serve, args=(connection,), daemon=True).start()


def _source(connection: socket.socket) -> None:
    (left,) = struct.unpack("!Q", connection.recv(8))
    while left:
        left -= connection.send(CHUNK[:left])
    connection.close()


def _talk(connection: socket.socket) -> None:
    while data := connection.recv(4096):
        connection.sendall(data)


def latency(address: str, count: int) -> None:
    """Print both medians."""
    connects, bytes_ = [], []
    for _ in range(count):
        began = time.perf_counter()
        with socket.create_connection((address, ECHO)) as sock:
            connected = time.perf_counter()
            sock.sendall(b"x")
            sock.recv(1)
            bytes_.append(time.perf_counter() - began)
            connects.append(connected - began)
        time.sleep(0.002)  # one at a time, not a storm
    print(statistics.median(connects) * 1e3, statistics.median(bytes_) * 1e3)


def flow(address: str, size: int) -> None:
    """Print the seconds."""
    buffer = bytearray(1 << 20)
    began = time.perf_counter()
    with socket.create_connection((address, SOURCE)) as sock:
        sock.sendall(struct.pack("!Q", size))
        got = 0
        while count := sock.recv_into(buffer):
            got += count
    assert got == size, (got, size)
    print(time.perf_counter() - began)


def hold(address: str, count: int) -> None:
    """Print ``open``, then, when the input ends, the number of connections that still answer."""
    kept = [socket.create_connection((address, TALK)) for _ in range(count)]
    for sock in kept:
        sock.sendall(b"x")
        assert sock.recv(1) == b"x"
    print("open", flush=True)
    sys.stdin.read()
    answering = 0
    for sock in kept:
        sock.sendall(b"y")
        answering += sock.recv(1) == b"y"
    print(answering)


def storm(address: str, count: int, rate: int) -> None:
    """Print the number of served connections, and the seconds."""
    served = 0
    began = time.perf_counter()
    for number in range(count):
        if rate:
            time.sleep(max(0.0, began + number / rate - time.perf_counter()))
        try:
            with socket.create_connection((address, ECHO), 10) as sock:
                sock.sendall(b"x")
                served += sock.recv(1) == b"x"
        except OSError:
            continue
    print(served, time.perf_counter() - began)


if __name__ == "__main__":
    globals()[sys.argv[1]](*(word if "." in word else int(word) for word in sys.argv[2:]))
