"""Terminal of a cage's own: in a devpts of its own, of which nothing else on the host is part."""

from __future__ import annotations

import fcntl
import os

from isolator.layers.filesystem import TERMINALS
from isolator.linux import mount
from isolator.linux.descriptors import FdSet

_TIOCSPTLCK, _TIOCGPTPEER = 0x40045431, 0x5441


def new_terminal(uid: int, owned: FdSet) -> tuple[int, int, int]:
    """A detached devpts for /dev/pts of the cage of ``uid``, and the two ends of its first terminal: the non-blocking
    one for keys and screen, and the cage's, for its standard streams. ``owned`` gets all three."""
    options = {"ptmxmode": "0666", "mode": "0600", "uid": str(uid), "gid": str(uid), "max": str(TERMINALS)}
    place = owned.add(mount.new_filesystem("devpts", options, attributes=mount.NOSUID | mount.NOEXEC))
    flags = os.O_RDWR | os.O_NOCTTY | os.O_CLOEXEC
    master = owned.add(os.open("ptmx", flags | os.O_NONBLOCK, dir_fd=place))
    fcntl.ioctl(master, _TIOCSPTLCK, b"\0\0\0\0")  # unlocked
    stream: int = owned.add(fcntl.ioctl(master, _TIOCGPTPEER, flags))
    return place, master, stream
