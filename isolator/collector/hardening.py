"""Turn a process of root's into one that only reads, with another user's rights, before it touches what is that user's.

Root starts it, so there is no moment at which the user could trace it or read its memory. It becomes the user in one
step, keeps no capability (a caller who is root keeps the one to read everything) and can start nothing; once it has the
descriptors that it is to read, it loses every file that is not below them and every call but those that read.
"""

from __future__ import annotations

import os
import resource
import signal
from collections.abc import Iterator, Sequence

import prctl

from isolator.layers.seccomp import profiles as syscalls
from isolator.linux import landlock, seccomp
from isolator.linux.capability import clear_sets, drop_bounding_set, keep_only, last_capability
from isolator.linux.coredump import start_no_handler

SECONDS = 120
"""Its whole life."""
CPU_SECONDS = 60
_CAP_DAC_READ_SEARCH = 2
_CALLS = (
    "brk clock_gettime close dup exit exit_group fcntl fstat fstatfs futex getdents64 geteuid getpid getrandom gettid "
    "lseek madvise mmap mprotect mremap munmap newfstatat openat2 read readlink readlinkat rt_sigaction rt_sigprocmask "
    "rt_sigreturn sched_yield statx write"
).split()


def become(uid: int, gid: int, groups: Sequence[int]) -> None:
    """Become this user for good, with no other right than to read. Raises OSError."""
    signal.alarm(SECONDS)
    start_no_handler()
    prctl.set_no_new_privs(True)
    prctl.set_dumpable(False)
    drop_bounding_set(last_capability())
    for kind, most in (
        (resource.RLIMIT_CPU, CPU_SECONDS),
        (resource.RLIMIT_NPROC, 0),
        (resource.RLIMIT_NOFILE, 256),
        (resource.RLIMIT_FSIZE, 0),
        (resource.RLIMIT_MEMLOCK, 0),
    ):
        resource.setrlimit(kind, (most, most))
    os.setgroups(groups)
    os.setresgid(gid, gid, gid)
    os.setresuid(uid, uid, uid)
    if uid == 0:
        keep_only(_CAP_DAC_READ_SEARCH)
    else:
        clear_sets()
    # Changing the uid has done so already, unless it is root's or the host's fs.suid_dumpable says otherwise.
    prctl.set_dumpable(False)


def read_only_below(folders: Sequence[int], program: bytes) -> None:
    """Lose all files but those below these descriptors, and all calls but those of ``program``. Raises OSError."""
    landlock.read_only_below(folders)
    seccomp.load_filter(program, listener=False)


def rules() -> Iterator[syscalls.Rule]:
    """The calls that stay; any other fails."""
    for name in _CALLS:
        yield name, syscalls.ALLOW, ()
