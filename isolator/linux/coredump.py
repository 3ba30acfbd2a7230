"""No memory in core dumps: a dump would carry the secrets of whoever crashed to the host's core handler."""

from __future__ import annotations

import os

FILTER = "coredump_filter"


def leave_memory_out() -> None:
    """From now on a core dump of this process, and of all that it starts, holds none of its memory.

    A limit of 0 on the size of core files is not enough: one that is piped to a handler, as systemd-coredump and
    apport have it, is not bound by it (core(5)). The filter is inherited over fork and execve.
    """
    fd = os.open(f"/proc/self/{FILTER}", os.O_WRONLY | os.O_CLOEXEC)
    try:
        os.write(fd, b"0")
    finally:
        os.close(fd)
