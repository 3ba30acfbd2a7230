"""Check that a file can be executed in a cage: at registration, with the remedy, rather than at the first event."""

from __future__ import annotations

import errno
import os
import platform
import stat
import struct
from pathlib import Path

from isolator.errors import UsageError
from isolator.linux.descriptors import FdSet
from isolator.linux.files import openat2

_MACHINES = {
    3: "i386", 8: "mips", 20: "powerpc", 21: "ppc64le", 22: "s390x", 40: "arm", 62: "x86_64", 183: "aarch64",
    243: "riscv64", 258: "loongarch64",
}  # fmt: skip


def check_program(folder: Path, relative: str, *, shown: str) -> None:
    """Raise UsageError unless ``relative`` below ``folder`` is a program this host can execute.

    No component may be a link, so that an approved path cannot point elsewhere. ``shown`` is its name for the operator.
    """
    with FdSet() as owned:
        directory = owned.add(os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC))
        try:
            fd = owned.add(openat2(directory, relative.removeprefix("./"), os.O_RDONLY | os.O_NONBLOCK))
        except OSError as error:
            why = {
                errno.ENOENT: "no such file",
                errno.ELOOP: "it is (or lies behind) a symbolic link",
                errno.EXDEV: "it is outside the plugin's folder",
            }.get(error.errno or 0, error.strerror or "cannot be opened")
            raise UsageError(f"binary {shown}", why, 'correct "binary" in plugin.json') from None
        check_descriptor(fd, shown=shown)


def check_descriptor(fd: int, *, shown: str) -> None:
    """Raise UsageError unless an open file is a program this host can execute."""
    info = os.fstat(fd)
    if not stat.S_ISREG(info.st_mode):
        raise UsageError(f"binary {shown}", "not a regular file", 'correct "binary" in plugin.json')
    if not info.st_mode & 0o111:
        raise UsageError(f"binary {shown}", "not executable", f"chmod +x {shown}")
    head = os.pread(fd, 4096, 0)
    if head.startswith(b"#!"):
        _check_interpreter(head, shown)
    elif head.startswith(b"\x7fELF"):
        _check_elf(head, shown)
    else:
        raise UsageError(
            f"binary {shown}", "neither an ELF program nor a script",
            "begin a script with a line such as #!/usr/bin/env python3",
        )  # fmt: skip


def _check_interpreter(head: bytes, shown: str) -> None:
    fields = os.fsdecode(head[2:].split(b"\n", 1)[0]).split()
    if not fields:
        raise UsageError(f"binary {shown}", "its first line names no interpreter", "write #!/usr/bin/env python3")
    if fields[0].endswith("\r") or fields[-1].endswith("\r"):
        raise UsageError(f"binary {shown}", "its first line ends in CR LF", "save it with Unix line ends")
    interpreter = fields[0]
    if interpreter == "/usr/bin/env":
        name = next((text for text in fields[1:] if not text.startswith("-") and "=" not in text), "")
        if not any(Path(folder, name).exists() for folder in ("/usr/local/bin", "/usr/bin", "/bin")):
            raise UsageError(f"binary {shown}", f"no interpreter {name!r} on this host", f"install {name}")
    elif not Path(interpreter).exists():
        raise UsageError(f"binary {shown}", f"no interpreter {interpreter} on this host", f"install {interpreter}")


def _check_elf(head: bytes, shown: str) -> None:
    order = "<" if head[5] == 1 else ">"
    machine = struct.unpack_from(f"{order}H", head, 18)[0]
    built_for = _MACHINES.get(machine, f"machine {machine}")
    here = platform.machine()
    if built_for != here:
        raise UsageError(f"binary {shown}", f"built for {built_for}, this host is {here}", f"build it for {here}")
