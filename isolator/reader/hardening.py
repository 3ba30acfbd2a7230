"""Drop the reader's rights before it reads the first byte of a stranger's.

It is started as a user that owns nothing, without capabilities, groups and any way to gain privileges. Here it also
loses all calls but those that compute, read, write and end: whoever breaks it can neither open a file nor a socket, nor
start anything, and what it may use up is little.
"""

from __future__ import annotations

import resource
from collections.abc import Iterable
from pathlib import Path

from isolator.errors import nearest
from isolator.layers.seccomp import profiles as syscalls
from isolator.layers.seccomp.layer import compile_rules
from isolator.linux import seccomp
from isolator.linux.coredump import start_no_handler
from isolator.linux.priority import go_behind

CPU_SECONDS = 3
"""Processor time of one manifest. The largest one takes a tenth."""
MEMORY = 256 << 20
"""Address space beyond what the interpreter and its modules have."""

_CALLS = (
    "brk clock_gettime close exit exit_group fstat futex getpid getrandom getrusage gettid lseek madvise mmap mprotect "
    "mremap munmap newfstatat prlimit64 read rt_sigaction rt_sigprocmask rt_sigreturn sched_yield setrlimit write"
).split()


def harden(manifests: int) -> None:
    """Drop every right that parsing so many manifests does not need, for good. Raises OSError."""
    nearest("", ())  # imports what it needs, as nothing here can do later
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    confine(_CALLS, used + MEMORY, _spent() + CPU_SECONDS * manifests, descriptors=0)


def confine(calls: Iterable[str], memory: int, cpu: int, descriptors: int) -> None:
    """Leave this process these calls and so much: bytes of address space, seconds of processor time, descriptors.

    It starts nothing and writes no file any more. Raises OSError.
    """
    program = compile_rules((name, syscalls.ALLOW, ()) for name in calls)  # first: it needs a library and memory
    go_behind(10)
    start_no_handler()
    for kind, most in (
        (resource.RLIMIT_AS, memory),
        (resource.RLIMIT_CPU, cpu),
        (resource.RLIMIT_NPROC, 0),
        (resource.RLIMIT_NOFILE, descriptors),
        (resource.RLIMIT_FSIZE, 0),
        (resource.RLIMIT_MEMLOCK, 0),
    ):
        resource.setrlimit(kind, (most, most))
    seccomp.load_filter(program, listener=False)


def begin_share() -> None:
    """Grant the next manifest its share of processor time; whoever uses up more is killed."""
    _, hard = resource.getrlimit(resource.RLIMIT_CPU)
    resource.setrlimit(resource.RLIMIT_CPU, (min(_spent() + CPU_SECONDS, hard), hard))


def _spent() -> int:
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return int(usage.ru_utime + usage.ru_stime) + 1
