"""Small disks for tests, and how one dies."""

from __future__ import annotations

import contextlib
import fcntl
import os
import struct
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

_EXT4_IOC_SHUTDOWN = 0x8004587D
_NO_LOG_FLUSH = 2


def run(*command: str) -> None:
    """Run a command; raises when it fails."""
    subprocess.run(command, check=True)


@contextlib.contextmanager
def ext4_image(size: int) -> Iterator[str]:
    """The name of a file of so many bytes with an ext4 in it."""
    with tempfile.NamedTemporaryFile(prefix="isolator-disk-") as image:
        image.truncate(size)
        run("mkfs.ext4", "-q", "-m", "0", image.name)
        yield image.name


def shut_down(folder: Path) -> None:
    """Let the ext4 that is mounted there die: dirty pages are gone, and every call fails from now on."""
    fd = os.open(folder, os.O_RDONLY)
    try:
        fcntl.ioctl(fd, _EXT4_IOC_SHUTDOWN, struct.pack("I", _NO_LOG_FLUSH))
    finally:
        os.close(fd)
