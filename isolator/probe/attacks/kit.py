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

CALLS = (
    "add_key adjtimex bpf chroot clone clone3 fanotify_init fsconfig fsmount fsopen init_module io_setup "
    "io_uring_setup ioctl kexec_load keyctl memfd_create mknodat mount move_mount mq_open name_to_handle_at "
    "open_by_handle_at open_tree perf_event_open personality pidfd_getfd pivot_root process_vm_readv ptrace quotactl "
    "reboot sched_getattr sched_setattr sethostname setns shmctl shmget swapon syslog umount2 unshare userfaultfd"
).split()
NUMBERS: dict[str, int] = {}
"""Numbers of those calls by name, as the battery is told: nothing in a cage knows the numbers of its machine."""


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


def step(layer: str, name: str, title: str, act: Callable[[], object], outcome: str) -> None:
    """Declare an attempt that is one step; ``outcome``: the sentence where it is not stopped."""

    def run(promise: Promise) -> str:
        act()
        return outcome

    attempt(layer, title, name=name)(run)
