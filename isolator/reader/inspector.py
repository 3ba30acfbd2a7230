"""The inspector process: ``python3 -I -m isolator.reader.inspector --folder-fd N``, started by
``isolator/registration/inspecting.py``.

Looks through one staged folder and writes one line of JSON, a list of sentences. It opens files, which the reader of
manifests does not; so it is a process of its own, and its filter leaves it looking, computing and writing that line.
"""

from __future__ import annotations

import json
import os
import resource
from collections.abc import Iterator

from isolator.layers.seccomp import profiles as syscalls
from isolator.layers.seccomp.layer import compile_rules
from isolator.linux import seccomp
from isolator.linux.coredump import start_no_handler
from isolator.linux.priority import go_behind
from isolator.linux.unprivileged import inherited
from isolator.reader.inspection import Host, inspect

CPU_SECONDS = 20
"""For the largest folder that can be staged."""
_MEMORY = 512 << 20
_DESCRIPTORS = 256
"""One for each level of the folder, and one for a file."""
_CALLS = (
    "brk clock_gettime close exit exit_group fcntl fstat futex getdents64 getpid getrandom gettid ioctl lseek madvise "
    "mmap mprotect mremap munmap newfstatat openat pread64 read rt_sigaction rt_sigprocmask rt_sigreturn sched_yield "
    "write"
).split()


def rules() -> Iterator[syscalls.Rule]:
    """The calls that stay; any other fails."""
    for name in _CALLS:
        yield name, syscalls.ALLOW, ()


def harden() -> None:
    """Drop every right that looking through a folder does not need. Raises OSError."""
    program = compile_rules(rules())
    go_behind(10)
    start_no_handler()
    for kind, most in (
        (resource.RLIMIT_AS, _MEMORY),
        (resource.RLIMIT_CPU, CPU_SECONDS),
        (resource.RLIMIT_NPROC, 0),
        (resource.RLIMIT_NOFILE, _DESCRIPTORS),
        (resource.RLIMIT_FSIZE, 0),
        (resource.RLIMIT_MEMLOCK, 0),
    ):
        resource.setrlimit(kind, (most, most))
    seccomp.load_filter(program, listener=False)


def main() -> None:
    """Look through the folder of the command line."""
    folder = inherited()["folder"]
    host = Host.here()
    harden()
    line = memoryview(json.dumps(inspect(folder, host)).encode() + b"\n")
    while line:
        line = line[os.write(1, line) :]


if __name__ == "__main__":
    main()
