"""Fork a sibling: a copy of this process that is a child of this one's parent, which waits for it."""

from __future__ import annotations

import ctypes
import os

from isolator.linux.namespaces import CLONE_PARENT, clone3


def fork_sibling() -> int:
    """Fork; returns the pid, or 0 in the new process. Only for a process with one thread. Raises OSError.

    As ``os.fork``, with what the interpreter and the modules do before and after one (new seeds, new locks); fork(2)
    itself has no flag for it.
    """
    interpreter = ctypes.pythonapi
    interpreter.PyOS_BeforeFork()
    try:
        pid, pidfd = clone3(CLONE_PARENT)
    except OSError:
        interpreter.PyOS_AfterFork_Parent()
        raise
    if pid == 0:
        interpreter.PyOS_AfterFork_Child()
        return 0
    interpreter.PyOS_AfterFork_Parent()
    os.close(pidfd)
    return pid
