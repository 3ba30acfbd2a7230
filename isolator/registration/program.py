"""Check that a file can be executed in a cage: at registration, with the remedy, rather than at the first event."""

from __future__ import annotations

import contextlib
import errno
import os
import stat
import struct
from pathlib import Path

from isolator.base.structs import struct_class
from isolator.errors import UsageError, translated
from isolator.layers.filesystem import host_folders
from isolator.linux.descriptors import FdSet, owning
from isolator.linux.elf import MACHINES
from isolator.linux.files import RESOLVE_BENEATH, RESOLVE_NO_MAGICLINKS, openat2
from isolator.policy.names import path_covers

_ELFCLASS64, _PT_INTERP = 2, 3
_SEARCHED = ("/usr/local/bin", "/usr/bin", "/bin")
_MOST_STEPS = 1000
_CORRECT = 'correct "binary" in plugin.json'


@struct_class(frozen=True)
class CageView:
    """Files that a plugin will see at the place where its program runs."""

    plugin: Path
    """The host's copy of ``/plugin``."""
    read: tuple[str, ...] = ()
    """Folders of the host that its policy opens, or may."""

    def has(self, path: str) -> bool:
        """Whether there is something at an absolute path of the cage, every link followed as the cage does."""
        if path_covers("/plugin", os.path.normpath(path)):
            inside = os.path.relpath(path, "/plugin")
            with owning(os.open(self.plugin, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)) as root:
                try:
                    os.close(openat2(root, inside, os.O_PATH, resolve=RESOLVE_BENEATH | RESOLVE_NO_MAGICLINKS))
                except OSError:
                    return False
                return True
        here, left = "/", path.split("/")
        for _ in range(_MOST_STEPS):
            while left and left[0] in ("", "."):
                left.pop(0)
            if not left:
                return self._shows(here) and os.path.exists(here)
            here = os.path.normpath(os.path.join(here, left.pop(0)))
            if os.path.islink(here):
                if not self._shows(here):
                    return False
                goal = os.readlink(here)
                here, left = "/" if goal.startswith("/") else os.path.dirname(here), [*goal.split("/"), *left]
        return False

    def _shows(self, path: str) -> bool:
        return any(path_covers(folder, path) for folder in (*host_folders(), *self.read))


def check_program(view: CageView, relative: str, *, shown: str) -> None:
    """Raise UsageError unless ``relative`` in the plugin's folder is a program that a cage can execute.

    No component may be a link, so that an approved path cannot point elsewhere. ``shown`` is its name for the operator.
    """
    with FdSet() as owned:
        directory = owned.add(os.open(view.plugin, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC))
        try:
            fd = owned.add(openat2(directory, relative.removeprefix("./"), os.O_RDONLY | os.O_NONBLOCK))
        except OSError as error:
            why = {
                errno.ENOENT: "no such file",
                errno.ELOOP: "it is (or lies behind) a symbolic link",
                errno.EXDEV: "it is outside the plugin's folder",
            }.get(error.errno or 0, error.strerror or "cannot be opened")
            remedy = f"build it first, or {_CORRECT}" if error.errno == errno.ENOENT else _CORRECT
            raise UsageError(f"binary {shown}", why, remedy) from None
        check_descriptor(fd, view, shown=shown)


def check_descriptor(fd: int, view: CageView, *, shown: str) -> None:
    """Raise UsageError unless an open file is a program that a cage with this view can execute."""
    info = os.fstat(fd)
    if not stat.S_ISREG(info.st_mode):
        raise UsageError(f"binary {shown}", "not a regular file", _CORRECT)
    if not info.st_mode & 0o111:
        raise UsageError(f"binary {shown}", "not executable", f"chmod +x {shown}")
    head = os.pread(fd, 4096, 0)
    if head.startswith(b"#!"):
        _check_interpreter(head, view, shown)
    elif head.startswith(b"\x7fELF"):
        _check_elf(head, view, shown)
    else:
        why = "neither an ELF program nor a script"
        raise UsageError(f"binary {shown}", why, "begin a script with a line such as #!/usr/bin/env python3")


def _check_interpreter(head: bytes, view: CageView, shown: str) -> None:
    line = head[2:].split(b"\n", 1)[0]
    if line.endswith(b"\r"):
        raise UsageError(f"binary {shown}", "its first line ends in CR LF", "save it with Unix line ends")
    # As the kernel does: what comes after the interpreter is one argument.
    interpreter, _, argument = os.fsdecode(line).strip(" \t").replace("\t", " ").partition(" ")
    argument = argument.strip(" ")
    if not interpreter:
        raise UsageError(f"binary {shown}", "its first line names no interpreter", "write #!/usr/bin/env python3")
    interpreter = os.path.join("/plugin", interpreter)
    _check_seen(interpreter, view, shown)
    if interpreter != "/usr/bin/env":
        return
    if " " in argument and not argument.startswith("-"):
        why = f'env takes "{argument}" for one name'
        raise UsageError(f"binary {shown}", why, f"write #!/usr/bin/env -S {argument}")
    name = next((text for text in argument.split() if not text.startswith("-") and "=" not in text), "")
    if "/" in name:
        _check_seen(os.path.join("/plugin", name), view, shown)
    elif not any(view.has(f"{folder}/{name}") for folder in _SEARCHED if name):
        raise UsageError(f"binary {shown}", f"no interpreter {name!r} in a cage", f"install {name} below /usr")


def _check_elf(head: bytes, view: CageView, shown: str) -> None:
    with translated((IndexError, struct.error), UsageError, f"binary {shown}", "is cut short", "build it again"):
        order = "<" if head[5] == 1 else ">"
        (machine,) = struct.unpack_from(f"{order}H", head, 18)
    built_for = MACHINES.get(machine, f"machine {machine}")
    here = os.uname().machine
    if built_for != here:
        raise UsageError(f"binary {shown}", f"built for {built_for}, this host is {here}", f"build it for {here}")
    interpreter = _elf_interpreter(head, order)
    if interpreter:
        _check_seen(interpreter, view, shown)


def _elf_interpreter(head: bytes, order: str) -> str:
    """The dynamic linker that a 64-bit program names (elf(5)); empty when its first page does not say."""
    with contextlib.suppress(struct.error, IndexError):
        if head[4] == _ELFCLASS64:
            (table,) = struct.unpack_from(f"{order}Q", head, 32)
            size, count = struct.unpack_from(f"{order}HH", head, 54)
            for index in range(min(count, 64)):
                kind, _, offset, *_, length = struct.unpack_from(f"{order}IIQQQQ", head, table + index * size)
                if kind == _PT_INTERP and offset + length <= len(head):
                    return os.fsdecode(head[offset : offset + length].rstrip(b"\0"))
    return ""


def _check_seen(interpreter: str, view: CageView, shown: str) -> None:
    if view.has(interpreter):
        return
    if path_covers("/plugin", os.path.normpath(interpreter)):
        where, remedy = "not in the plugin's folder", "put it there"
    elif os.path.exists(interpreter):
        where = "not visible in a cage"
        remedy = "use one below /usr, put it into the plugin's folder, or request its folder in filesystem.read"
    else:
        where, remedy = "not on this host", f"install {os.path.basename(interpreter)}"
    raise UsageError(f"binary {shown}", f"needs {interpreter}, which is {where}", remedy)
