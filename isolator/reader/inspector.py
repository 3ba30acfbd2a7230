"""The inspector process: ``python3 -I -m isolator.reader.inspector --folder-fd N``, started by
``isolator/registration/inspecting.py``.

Looks through one staged folder and writes one line of JSON, a list of sentences. It opens files, which the reader of
manifests does not; so it is a process of its own, and its filter leaves it looking, computing and writing that line.
"""

from __future__ import annotations

import json

from isolator.linux.files import write_all
from isolator.linux.unprivileged import inherited
from isolator.reader.hardening import confine
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


def harden() -> None:
    """Drop every right that looking through a folder does not need. Raises OSError."""
    confine(_CALLS, _MEMORY, CPU_SECONDS, _DESCRIPTORS)


def main() -> None:
    """Look through the folder of the command line."""
    folder = inherited()["folder"]
    host = Host.here()
    harden()
    write_all(1, json.dumps(inspect(folder, host)).encode() + b"\n")


if __name__ == "__main__":
    main()
