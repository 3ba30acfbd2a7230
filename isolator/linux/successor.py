"""A successor: a new process that goes on in the memory of the one that made it, which ends.

A fork copies the page tables, and then each page that either process writes to. A successor has the pages themselves.
Both processes return from clone3 on one stack, so the first must not do so: what calls clone3 here ends the caller in
the next instructions, before anything touches that stack. No function of the C library's does that. Standard library
only.
"""

from __future__ import annotations

import ctypes
import functools
import os
import signal
from collections.abc import Callable

from isolator.linux._libc import MACHINE, failed, libc
from isolator.linux.namespaces import CLONE_INTO_CGROUP, CLONE_PIDFD, CloneArgs

_CLONE_VM, _CLONE_FILES, _CLONE_PARENT_SETTID = 0x100, 0x400, 0x100000

_CODE = {
    "x86_64": "b8b3010000 0f05"  # mov eax, 435 (clone3); syscall
    "4885c0 7e09"  # test rax, rax; jle to the ret: the successor, or an error
    "31ff b8e7000000 0f05"  # xor edi, edi; mov eax, 231 (exit_group); syscall
    "c3",  # ret
    "aarch64": "683680d2 010000d4"  # mov x8, 435; svc 0
    "1f0000f1 8d000054"  # cmp x0, 0; b.le to the ret
    "000080d2 c80b80d2 010000d4"  # mov x0, 0; mov x8, 94; svc 0
    "c0035fd6",  # ret
}
"""clone3, and exit_group(0) in the process that has made another; its two arguments are those of clone3."""
_PROT_READ, _PROT_WRITE, _PROT_EXEC = 1, 2, 4
_MAP_PRIVATE_ANONYMOUS = 0x22
_SIGNAL_SET = 128
_EVERY_SIGNAL = b"\xff" * _SIGNAL_SET


@functools.cache
def learn() -> Callable[[int, int], int]:
    """The function in ``_CODE``, in memory that cannot be written any more; a launcher calls this for all its clones.

    Raises OSError where no memory may become executable.
    """
    code = bytes.fromhex(_CODE[MACHINE])
    libc.mmap.restype = ctypes.c_void_p
    size = ctypes.c_size_t(len(code))
    place = libc.mmap(None, size, _PROT_READ | _PROT_WRITE, _MAP_PRIVATE_ANONYMOUS, -1, ctypes.c_long(0))
    if place == ctypes.c_void_p(-1).value:
        raise failed("memory for the clone of a process")
    ctypes.memmove(place, code, len(code))
    if libc.mprotect(ctypes.c_void_p(place), size, _PROT_READ | _PROT_EXEC):
        raise failed("code for the clone of a process")
    # It keeps the interpreter's lock: neither process lets go of what both would take again.
    return ctypes.PYFUNCTYPE(ctypes.c_long, ctypes.c_void_p, ctypes.c_size_t)(place)


def become(flags: int, cgroup_fd: int = -1) -> tuple[int, int]:
    """Go on as a new process, in the group behind ``cgroup_fd`` (-1: the caller's); the calling one ends with status 0.

    Returns, in the new process, its pid as the caller's pid namespace has it, and a pidfd of it. Memory and table of
    descriptors are those of the caller. Only for a process with one thread, whose clones are in its time namespace.
    Raises OSError, in the caller, when the kernel makes no process.
    """
    pid, pidfd = ctypes.c_int(-1), ctypes.c_int(-1)
    args = CloneArgs(
        flags=flags | _CLONE_VM | _CLONE_FILES | _CLONE_PARENT_SETTID | CLONE_PIDFD,
        pidfd=ctypes.addressof(pidfd), parent_tid=ctypes.addressof(pid),
    )  # fmt: skip
    if cgroup_fd >= 0:
        args.flags |= CLONE_INTO_CGROUP
        args.cgroup = cgroup_fd
    clone, before = learn(), ctypes.create_string_buffer(_SIGNAL_SET)
    # No handler of the caller's on the stack. The module signal would name each of 62 signals, for a tenth of a ms.
    libc.pthread_sigmask(int(signal.SIG_BLOCK), _EVERY_SIGNAL, before)
    result = clone(ctypes.addressof(args), ctypes.sizeof(args))
    libc.pthread_sigmask(int(signal.SIG_SETMASK), before, None)
    if result:
        raise OSError(-result, os.strerror(-result), "clone3")
    return pid.value, pidfd.value
