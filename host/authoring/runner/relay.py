"""Program in the cage of a plugin that listens on a port of its own loopback, which nobody outside can connect to.

    python3 -I relay.py SOCKET PORT PROGRAM ARGUMENT...

The program takes the place of this process. A child waits until it listens, then makes the socket, and passes on each
connection that comes there, one after the other. Standard library only: no other file of Isolator is in the cage.
"""

from __future__ import annotations

import contextlib
import os
import socket
import sys
import threading
import time
from pathlib import Path

_PAUSE = 0.02
_PIECE = 65536
_LISTEN = "0A"
"""The state of a listening socket in /proc/net/tcp."""


def listens(port: int) -> bool:
    """Whether somebody here listens on the port; asking it would be a connection without a request."""
    for table in ("tcp", "tcp6"):
        with contextlib.suppress(OSError):
            for fields in map(str.split, Path(f"/proc/self/net/{table}").read_text().splitlines()[1:]):
                if fields[3] == _LISTEN and int(fields[1].rpartition(":")[2], 16) == port:
                    return True
    return False


def relay(path: str, port: int) -> None:
    """Serve connections to ``path`` for ever."""
    while not listens(port):
        time.sleep(_PAUSE)
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(path)
        listener.listen(8)
        while True:
            near, _ = listener.accept()
            with near, contextlib.suppress(OSError), _connected(port) as far:
                back = threading.Thread(target=_pass_on, args=(far, near))
                back.start()
                _pass_on(near, far)
                back.join()


def _connected(port: int) -> socket.socket:
    try:
        return socket.create_connection(("127.0.0.1", port))
    except ConnectionRefusedError:
        return socket.create_connection(("::1", port))


def _pass_on(source: socket.socket, sink: socket.socket) -> None:
    with contextlib.suppress(OSError):
        while data := source.recv(_PIECE):
            sink.sendall(data)
    for end in (source, sink):
        with contextlib.suppress(OSError):
            end.shutdown(socket.SHUT_RDWR)


if __name__ == "__main__":
    if os.fork():
        os.execv(sys.argv[3], sys.argv[3:])
    relay(sys.argv[1], int(sys.argv[2]))
