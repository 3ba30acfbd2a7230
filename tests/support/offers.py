"""Offers as a caller makes them: descriptors in a connection, to be read with the rights of a user."""

from __future__ import annotations

import os
import socket
from pathlib import Path

from isolator.linux.descriptors import FdSet
from isolator.registration.collecting import Offer


def offered(*paths: Path, flags: int = os.O_RDONLY, uid: int = 0, gid: int = 0, groups: tuple[int, ...] = ()) -> Offer:
    """An offer of these, read as that user; opened here, so that user need not be able to."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    with theirs, FdSet() as owned:
        fds = [owned.add(os.open(path, flags | os.O_NONBLOCK | os.O_CLOEXEC)) for path in paths]
        socket.send_fds(theirs, [b"\0"], fds)
    return Offer(ours, uid, gid, groups)
