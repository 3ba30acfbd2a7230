"""A child of this process by its pid alone, with the interface of ``subprocess.Popen`` that the daemon uses.

An exec keeps the children of a process, but not the objects that it had of them.
"""

from __future__ import annotations

import os
import select
import signal
import subprocess

from isolator.linux.descriptors import owning
from isolator.linux.readable import readable


class Child:
    """A child that nobody else waits for: until then its pid is nobody else's."""

    def __init__(self, pid: int) -> None:
        self.pid = pid
        self.returncode: int | None = None
        """As ``Popen.returncode``: negative for a signal; None while it runs."""

    def poll(self) -> int | None:
        """Reap it if it has ended; returns its ``returncode``."""
        if self.returncode is None:
            try:
                if self.pid <= 0:  # it would mean any child
                    raise ChildProcessError
                pid, status = os.waitpid(self.pid, os.WNOHANG)
            except (ChildProcessError, OverflowError):
                self.returncode = 0  # reaped before, or none of ours; Popen supposes the same
                return 0
            if pid:
                self.returncode = os.waitstatus_to_exitcode(status)
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        """Wait for its end; raises ``subprocess.TimeoutExpired``."""
        if self.poll() is None:
            with owning(os.pidfd_open(self.pid)) as fd:
                if not select.select([fd], [], [], timeout)[0]:
                    raise subprocess.TimeoutExpired(str(self.pid), timeout or 0.0)
        code = self.poll()
        assert code is not None
        return code

    def kill(self) -> None:
        """Send SIGKILL unless it has ended."""
        if self.poll() is None:
            os.kill(self.pid, signal.SIGKILL)


async def ended(process: subprocess.Popen[bytes] | Child) -> None:
    """Wait for the end of a child, and reap it."""
    if process.poll() is not None:
        return
    with owning(os.pidfd_open(process.pid)) as fd:
        await readable(fd)
    process.wait()
