"""Whether anything has been mounted, unmounted, moved or remounted in another process's mount namespace.

The kernel has an event for that: mountinfo of the process becomes ready (proc_pid_mountinfo(5)). It is polled by native
asynchronous I/O (``IOCB_CMD_POLL``, Linux 4.18), which keeps the file open by itself: hundreds of namespaces take no
descriptor, and to ask is a system call that opens nothing. An open mountinfo keeps its namespace, and the file systems
mounted in it, until the watch ends.
"""

from __future__ import annotations

import os
import select

from isolator.linux.aio import Context, Iocb, in_array

_POLL = 5
_ROOM = 1024
"""Namespaces that are watched at once; the ring for their events takes 64 KiB."""


class MountWatch:
    """The mount namespaces of any processes, each by a number that ``begin`` returns."""

    def __init__(self) -> None:
        self._context: Context | None = None
        self._requests: dict[int, Iocb] = {}
        """Requests by the numbers of the namespaces in which nothing has changed."""
        self._last = 0
        self._possible = True

    def begin(self, pid: int) -> int:
        """Watch the namespace of a process from now on; 0 where the kernel does not: then nothing is ``unchanged``.

        Raises OSError if there is no such process.
        """
        if not self._possible:
            return 0
        self._last += 1
        try:
            self._context = self._context or Context(_ROOM)
        except OSError:  # none left for this host (fs.aio-max-nr), or a kernel without any
            self._possible = False
            return 0
        fd = os.open(f"/proc/{pid}/mountinfo", os.O_RDONLY | os.O_CLOEXEC)
        request = Iocb(data=self._last, opcode=_POLL, fildes=fd, buf=select.POLLPRI)
        try:
            self._context.submit(in_array(request))
        except OSError:  # all room is taken
            return 0
        finally:
            os.close(fd)
        self._requests[self._last] = request
        return self._last

    def unchanged(self, number: int) -> bool:
        """Whether nothing has changed in a namespace since ``begin``."""
        if self._context is not None:
            while (ended := self._context.ended()) is not None:
                self._requests.pop(ended[0], None)
        return number in self._requests

    def end(self, number: int) -> None:
        """Let go of a namespace; one that has changed, or that is none, is nobody's any more."""
        request = self._requests.pop(number, None)
        if request is not None and self._context is not None:
            self._context.cancel(request)

    def close(self) -> None:
        """Let go of all."""
        self._requests.clear()
        if self._context is not None:
            self._context.close()
            self._context = None
