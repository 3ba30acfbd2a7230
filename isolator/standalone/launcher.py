"""Launcher of a command: a fork of the command's own process, which has just begun.

A daemon starts its launcher as a program of its own, for it is large and has threads. A command that is to run one cage
is small and single-threaded, and has imported what the launcher needs: another Python would take longer than the cage.
"""

from __future__ import annotations

import contextlib
import gc
import os
import select
import signal
import socket
import sys
from typing import NoReturn

from isolator.ipc.packet import pair
from isolator.launcher import server
from isolator.linux.arguments import overwrite_arguments
from isolator.linux.coredump import let_children_start_no_handler
from isolator.linux.descriptors import allow_many_files
from isolator.linux.files import close_all_but

_TITLE = "isolator-launcher"
_END_SECONDS = 5.0


class ForkedLauncher:
    """A launcher process that this process has forked, and its end of their socket until somebody takes it over."""

    def __init__(self, pid: int, sock: socket.socket) -> None:
        self.pid = pid
        self.sock = sock
        self._pidfd = os.pidfd_open(pid)

    def wait(self, timeout: float | None = None) -> None:
        """Wait for its end, and reap it; raises TimeoutError."""
        if self._pidfd < 0:
            return
        ends = select.poll()
        ends.register(self._pidfd, select.POLLIN)
        if not ends.poll(None if timeout is None else timeout * 1000):
            raise TimeoutError
        with contextlib.suppress(ChildProcessError):
            os.waitpid(self.pid, 0)
        os.close(self._pidfd)
        self._pidfd = -1

    def kill(self) -> None:
        if self._pidfd >= 0:
            signal.pidfd_send_signal(self._pidfd, signal.SIGKILL)

    def close(self) -> None:
        """End it, if nobody has, and reap it; one that hangs is killed after a moment. Idempotent."""
        self.sock.close()
        try:
            self.wait(_END_SECONDS)
        except TimeoutError:
            self.kill()
            self.wait()


def fork_launcher() -> ForkedLauncher:
    """Fork the launcher; its process must be single-threaded, and no event loop may run."""
    let_children_start_no_handler()
    allow_many_files()
    mine, theirs = pair()
    gc.freeze()
    pid = os.fork()
    if pid == 0:
        _become_launcher(theirs.detach())
    theirs.close()
    return ForkedLauncher(pid, mine)


def _become_launcher(sock: int) -> NoReturn:
    try:
        null = os.open("/dev/null", os.O_RDONLY | os.O_CLOEXEC)
        os.dup2(null, 0)
        close_all_but({0, 1, 2, sock})
        os.chdir("/")
        _forget_caller()
        server.run(socket.socket(fileno=sock))
    except KeyboardInterrupt:  # from before it ignored the terminal's signals; the command says what there is to say
        os._exit(1)
    except BaseException as error:  # nothing may escape into the command, which this process is a copy of
        with contextlib.suppress(OSError):
            os.write(2, f"isolator: launcher: {type(error).__name__}: {error}\n".encode())
        os._exit(1)
    os._exit(0)


def _forget_caller() -> None:
    """Begin as a launcher that was started as a program does, without the arguments and variables of the caller.

    Pid 1 of the cage is a copy of this process. Nothing in a cage can read its memory; it need not hold anything.
    """
    overwrite_arguments(_TITLE)
    os.environ.update({"PATH": "/usr/bin:/bin", "LANG": "C.UTF-8"})
    sys.argv[:] = [_TITLE]
