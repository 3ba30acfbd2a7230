"""clone3, unshare, setns, hostname: entering and making namespaces (clone(2), namespaces(7))."""

from __future__ import annotations

import ctypes
import os

from isolator.linux._libc import call, libc, syscall
from isolator.linux.files import write_file

CLONE_PIDFD = 0x1000
CLONE_NEWTIME = 0x80
CLONE_PARENT = 0x8000
CLONE_NEWNS = 0x20000
CLONE_NEWCGROUP = 0x02000000
CLONE_NEWUTS = 0x04000000
CLONE_NEWIPC = 0x08000000
CLONE_NEWUSER = 0x10000000
CLONE_NEWPID = 0x20000000
CLONE_NEWNET = 0x40000000
CLONE_INTO_CGROUP = 0x200000000

NAMESPACE_FILES = {
    "mnt": CLONE_NEWNS,
    "pid": CLONE_NEWPID,
    "ipc": CLONE_NEWIPC,
    "uts": CLONE_NEWUTS,
    "cgroup": CLONE_NEWCGROUP,
    "net": CLONE_NEWNET,
}
"""The six namespaces of a cage: their names under /proc/PID/ns and their clone flags."""


class CloneArgs(ctypes.Structure):
    """The arguments of clone3."""

    _fields_ = tuple(
        (name, ctypes.c_uint64)
        for name in (
            "flags", "pidfd", "child_tid", "parent_tid", "exit_signal", "stack", "stack_size", "tls",
            "set_tid", "set_tid_size", "cgroup",
        )
    )  # fmt: skip


def clone3(flags: int) -> tuple[int, int]:
    """Clone the calling process; returns (pid, pidfd) in the parent and (0, -1) in the child.

    Only for a single-threaded process: the child runs none of the C library's fork handlers, so a lock that
    another thread held would stay held for ever. With CLONE_PARENT the exit signal is the caller's own.
    """
    pidfd = ctypes.c_int(-1)
    args = CloneArgs(flags=flags | CLONE_PIDFD, pidfd=ctypes.addressof(pidfd))
    pid = syscall("clone3", ctypes.byref(args), ctypes.sizeof(args))
    return (pid, pidfd.value) if pid else (0, -1)


def unshare(flags: int) -> None:
    """Move the calling thread into new namespaces (unshare(2))."""
    call(libc.unshare, "unshare", ctypes.c_int(flags))


def setns(fd: int, kind: int = 0) -> None:
    """Move the calling thread into the namespace behind ``fd`` (setns(2))."""
    call(libc.setns, "setns", ctypes.c_int(fd), ctypes.c_int(kind))


def sethostname(name: str) -> None:
    """Set the host name of the calling process's UTS namespace."""
    raw = os.fsencode(name)
    call(libc.sethostname, "sethostname", raw, ctypes.c_size_t(len(raw)))


def setdomainname(name: str) -> None:
    """Set the NIS domain name of the calling process's UTS namespace (it would otherwise leak the host's)."""
    raw = os.fsencode(name)
    call(libc.setdomainname, "setdomainname", raw, ctypes.c_size_t(len(raw)))


IdMap = tuple[tuple[int, int, int], ...]
"""Lines of a map of user_namespaces(7): first id inside, first id outside, count."""
_LAST_ID = 0xFFFFFFFE


def exchange(one: int, other: int) -> IdMap:
    """The map in which two ids have changed places, root is missing, and everybody else is as on disk."""
    low, high = sorted((one, other))
    if low == high:
        return ((1, 1, _LAST_ID),)
    between = ((1, low - 1), (low + 1, high - 1), (high + 1, _LAST_ID))
    same = tuple((first, first, last - first + 1) for first, last in between if first <= last)
    return (*same, (low, high, 1), (high, low, 1))


def new_user_namespace(uids: IdMap, gids: IdMap) -> int:
    """A descriptor of a user namespace with these maps, in which no process is; for ``mount.map_ids``.

    A forked process makes it, and lives until it is set up. Raises OSError (ENOSPC: user.max_user_namespaces is 0).
    """
    import signal

    ready, its_ready = os.pipe2(os.O_CLOEXEC)
    its_hold, hold = os.pipe2(os.O_CLOEXEC)
    pid = os.fork()
    if pid == 0:
        try:
            os.close(hold)
            unshare(CLONE_NEWUSER)
            os.write(its_ready, b"0")
            os.read(its_hold, 1)  # until this process is killed, or the other one ends
        except OSError as error:
            os.write(its_ready, str(error.errno).encode())
        finally:
            os._exit(0)
    try:
        os.close(its_ready)
        os.close(its_hold)
        number = int(os.read(ready, 16) or 0)
        if number:
            raise OSError(number, os.strerror(number), "new user namespace")
        for name, lines in (("uid_map", uids), ("gid_map", gids)):
            text = "".join(f"{inside} {outside} {count}\n" for inside, outside, count in lines)
            write_file(f"/proc/{pid}/{name}", text)
        return os.open(f"/proc/{pid}/ns/user", os.O_RDONLY | os.O_CLOEXEC)
    finally:
        os.close(ready)
        os.close(hold)
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
