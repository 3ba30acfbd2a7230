"""No memory in core dumps: a dump would carry the secrets of whoever crashed to the host's core handler."""

from __future__ import annotations

import contextlib
import resource

from isolator.linux.files import write_file

FILTER = "coredump_filter"


def leave_memory_out() -> None:
    """From now on a core dump of this process, and of all that it starts, holds none of its memory.

    A limit of 0 on the size of core files is not enough: one that is piped to a handler, as systemd-coredump and
    apport have it, is not bound by it (core(5)). The filter is inherited over fork and execve.
    """
    write_file(f"/proc/self/{FILTER}", "0")


def start_no_handler() -> None:
    """Set the limit of core files to 1, at which the kernel neither writes one nor starts the host's handler.

    Only root can do that to a process that came with a limit of 0, as everything that sudo starts does, and not in
    every container: there the 0 stays, which still writes no file.
    """
    with contextlib.suppress(ValueError, PermissionError):
        resource.setrlimit(resource.RLIMIT_CORE, (1, 1))


def let_children_start_no_handler() -> None:
    """Raise a limit of 0 to 1 while root, for children without the privilege to; any other limit stays."""
    if resource.getrlimit(resource.RLIMIT_CORE)[1] == 0:
        start_no_handler()
