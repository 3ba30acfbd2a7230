"""The mount API that works on descriptors (fsopen(2), open_tree(2), move_mount(2), mount_setattr(2)).

Mounts are made detached and attached by descriptor, so no path is resolved twice and a read-only bind is
read-only from its first instant (the old mount(2) needs two calls and is writable in between).
"""

from __future__ import annotations

import ctypes
import os
import struct
from collections.abc import Mapping

from isolator.linux._libc import call, failed, libc, syscall
from isolator.linux.descriptors import owning

AT_FDCWD = -100
AT_EMPTY_PATH = 0x1000
AT_RECURSIVE = 0x8000

RDONLY = 0x01
NOSUID = 0x02
NODEV = 0x04
NOEXEC = 0x08

_IDMAP = 0x00100000

MS_PRIVATE = 1 << 18

_OPEN_TREE_CLONE = 1
_OPEN_TREE_CLOEXEC = os.O_CLOEXEC
_FSOPEN_CLOEXEC = 1
_FSMOUNT_CLOEXEC = 1
_SET_FLAG, _SET_STRING, _CREATE = 0, 1, 6
_MOVE_EMPTY_FROM = 0x4
_MNT_DETACH = 2
_MS_REMOUNT = 32
_MS_BIND, _MS_REC = 4096, 16384
_MOUNT_ATTR = struct.Struct("=4Q")
"""Attributes to set and to clear, the propagation, and the descriptor of a user namespace."""


def new_filesystem(kind: str, options: Mapping[str, str | None] | None = None, *, attributes: int = 0) -> int:
    """Make a detached mount of a new file system; an option whose value is None is a flag."""
    with owning(syscall("fsopen", kind.encode(), _FSOPEN_CLOEXEC)) as context:
        for key, value in (options or {}).items():
            command, text = (_SET_FLAG, None) if value is None else (_SET_STRING, value.encode())
            syscall("fsconfig", context, command, key.encode(), text, 0, what=f"{kind} option {key}={value}")
        syscall("fsconfig", context, _CREATE, None, None, 0, what=f"new {kind}")
        return syscall("fsmount", context, _FSMOUNT_CLOEXEC, attributes)


def clone_tree(path: str, *, directory: int = AT_FDCWD, recursive: bool = True) -> int:
    """A detached copy of the mount tree at ``path`` (or of ``directory`` itself when ``path`` is empty)."""
    flags = _OPEN_TREE_CLONE | _OPEN_TREE_CLOEXEC | (AT_RECURSIVE if recursive else 0)
    flags |= 0 if path else AT_EMPTY_PATH
    return syscall("open_tree", directory, os.fsencode(path), flags, what=f"bind of {path or directory}")


def set_attributes(fd: int, attributes: int, *, clear: int = 0, recursive: bool = True) -> None:
    """Set (and clear) mount attributes on the tree behind ``fd``."""
    _setattr(fd, "", attributes, clear, 0, AT_EMPTY_PATH | (AT_RECURSIVE if recursive else 0))


def map_ids(fd: int, namespace: int) -> None:
    """Show the detached tree behind ``fd`` with the owners that a user namespace's maps give (mount_setattr(2)).

    Each line of a map is: first id on disk, first id as it is shown, count. Raises EINVAL where a file system of the
    tree has no such mounts, EPERM where one is mapped already.
    """
    _setattr(fd, "", _IDMAP, 0, 0, AT_EMPTY_PATH | AT_RECURSIVE, namespace=namespace)


def set_propagation(path: str, propagation: int) -> None:
    """Change the propagation of the whole tree at ``path``."""
    _setattr(AT_FDCWD, path, 0, 0, propagation, AT_RECURSIVE)


def _setattr(
    fd: int, path: str, attributes: int, clear: int, propagation: int, flags: int, *, namespace: int = 0
) -> None:
    attr = _MOUNT_ATTR.pack(attributes, clear, propagation, namespace)
    syscall("mount_setattr", fd, os.fsencode(path), flags, attr, len(attr))


def attach(fd: int, path: str) -> None:
    """Attach the detached mount behind ``fd`` at ``path``."""
    raw = path.encode(errors="surrogateescape")  # as os.fsencode, which takes six page faults in a cage
    syscall("move_mount", fd, b"", AT_FDCWD, raw, _MOVE_EMPTY_FROM, what=f"mount on {path}")


def mount(kind: str, path: str, flags: int, options: str) -> None:
    """Mount a new file system with one call (mount(2)), at a path that nobody else can change."""
    raw = kind.encode()
    if libc.mount(raw, path.encode(), raw, ctypes.c_ulong(flags), options.encode()):
        raise failed(f"mount of {kind} on {path}")


def bind(source: str, target: str, *, recursive: bool = False) -> None:
    """Show ``source`` at ``target`` too, with the attributes of its mount, by one call (mount(2)): half the time of a
    detached copy; for paths that nobody else can change."""
    bind_again(new_bind(source, target, recursive=recursive))


Bind = tuple[bytes, bytes, None, ctypes.c_ulong, None]
"""The arguments of a ``bind`` that is made in many places."""


def new_bind(source: str, target: str, *, recursive: bool) -> Bind:
    """Put the arguments of a ``bind`` together."""
    return source.encode(), target.encode(), None, ctypes.c_ulong(_MS_BIND | _MS_REC if recursive else _MS_BIND), None


def bind_again(arguments: Bind) -> None:
    """Make a ``bind``."""
    if libc.mount(*arguments):
        raise failed(f"bind of {arguments[0].decode()} on {arguments[1].decode()}")


def remount(path: str, flags: int, options: str) -> None:
    """Change the options of the file system that is mounted at ``path``; the flags are those of the mount anew."""
    call(
        libc.mount, f"change of the mount on {path}",
        None, os.fsencode(path), None, ctypes.c_ulong(flags | _MS_REMOUNT), options.encode(),
    )  # fmt: skip


def open_mount(path: str) -> int:
    """A descriptor of the mount at ``path``, to change its attributes."""
    return os.open(path, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)


def pivot_root() -> None:
    """Make the current directory, a mount point, the root, and detach the old root."""
    syscall("pivot_root", b".", b".")
    call(libc.umount2, "umount of the old root", b".", ctypes.c_int(_MNT_DETACH))
    os.chdir("/")


def unmount(path: str, *, lazy: bool = False) -> None:
    """Unmount ``path``, never following a symlink in its last component."""
    flags = 8 | (_MNT_DETACH if lazy else 0)  # UMOUNT_NOFOLLOW
    call(libc.umount2, f"umount of {path}", os.fsencode(path), ctypes.c_int(flags))
