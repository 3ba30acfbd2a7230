"""Listening Unix sockets by path."""

from __future__ import annotations

import os
import socket
from pathlib import Path

from isolator.linux.descriptors import owning


def listen(
    path: Path, *, mode: int, owner: int, backlog: int, kind: socket.SocketKind = socket.SOCK_STREAM, group: int = -1
) -> socket.socket:
    """Listen at ``path``, however long it is, with its final owner and mode; an earlier socket there is replaced."""
    path.unlink(missing_ok=True)
    with owning(os.open(path.parent, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)) as folder:
        listener = socket.socket(socket.AF_UNIX, kind)
        try:
            # The name gets the socket's own mode (unix_bind()): the umask belongs to every thread.
            os.fchmod(listener.fileno(), 0o600)
            listener.bind(f"/proc/self/fd/{folder}/{path.name}")
            os.chown(path, owner, group)
            os.chmod(path, mode)
            listener.listen(backlog)
        except BaseException:
            listener.close()
            raise
        return listener
