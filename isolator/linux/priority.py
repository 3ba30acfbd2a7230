"""Precedence on a contended processor by nice values, where control groups do not decide it (sched(7), setpriority(2)).

Nice values and scheduling policies are inherited over fork and execve. So whoever has precedence keeps it from what it
starts, and a cage begins without any, whatever the daemon was started with.

Nor does a cage hold up who is woken. A thread keeps its processor for its slice, in practice until the next tick of the
clock after it, whatever the weight of who waits. One with a longer slice is interrupted by a thread with a shorter one
at once, in whatever group either is (EEVDF, Linux 6.12). So cages have a longer slice; their share stays what it is.

Between processes of different sessions the kernel goes by the nice values of their autogroups (sched(7)), if it has any
and the root of the cpu hierarchy is where they are; a process's own counts within its session. A leader sets both.
"""

from __future__ import annotations

import contextlib
import ctypes
import os

from isolator.linux._libc import syscall
from isolator.linux.files import write_file

FIRST = -10
"""Nice value of whoever goes first: nine times the share of what has none, where both want the whole processor. By its
group's weight a service has ten times a cage's on v2."""
SLICE = 3_500_000
"""Nanoseconds of a cage's slice. The kernel's own is 0.7 to 3 ms, by the number of processors. A slice ends at a tick,
one every 4 ms where the kernel has the usual 250 a second: so cages wait hardly longer for one another."""
_AUTOGROUP = "/proc/self/autogroup"
_ORDINARY = (os.SCHED_OTHER, os.SCHED_BATCH, os.SCHED_IDLE)


def go_first() -> None:
    """Take precedence for the calling thread; whoever it starts, threads included, does not get it.

    A nice value that somebody has set stays. Without the privilege for it (CAP_SYS_NICE) nothing changes.
    """
    if os.getpriority(os.PRIO_PROCESS, 0) > 0:
        return
    with contextlib.suppress(PermissionError):
        policy = os.sched_getscheduler(0)
        os.sched_setscheduler(0, policy | os.SCHED_RESET_ON_FORK, os.sched_getparam(0))
        if os.getpriority(os.PRIO_PROCESS, 0) == 0:
            _set(FIRST)


def go_as_far_forward_as(nice: int) -> None:
    """Take over another's precedence, if it has one and the privilege for it is there; children inherit it."""
    if nice < 0 and nice <= os.getpriority(os.PRIO_PROCESS, 0):  # an inherited one is not the session's yet
        with contextlib.suppress(PermissionError):
            _set(nice)


def go_behind(steps: int) -> None:
    """Let others go first by so many nice values, counted from 0 for one that had precedence; children inherit it."""
    own = max(0, os.getpriority(os.PRIO_PROCESS, 0))
    os.setpriority(os.PRIO_PROCESS, 0, min(19, own + steps))


def take_turns() -> None:
    """Give up every precedence, a real-time policy included, and let who is woken go first; children inherit it.

    A nice value above 0 stays, and so does a batch or idle policy. A kernel before Linux 6.12 has one slice for all.
    """
    if os.sched_getscheduler(0) & ~os.SCHED_RESET_ON_FORK not in _ORDINARY:
        os.sched_setscheduler(0, os.SCHED_OTHER, os.sched_param(0))
    go_behind(0)
    with contextlib.suppress(PermissionError):  # a container's filter
        found = Attributes.of(0)
        found.runtime = SLICE
        syscall("sched_setattr", 0, ctypes.byref(found), 0)


class Attributes(ctypes.Structure):
    """Struct ``sched_attr`` of linux/sched/types.h, in its first version."""

    _fields_ = (
        ("size", ctypes.c_uint32), ("policy", ctypes.c_uint32), ("flags", ctypes.c_uint64), ("nice", ctypes.c_int32),
        ("priority", ctypes.c_uint32), ("runtime", ctypes.c_uint64), ("deadline", ctypes.c_uint64),
        ("period", ctypes.c_uint64),
    )  # fmt: skip

    @classmethod
    def of(cls, thread: int) -> Attributes:
        """Read those of a thread, 0 for the caller's own; raises OSError. ``runtime`` is the slice, in nanoseconds."""
        found = cls()
        syscall("sched_getattr", thread, ctypes.byref(found), ctypes.sizeof(found), 0)
        return found


def _set(nice: int) -> None:
    os.setpriority(os.PRIO_PROCESS, 0, nice)
    if os.getsid(0) != os.getpid():
        return  # the session is somebody else's
    with contextlib.suppress(OSError):  # there are none, or not for this process
        write_file(_AUTOGROUP, str(nice))
