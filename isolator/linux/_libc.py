"""The C library, and raw system calls by number. Everything raises OSError on failure."""

from __future__ import annotations

import ctypes
import os

libc = ctypes.CDLL(None, use_errno=True)
for _name in ("mount", "prctl", "pthread_sigmask", "setdomainname", "sethostname", "setns", "umount2", "unshare"):
    getattr(libc, _name)  # looked up once: at its first use in each clone of a launcher it would be in each of them

MACHINE = os.uname().machine

# Calls above 424 have one number on every architecture; the older ones differ.
_OLD = {
    "x86_64": {
        "pivot_root": 155, "seccomp": 317, "capget": 125, "capset": 126, "sched_setattr": 314, "sched_getattr": 315,
    },
    "aarch64": {
        "pivot_root": 41, "seccomp": 277, "capget": 90, "capset": 91, "sched_setattr": 274, "sched_getattr": 275,
    },
}  # fmt: skip
NUMBERS: dict[str, int] = {
    **_OLD.get(MACHINE, {}),
    "open_tree": 428,
    "move_mount": 429,
    "fsopen": 430,
    "fsconfig": 431,
    "fsmount": 432,
    "clone3": 435,
    "close_range": 436,
    "openat2": 437,
    "faccessat2": 439,
    "mount_setattr": 442,
    "landlock_create_ruleset": 444,
    "landlock_add_rule": 445,
    "landlock_restrict_self": 446,
}

_syscall = libc.syscall
_syscall.restype = ctypes.c_long


def failed(what: str) -> OSError:
    """The OSError for the current errno, naming the call or object that failed."""
    number = ctypes.get_errno()
    return OSError(number, os.strerror(number), what)


def syscall(
    name: str, *args: int | bytes | ctypes._Pointer[ctypes.Structure] | object | None, what: str | None = None
) -> int:
    """Make one system call by name; integers are passed as full 64-bit words. ``what``: the name in its error."""
    # A list, not a generator: each start makes forty such calls.
    words = [ctypes.c_long(one) if isinstance(one, int) else one for one in args]
    result: int = _syscall(ctypes.c_long(NUMBERS[name]), *words)
    if result < 0:
        raise failed(what or name)
    return result


def call(function: object, what: str, *args: object) -> int:
    """Call a libc function that returns -1 on failure."""
    result: int = function(*args)  # type: ignore[operator]  # ctypes' function pointers have no callable type
    if result < 0:
        raise failed(what)
    return result
