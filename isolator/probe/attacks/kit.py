"""Kit of every attempt: raw system calls, the promise to test against, and how an attempt is declared.

An attempt is a function that really tries one escape. It returns a sentence when it got through, and raises OSError
or ``Held`` when it was stopped. Anything else that it raises is a fault of the attempt, and never counts as held.
Only the standard library: this package runs inside the cage, under the system's own Python.
"""

from __future__ import annotations

import ctypes
import os
import platform
from collections.abc import Callable
from dataclasses import dataclass, field

libc = ctypes.CDLL(None, use_errno=True)
_syscall = libc.syscall
_syscall.restype = ctypes.c_long

X86 = platform.machine() == "x86_64"

# (x86_64, aarch64); calls above 424 have one number everywhere.
_OLD = {
    "add_key": (248, 217),
    "adjtimex": (159, 171),
    "bpf": (321, 280),
    "chroot": (161, 51),
    "clone": (56, 220),
    "fanotify_init": (300, 262),
    "finit_module": (313, 273),
    "getpid": (39, 172),
    "init_module": (175, 105),
    "io_setup": (206, 0),
    "ioctl": (16, 29),
    "kexec_load": (246, 104),
    "keyctl": (250, 219),
    "mbind": (237, 235),
    "memfd_create": (319, 279),
    "mknodat": (259, 33),
    "mount": (165, 40),
    "mq_open": (240, 180),
    "name_to_handle_at": (303, 264),
    "open_by_handle_at": (304, 265),
    "perf_event_open": (298, 241),
    "personality": (135, 92),
    "pivot_root": (155, 41),
    "process_vm_readv": (310, 270),
    "ptrace": (101, 117),
    "quotactl": (179, 60),
    "reboot": (169, 142),
    "sethostname": (170, 161),
    "setns": (308, 268),
    "shmctl": (31, 195),
    "shmget": (29, 194),
    "swapon": (167, 224),
    "syslog": (103, 116),
    "umount2": (166, 39),
    "unshare": (272, 97),
    "userfaultfd": (323, 282),
}
_NEW = {
    "open_tree": 428,
    "move_mount": 429,
    "fsopen": 430,
    "fsconfig": 431,
    "fsmount": 432,
    "io_uring_setup": 425,
    "clone3": 435,
    "pidfd_getfd": 438,
}
NUMBERS = {**_NEW, **{name: pair[0] if X86 else pair[1] for name, pair in _OLD.items()}}


def last_error(name: str) -> OSError:
    """The error of the last call of the C library, for raising; ``name`` is what was called."""
    number = ctypes.get_errno()
    return OSError(number, os.strerror(number), name)


def syscall(name: str, *args: object) -> int:
    """Make a system call; integers are passed as full 64-bit words, bytes as a pointer. Raises OSError."""
    words = [
        ctypes.c_long(a) if isinstance(a, int) else ctypes.c_char_p(a) if isinstance(a, bytes) else a for a in args
    ]
    result: int = _syscall(ctypes.c_long(NUMBERS[name]), *words)
    if result < 0:
        raise last_error(name)
    return result


def set_limit(number: int, value: int) -> None:
    """setrlimit(2) of both limits; Python's own turns a refusal into a ValueError. Raises OSError."""
    pair = (ctypes.c_ulong * 2)(value, value)
    if libc.setrlimit(ctypes.c_int(number), pair):
        raise last_error("setrlimit")


def attach_segment(segment: int, flags: int = 0) -> int:
    """The address of a System V segment, attached (shmat(2)). Raises OSError."""
    libc.shmat.restype = ctypes.c_void_p
    address: int = libc.shmat(ctypes.c_int(segment), None, ctypes.c_int(flags))
    if address == ctypes.c_void_p(-1).value:
        raise last_error("shmat")
    return address


class Held(Exception):
    """The attempt was stopped by something that is no errno."""


@dataclass(frozen=True)
class Promise:
    """Promises of the cage's policy, and bait that must not be found. Sizes in bytes, cpu in thousandths of a core."""

    uid: int = 0
    gid: int = 0
    memory: int = 0
    cpu: int = 0
    tasks: int = 0
    nofile: int = 0
    tmp: int = 0
    tmp_inodes: int = 0
    shm: int = 0
    state: int = 0
    terminals: int = 0
    read_only: list[str] = field(default_factory=list)
    """Folders of the cage that nothing may be written to."""
    hidden: list[str] = field(default_factory=list)
    """Paths of the daemon on the host."""
    host_name: str = ""
    machine_id: str = ""
    marker: str = ""
    """A string in the environment of the process that built the cage."""
    host_port: int = 0
    """A port on the host's 127.0.0.1 that accepts connections."""
    abstract: str = ""
    """An abstract Unix socket of the host that accepts connections."""
    segment: int = 0
    """The id of a System V segment of the host that anybody may read; it holds the marker."""
    granted: list[str] = field(default_factory=list)
    """Paths of the host that the policy lets it read."""
    booted: float = 0.0
    """The host's CLOCK_BOOTTIME when the cage was made; 0 where this host cannot give a cage one of its own."""
    init: int = 1
    """Pid 1 of the cage, as the cage sees it."""
    descriptors: list[int] = field(default_factory=list)
    """Descriptors that were open when the battery began."""


@dataclass(frozen=True)
class Attempt:
    """An escape to try: the first layer to stop it, its description in plain words, its time limit."""

    name: str
    layer: str
    title: str
    run: Callable[[Promise], str]
    seconds: float
    alone: bool
    """The attempt may take the whole cage down with it, so it gets a cage of its own."""
    strict: bool
    """Only the profile ``strict`` stops it."""


ATTEMPTS: dict[str, Attempt] = {}


def attempt(
    layer: str, title: str, *, name: str = "", seconds: float = 5.0, alone: bool = False, strict: bool = False
) -> Callable[[Callable[[Promise], str]], Callable[[Promise], str]]:
    """Declare a function as an attempt, named after it unless ``name`` says otherwise."""

    def declare(function: Callable[[Promise], str]) -> Callable[[Promise], str]:
        key = name or function.__name__.replace("_", "-")
        assert key not in ATTEMPTS, key
        ATTEMPTS[key] = Attempt(key, layer, title, function, seconds, alone, strict)
        return function

    return declare
