"""Attacks on the kernel's borders: mounts, namespaces, other processes, the user."""

from __future__ import annotations

import ctypes
import errno
import os
import tempfile
from pathlib import Path

from .outcome import Known, Outcome, checked, each, in_child, libc

CLONE_NEWUSER = 0x10000000
PTRACE_SEIZE = 0x4206
MNT_DETACH = 2
SYS_CLONE3 = 435  # the same on every architecture
SYS_FSOPEN = 430


def mount(known: Known) -> Outcome:
    """A file system of one's own, by the old call and by the new one."""

    def old() -> str:
        with tempfile.TemporaryDirectory() as place:
            checked(libc.mount(b"none", place.encode(), b"tmpfs", 0, b"size=64k"))
            checked(libc.umount2(place.encode(), MNT_DETACH))
        return "mounted and unmounted a tmpfs"

    def new() -> str:
        os.close(checked(libc.syscall(SYS_FSOPEN, b"tmpfs", 0)))
        return "opened a file system"

    ways = {"mount": old, "fsopen": new}
    return each(ways, lambda way: in_child(ways[way]))


def user_namespace(known: Known) -> Outcome:
    """A user namespace, in which every capability would be there again."""

    def by_unshare() -> str:
        checked(libc.unshare(CLONE_NEWUSER))
        return "a new user namespace"

    def by_clone3() -> str:
        arguments = (ctypes.c_uint64 * 8)(CLONE_NEWUSER, 0, 0, 0, 17)  # 17: SIGCHLD as exit signal
        child = checked(libc.syscall(SYS_CLONE3, arguments, ctypes.sizeof(arguments)))
        if child == 0:
            os._exit(0)
        os.waitpid(child, 0)
        return "a new user namespace"

    ways = {"unshare": by_unshare, "clone3": by_clone3}
    return each(ways, lambda way: in_child(ways[way]))


def seize(pid: int) -> str:
    """Become its debugger. SEIZE does not stop it, and our exit lets it go."""
    libc.ptrace.argtypes = [ctypes.c_long, ctypes.c_long, ctypes.c_void_p, ctypes.c_void_p]
    libc.ptrace.restype = ctypes.c_long
    checked(libc.ptrace(PTRACE_SEIZE, pid, None, None))
    return "attached"


def peek(pid: int) -> str:
    """Read its memory. EFAULT says that the permission was there and only the guessed address was wrong."""
    buffer = ctypes.create_string_buffer(16)
    local = (ctypes.c_void_p * 2)(ctypes.addressof(buffer), 16)
    remote = (ctypes.c_void_p * 2)(0x400000, 16)
    try:
        checked(libc.process_vm_readv(pid, local, 1, remote, 1, 0))
    except OSError as error:
        if error.errno != errno.EFAULT:
            raise
    return "may read its memory"


def open_memory(pid: int) -> str:
    with Path(f"/proc/{pid}/mem").open("r+b", buffering=0):
        return "opened its memory for writing"


def take_over(pid: int) -> Outcome:
    ways = {"ptrace": seize, "process_vm_readv": peek, f"/proc/{pid}/mem": open_memory}
    return each(ways, lambda way: in_child(lambda: ways[way](pid)))


def ptrace_init(known: Known) -> Outcome:
    """Process 1: in a cage that is the cage's own init, the one process there that was once root."""
    return take_over(int(known.get("pid", 1)))


def ptrace_outside(known: Known) -> Outcome:
    """A process outside, by its number on the host; without one, our own parent's parent as seen from here."""
    return take_over(int(known.get("pid", 2)))


def setuid_root(known: Known) -> Outcome:
    """Root, by asking for it in each of the ways there are."""

    def all_three() -> str:
        os.setresuid(0, 0, 0)
        return f"user ids are now {os.getresuid()}"

    def one() -> str:
        os.setuid(0)
        return f"user id is now {os.getuid()}"

    def group() -> str:
        os.setgid(0)
        return f"group id is now {os.getgid()}"

    ways = {"setuid(0)": one, "setresuid(0,0,0)": all_three, "setgid(0)": group}
    return each(ways, lambda way: in_child(ways[way]))
