"""Kernel memory of one cage's outer connections.

The cage's own ends count against its namespace's small buffers; the other ends are the broker's, in the host's network,
where each buffer grows to what ``tcp_rmem`` and ``tcp_wmem`` allow (often 6 and 4 MiB) once its far end is slow, and is
in nobody's memory cap. So only as many connections of a cage as fit ``BUDGET`` have buffers that grow; those beyond it
have small ones, which are enough for all but bulk transfers over a long way.
"""

from __future__ import annotations

import contextlib
import socket
from pathlib import Path

BUDGET = 64 << 20
"""Bytes of buffers that grow, per cage."""
SMALL = 48 << 10
"""Bytes of each buffer of a connection beyond the budget; the kernel allows twice that, for its own overhead."""
_DEFAULT = 6 << 20


class Buffers:
    """Decides which connections of one cage may have buffers that grow."""

    def __init__(self) -> None:
        self._free = -1
        """How many more may; -1: none has asked yet, as in most cages that have just started."""

    def take(self) -> bool:
        """Whether one more connection may have them; it has to ``give`` them back."""
        if self._free < 0:
            self._free = max(1, BUDGET // (_most("tcp_rmem") + _most("tcp_wmem")))
        if not self._free:
            return False
        self._free -= 1
        return True

    def give(self) -> None:
        """Take back what ``take`` allowed."""
        self._free += 1


def keep_small(sock: socket.socket) -> None:
    """Fix a connection's buffers; to be called before it is connected, for its window to fit."""
    for option in (socket.SO_RCVBUF, socket.SO_SNDBUF):
        sock.setsockopt(socket.SOL_SOCKET, option, SMALL)


def _most(name: str) -> int:
    with contextlib.suppress(OSError, ValueError, IndexError):
        return max(1, int(Path("/proc/sys/net/ipv4", name).read_text().split()[2]))
    return _DEFAULT
