"""A collector in the hands of whoever broke it: with its rights or with all of root's, it tries what it should not.

``python3 -I -m tests.collector.taken_over HOW UID GID GROUPS FOLDER OUTSIDE``: prints the names of the attempts that
succeed. FOLDER has been handed over, OUTSIDE is a file that the user may read and write, elsewhere. HOW is ``hardened``
``user`` (all but the last step) or ``root`` (as it was started).
"""

from __future__ import annotations

import os
import signal
import socket
import sys
from collections.abc import Callable

from isolator.collector.hardening import become, read_only_below, rules
from isolator.layers.seccomp.layer import compile_rules
from isolator.linux.files import openat2


def _read(folder: int, outside: str) -> None:
    os.close(openat2(folder, "mine", os.O_RDONLY))


def _read_outside(folder: int, outside: str) -> None:
    os.close(openat2(folder, outside, os.O_RDONLY, resolve=0))


def _write(folder: int, outside: str) -> None:
    os.close(openat2(folder, "mine", os.O_WRONLY))


def _create(folder: int, outside: str) -> None:
    os.close(openat2(folder, f"new{os.getpid()}", os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode=0o600))


def _read_of_root(folder: int, outside: str) -> None:
    os.close(openat2(folder, "roots", os.O_RDONLY))


def _connect(folder: int, outside: str) -> None:
    socket.socket(socket.AF_UNIX).close()


def _signal(folder: int, outside: str) -> None:
    os.kill(os.getppid(), 0)


def _fork(folder: int, outside: str) -> None:
    child = os.fork()
    if child == 0:
        os._exit(0)
    os.waitpid(child, 0)


def _become_root(folder: int, outside: str) -> None:
    os.setresuid(0, 0, 0)


def _trace(folder: int, outside: str) -> None:
    os.close(os.open("/proc/self/mem", os.O_RDWR))


ATTEMPTS: dict[str, Callable[[int, str], None]] = {
    "read": _read, "read outside": _read_outside, "write": _write, "create": _create, "read of root": _read_of_root,
    "connect": _connect, "signal": _signal, "fork": _fork, "become root": _become_root, "trace": _trace,
}  # fmt: skip


def main() -> None:
    """Make the attempts."""
    how, uid, gid, groups, path, outside = sys.argv[1:]
    folder = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    program = compile_rules(rules())
    if how != "root":
        become(int(uid), int(gid), [int(group) for group in groups.split(",") if group])
    if how == "hardened":
        read_only_below([folder], program)
    for name, attempt in ATTEMPTS.items():
        try:
            attempt(folder, outside)
        except OSError:
            continue
        os.write(1, f"{name}\n".encode())
    os.write(1, f"dumpable {_dumpable()}\n".encode() if how != "hardened" else b"")
    os.write(1, b"still here\n")
    signal.alarm(0) if how == "root" else None


def _dumpable() -> bool:
    import prctl

    return bool(prctl.get_dumpable())


if __name__ == "__main__":
    main()
