"""Settings of network namespaces: /proc/sys/net, in a procfs where few of them have been looked for.

A procfs keeps the folder of each namespace's settings, for as long as that lives, under one name beside those of all
others, and goes through them for each that is new. So they are looked for in one of this process's own, and after some
in another: what is kept goes with it.
"""

from __future__ import annotations

import os
import threading

from isolator.linux import mount
from isolator.linux.descriptors import owning

_FEW = 32
"""Networks whose settings are looked for in one procfs."""


class NetworkSettings:
    """Opens settings of networks, in any thread. It holds one descriptor from the first time on."""

    def __init__(self) -> None:
        self._turn = threading.Lock()
        self._procfs, self._left = -1, 0

    def open(self) -> int:
        """An O_PATH descriptor of /proc/sys/net/ipv4 of the calling thread's network; the caller's. Raises OSError."""
        with self._turn:
            if not self._left:
                self._change()
            self._left -= 1
            return os.open("sys/net/ipv4", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC, dir_fd=self._procfs)

    def _change(self) -> None:
        try:
            made = mount.new_filesystem("proc")
            try:
                os.close(os.open("sys/net/ipv4/ip_forward", os.O_WRONLY | os.O_CLOEXEC, dir_fd=made))
            except OSError:
                os.close(made)
                raise
        except OSError:  # a container that forbids mounts, or to write there
            made = os.open("/proc", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        if self._procfs < 0:
            self._procfs = made
        else:
            with owning(made):
                os.dup2(made, self._procfs, inheritable=False)
        self._left = _FEW
