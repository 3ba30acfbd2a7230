"""Whether anything has been mounted, unmounted, moved or remounted in another process's mount namespace.

The kernel has an event for that: mountinfo of the process becomes ready (proc_pid_mountinfo(5)). It is polled by native
asynchronous I/O (``IOCB_CMD_POLL``, Linux 4.18), which keeps the file open by itself: thousands of namespaces take no
descriptor, and to ask is a system call that opens nothing. An open mountinfo keeps its namespace, and the file systems
mounted in it, until the watch ends.
"""

from __future__ import annotations

import contextlib
import os
import select

from isolator.linux.aio import Context, Iocb, in_array

_POLL = 5
_ROOM = 256
"""Namespaces that one context is asked to watch; the ring for their events takes 16 KiB."""


class MountWatch:
    """The mount namespaces of any processes, each by a number that ``begin`` returns."""

    def __init__(self) -> None:
        self._contexts: list[Context] = []
        self._requests: dict[int, tuple[Context, Iocb]] = {}
        """Requests by the numbers of the namespaces in which nothing has changed."""
        self._last = 0

    def begin(self, pid: int) -> int:
        """Watch the namespace of a process from now on; 0 where the kernel does not: then nothing is ``unchanged``.

        Raises OSError if there is no such process.
        """
        self._last += 1
        fd = os.open(f"/proc/{pid}/mountinfo", os.O_RDONLY | os.O_CLOEXEC)
        try:
            request = Iocb(data=self._last, opcode=_POLL, fildes=fd, buf=select.POLLPRI)
            context = self._submit(request)
        except OSError:  # none left for this host (fs.aio-max-nr), or a kernel without any
            return 0
        finally:
            os.close(fd)
        self._requests[self._last] = context, request
        return self._last

    def _submit(self, request: Iocb) -> Context:
        block = in_array(request)
        for context in self._contexts:
            self._hear(context)  # else what has ended still takes room
            with contextlib.suppress(OSError):  # all of it is taken
                context.submit(block)
                return context
        made = Context(_ROOM)
        try:
            made.submit(block)
        except OSError:
            made.close()
            raise
        self._contexts.append(made)
        return made

    def _hear(self, context: Context) -> None:
        while (ended := context.ended()) is not None:
            self._requests.pop(ended[0], None)

    def unchanged(self, number: int) -> bool:
        """Whether nothing has changed in a namespace since ``begin``."""
        request = self._requests.get(number)
        if request is not None:
            self._hear(request[0])
        return number in self._requests

    def end(self, number: int) -> None:
        """Let go of a namespace; one that has changed, or that is none, is nobody's any more."""
        request = self._requests.pop(number, None)
        if request is not None:
            request[0].cancel(request[1])

    def close(self) -> None:
        """Let go of all."""
        self._requests.clear()
        while self._contexts:
            self._contexts.pop().close()
