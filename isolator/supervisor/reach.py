"""Open what belongs to a running cage through its pid 1, which is ours, so that no descriptor is held meanwhile.

What is opened is compared with what the cage was made with: a pid may be another process's by the time it is used.
"""

from __future__ import annotations

import contextlib
import errno
import os

from isolator.linux import mount
from isolator.linux.files import openat2

SOCKET_FOLDER = "/run/isolator/plugin"
"""Folder of a sidecar's socket, in its cage."""

Identity = tuple[int, int]
"""Device and inode."""


def identity(status: os.stat_result) -> Identity:
    """Device and inode of a file, by which it is known whatever its name."""
    return status.st_dev, status.st_ino


def open_folder(pid: int, known: Identity) -> int:
    """A descriptor (O_PATH) of the cage's socket folder; raises OSError, FileNotFoundError once the cage has ended."""
    try:
        root = os.open(f"/proc/{pid}/root", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    except ProcessLookupError as error:  # it ends at this moment
        raise FileNotFoundError(errno.ENOENT, error.strerror, SOCKET_FOLDER) from None
    try:
        folder = openat2(root, SOCKET_FOLDER.lstrip("/"), os.O_PATH | os.O_DIRECTORY)
    finally:
        os.close(root)
    if identity(os.fstat(folder)) == known:
        return folder
    os.close(folder)
    raise FileNotFoundError(errno.ENOENT, "the cage has ended", SOCKET_FOLDER)


def empty_folder() -> int:
    """A descriptor of a folder in which nothing is, for one that is gone."""
    return mount.new_filesystem("tmpfs", {"nr_inodes": "1", "mode": "0700"})


def find_pipe(pid: int, inode: int) -> str:
    """The place of a log pipe's end that pid 1 keeps (``isolator.layers.plan.LOGS``); empty: it has none."""
    with contextlib.suppress(OSError):
        for name in os.listdir(folder := f"/proc/{pid}/fd"):
            with contextlib.suppress(OSError):
                if os.readlink(place := f"{folder}/{name}") == f"pipe:[{inode}]":
                    return place
    return ""


def open_pipe(pid: int, inode: int) -> int:
    """A reading end of a log pipe; of a cage that has ended one of a pipe that is at its end."""
    with contextlib.suppress(OSError):
        return os.open(find_pipe(pid, inode), os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    at_its_end, writer = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
    os.close(writer)
    return at_its_end
